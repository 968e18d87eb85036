"""What the processes of a job do for tests/test_distributed.py; run as a script it is one of them."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from datasets import EpochPlan, TwoViewLoader, center_crops
from losses import TrainingStep
from models import build_model
from models.batch_norm import GlobalBatchNorm2d, share_batch_norm
from utils.distributed import Processes, joined
from utils.errors import UserError
from utils.features import extract_features

IMAGES = 6  # a batch, for 1, 2 and 3 processes
PIXELS = 40
LABELS = torch.tensor([7, 3, 7, 3, 3, 9])  # of the images of a batch, where they are given
PAPER = (0.9, 0.3, 0.001)
# name -> backbone, labels, weights of the losses (large reconstruction: its gradient must show), settings
CASES = {
    "resnet": ("resnet_small", None, (0.9, 0.3, 1.0), {}),
    "googlenet": ("googlenet", LABELS, (0.9, 0.3, 1.0), {"neg_m": 3, "recon_target": "image"}),
    "one cluster": ("resnet_small", torch.zeros(IMAGES, dtype=torch.long), PAPER, {"temperature": 0.5}),
    "instance softmax": ("resnet_small", None, (1.0, 0.0, 0.0), {"metric_loss": "instance", "neg_m": 2}),
    "without decoder": ("resnet_small", LABELS, (1.0, 2.0, 0.0), {"mu": 0.5, "alpha": 2.0}),
}


def training(case: str, processes: Processes, steps: int = 3) -> dict[str, Tensor]:
    """Losses of every step, gradients of the first, pseudo-labels, and weights and buffers after the last."""
    backbone, labels, weights, settings = CASES[case]
    device = torch.device("cpu")
    torch.manual_seed(1)
    model = build_model(backbone, n_cluster=5, low_dim=8).double()
    model.base_model = share_batch_norm(model.base_model, processes, device)
    model.train()
    module = TrainingStep(model, weights, processes=processes, **settings)
    module = processes.parallel(module, device, every_weight=all(weights))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    share = (processes.rank, processes.count)
    plan = EpochPlan(IMAGES * steps, IMAGES, PIXELS, seed=5, epoch=1, share=share)
    found = {}
    for step, (views, images) in enumerate(TwoViewLoader(pixels(IMAGES * steps), plan, workers=0)):
        assert len(views) == 2 * IMAGES // processes.count == 2 * len(images)
        own = None if labels is None else labels.view(processes.count, -1)[processes.rank]
        losses = module(model.normalization(views).double(), own)
        optimizer.zero_grad()
        losses["loss"].backward()
        if step == 0:
            found |= {f"gradient {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        found |= {f"step {step} {name}": value.detach() for name, value in losses.items()}
    return found | {f"after {name}": value.clone() for name, value in model.state_dict().items()}


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, PIXELS, PIXELS, 3)).astype(np.uint8)


def features(processes: Processes) -> dict[str, Tensor]:
    """Features of image counts that fill their batches, that do not, and that leave processes without a batch."""
    torch.manual_seed(2)
    model = build_model("resnet_small", n_cluster=5, low_dim=8)
    found = {}
    for count in (24, 23, 4):
        crops = center_crops(pixels(count), 4, workers=0, share=(processes.rank, processes.count))
        found[f"pooled {count}"], found[f"embedding {count}"] = extract_features(model, crops, "fp32", processes)
        assert len(found[f"pooled {count}"]) == count
    return found


def batch_norm(processes: Processes) -> dict[str, Tensor]:
    """A batch norm of 12 rows far from mean zero, its gradients and buffers, in training and in evaluation."""
    generator = torch.Generator().manual_seed(3)
    x = 3 + torch.randn(12, 4, 3, 3, generator=generator, dtype=torch.float64) * torch.arange(1, 13).view(12, 1, 1, 1)
    upstream = torch.randn(12, 4, 3, 3, generator=generator, dtype=torch.float64)
    norm = nn.BatchNorm2d(4, eps=0.01, momentum=0.3).double()
    nn.init.normal_(norm.weight, generator=generator)
    nn.init.normal_(norm.bias, generator=generator)
    names = set(norm.state_dict())
    norm = share_batch_norm(nn.Sequential(norm), processes, torch.device("cpu"))[0]
    assert isinstance(norm, GlobalBatchNorm2d) == (processes.count > 1) and set(norm.state_dict()) == names
    own = processes.own_views(x).clone().requires_grad_()
    out = norm(own)
    (out * processes.own_views(upstream)).sum().backward()
    found = {"out": processes.gather_views(out.detach()), "gradient": processes.gather_views(own.grad),
             "weight": processes.sum(norm.weight.grad), "bias": processes.sum(norm.bias.grad)}  # fmt: skip
    found |= {name: buffer.clone() for name, buffer in norm.named_buffers()}
    return found | {"evaluated": processes.gather_views(norm.eval()(own).detach())}


def talk(processes: Processes) -> None:
    """What the processes tell each other."""
    rank, last = processes.rank, processes.count - 1
    assert processes.first == (rank == 0)
    assert processes.largest(10 - rank) == 10 and processes.largest(rank) == last
    assert processes.from_first(f"from {rank}") == "from 0"
    rows = torch.arange(2 * IMAGES * 3).view(2 * IMAGES, 3)
    own = processes.own_views(rows)
    assert own.shape == (2 * IMAGES // processes.count, 3) and torch.equal(processes.gather_views(own), rows)
    processes.check_same({"lr": 0.1, "images": 24})
    try:
        processes.check_same({"lr": 0.1, "images": 24 + (rank == last)})
    except UserError as error:
        assert rank == last > 0 and f"images is 25 in process {last} and 24 in process 0" in str(error)
    else:
        assert rank < last or last == 0


def everything(processes: Processes) -> dict[str, dict[str, Tensor]]:
    """All of it; every process finds the very same."""
    torch.set_num_threads(1)
    talk(processes)
    found = {case: training(case, processes) for case in CASES if case != "googlenet" or processes.count < 3}
    found |= {"features": features(processes), "batch norm": batch_norm(processes)}
    for what, part in found.items():
        processes.check_same({f"{what}, {name}": digest(value) for name, value in part.items()})
    return found


def digest(value: Tensor) -> str:
    return hashlib.blake2b(value.contiguous().numpy()).hexdigest()


if __name__ == "__main__":  # FOLDER: one process of a job; the first saves what it found
    with joined() as processes:
        assert processes.count > 1
        found = everything(processes)
        if processes.first:
            torch.save(found, Path(sys.argv[1]) / f"{processes.count}.pt")
