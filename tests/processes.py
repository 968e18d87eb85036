"""What the processes of a job do for tests/test_distributed.py; as a script it is one of them."""

from __future__ import annotations

import copy
import hashlib
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tensors import noise, random_pixels
from torch import Tensor, nn

import train
from datasets.arrays import Split
from datasets.views import EpochPlan, center_crops, two_view_batches
from methods import METHODS
from models import Pooling, build_model
from models.batch_norm import share_batch_norm
from recipes import fit_to_data
from utils.distributed import Processes, joined
from utils.errors import UserError
from utils.features import embeddings_of, pooled_features

IMAGES = 6  # a batch, for 1, 2 and 3 processes
STEPS = 2
CPU = torch.device("cpu")
SMALL = ("--backbone=resnet_small", "--n_cluster=5")
CASES = {
    "paper": ("--recipe=paper", "--n_cluster=5", "--train_batch_norm", "--recon=1"),
    "kmeans": ("--recipe=kmeans", "--n_cluster=5", "--positives=nn", "--neg_m=3"),
    "isif": ("--recipe=isif", "--neg_m=2"),
    "best": ("--recipe=best", "--cluster_sizes=3,6"),
    "stml": ("--recipe=stml", "--group=3", "--teacher_momentum=0.5"),
    "deepcluster": ("--recipe=deepcluster", "--n_cluster=5"),
    "proxy_anchor": ("--recipe=proxy_anchor",),
}  # (a large weight of the reconstruction, so that its gradient shows)


def training(case: str, processes: Processes) -> dict[str, Tensor]:
    """Train an epoch in float64.

    Returns the losses of each step, the gradients of the first, and all weights and buffers after
    the last.
    """
    network = ("--backbone=resnet_small", "--low_dim=8", f"--batch_size={IMAGES}")
    args = train.parse_args([*CASES[case], *network])
    pooling = Pooling.parse(args.layers, args.pool, args.head_init != "random", args.stripes)
    split = make_split(IMAGES * STEPS)
    fit_to_data(args, len(split), processes.world_size)
    torch.manual_seed(1)
    model = build_model(args.backbone, getattr(args, "n_cluster", 5), 8, pooling=pooling).double()
    model.base_model = share_batch_norm(model.base_model, processes, CPU)
    model.train_parts(args.train_stages, args.train_batch_norm)
    facts = {"n_images": len(split), "processes": processes}
    if METHODS[args.method].uses_labels:
        facts["labels"] = torch.arange(len(split)) % 4
    method = METHODS[args.method](model, args, **facts).double().train()
    step = processes.parallel(method, CPU, method.uses_all)
    optimizer = torch.optim.SGD(method.parameter_groups(0.02), lr=0.02)
    method.begin_epoch(1, partial(features, method, split, processes))
    neighbors = method.neighbors_and_positives()
    drawn = {"crop_area": args.crop_area, "share": processes.share}
    plan = EpochPlan(split, IMAGES, 5, 1, **neighbors, **drawn)
    results = {}
    for number, (views, index) in enumerate(two_view_batches(split.images, plan, workers=0)):
        losses = step(model.normalization(views).double(), index)
        optimizer.zero_grad()
        losses["loss"].backward()
        if number == 0:
            gradients = {name: p.grad for name, p in method.named_parameters()}
            results |= {f"gradient {n}": g.clone() for n, g in gradients.items() if g is not None}
        optimizer.step()
        method.end_step()
        results |= {f"step {number} {name}": value.detach() for name, value in losses.items()}
    return results | {f"after {name}": value for name, value in method.state_dict().items()}


def features(method: nn.Module, split: Split, processes: Processes) -> tuple[Tensor, Tensor]:
    """Compute the features of all images, float32 as in training."""
    single = copy.deepcopy(method.model).float()
    crops = center_crops(split, 4, workers=0, share=processes.share)
    (pooled,) = pooled_features(single, crops, processes=processes)
    return pooled.double(), embeddings_of(single, pooled).double()


def make_split(count: int) -> Split:
    """Draw images of 32 pixels without labels."""
    pixels = random_pixels(count, 32).numpy()
    return Split(pixels, np.full(count, -1), Path("none"), np.arange(count))


def all_features(processes: Processes) -> dict[str, Tensor]:
    """Compute features of counts that fill their batches, or do not, or are few batches."""
    torch.manual_seed(2)
    model = build_model("resnet_small", n_cluster=5, low_dim=8)
    results = {}
    for count in (24, 23, 4):
        crops = center_crops(make_split(count), 4, workers=0, share=processes.share)
        (pooled,) = pooled_features(model, crops, processes=processes)
        results |= {f"pooled {count}": pooled}
        results |= {f"embeddings {count}": embeddings_of(model, pooled)}
        assert len(pooled) == count
    return results


def talk(processes: Processes) -> None:
    """Check what the processes tell each other."""
    rank = processes.rank
    last = processes.world_size - 1
    assert processes.is_first == (rank == 0)
    assert processes.largest(10 - rank) == 10
    assert processes.largest(rank) == last
    assert processes.from_first(f"from {rank}") == "from 0"
    rows = noise(2 * IMAGES, 3)
    share = processes.local_views(rows)
    assert share.shape == (2 * IMAGES // processes.world_size, 3)
    assert torch.equal(processes.gather_views(share), rows)
    processes.check_same({"lr": 0.1, "images": 24})
    try:
        processes.check_same({"lr": 0.1, "images": 24 + (rank == last)})
    except UserError as error:
        message = f"images is 25 in process {last} and 24 in process 0"
        assert rank == last > 0 and message in str(error)
    else:
        assert rank < last or last == 0


def everything(processes: Processes) -> dict[str, dict[str, Tensor]]:
    """Do all of it, and check that every process has the very same results."""
    torch.set_num_threads(1)
    talk(processes)
    results = {case: training(case, processes) for case in CASES}
    results["features"] = all_features(processes)
    for title, part in results.items():
        processes.check_same({f"{title}, {name}": digest(value) for name, value in part.items()})
    return results


def digest(value: Tensor) -> str:
    """Return a hash of a tensor's bytes."""
    return hashlib.blake2b(value.contiguous().numpy()).hexdigest()


if __name__ == "__main__":  # FOLDER, where the first process saves the results
    with joined() as processes:
        results = everything(processes)
        if processes.is_first:
            torch.save(results, Path(sys.argv[1]) / f"{processes.world_size}.pt")
