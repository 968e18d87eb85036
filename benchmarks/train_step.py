"""A training step (2m rows, input included) beside a literal one: PIL transforms in 4 loader workers, float32,
contiguous, CrossMapLRN2d, a Python loop over clusters, every row decoded.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import paired
import torch
from torch import Tensor, nn

from datasets import EpochPlan, ResidentLoader, TwoViewLoader, crop_size
from losses import cbswr_losses, rim_loss, total_loss
from models import build_model
from models.lrn import LocalResponseNorm
from utils.features import network_autocast
from utils.process import keep_freed_memory

Step = Callable[[], dict[str, Tensor]]


class LiteralViews(torch.utils.data.Dataset):
    """Two views of each image through PIL and torchvision, as the released code makes them."""

    def __init__(self, images: np.ndarray, order: str, mean: tuple, std: tuple) -> None:
        from torchvision import transforms

        self.images = images
        self.order = [2, 1, 0] if order == "BGR" else [0, 1, 2]
        self.transform = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.RandomCrop(crop_size(images.shape[1])),
                transforms.RandomHorizontalFlip(0.75),
                transforms.ToTensor(),
                transforms.Lambda(lambda x: (x * 255)[self.order]),
                transforms.Normalize(mean, std),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = np.asarray(self.images[index])
        return self.transform(image), self.transform(image)


def literal_losses(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """The losses as the paper writes them: a loop over clusters, plain exp and log, each row decoded."""
    rows = len(inputs)
    embedding, logits, maps = model(inputs)
    labels = logits[: rows // 2].argmax(1).repeat(2)
    present = torch.unique(labels)
    centroids = torch.stack([maps[labels == label].mean(0) for label in present])
    centers = model.embed(model.pool(centroids.detach())).detach()
    other = labels[:, None] != present[None, :]
    exps = (embedding @ centers.t() / 0.1).exp()
    swapped = torch.cat([embedding[rows // 2 :], embedding[: rows // 2]]).detach()
    pos = ((embedding * swapped).sum(1) / 0.1).exp() / (exps * other).sum(1)
    neg = torch.log(1 - exps / exps.sum(1, keepdim=True)) * other
    own = torch.stack([(present == label).nonzero()[0, 0] for label in labels])
    decoded = model.decoder(centroids[own], size=inputs.shape[-2:])
    target = model.reconstruction_target(inputs)
    return {
        "metric": -(pos.log() + neg.sum(1)).mean(),
        "rim": rim_loss(logits),
        "reconstruction": torch.nn.functional.mse_loss(decoded, target),
    }


def literal_model(model: nn.Module) -> nn.Module:
    """A contiguous copy with torch's CrossMapLRN2d in place of the project's normalisation."""
    literal = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    for parent in literal.modules():
        for name, child in parent.named_children():
            if isinstance(child, LocalResponseNorm):
                setattr(parent, name, nn.CrossMapLRN2d(5, 1e-4, 0.75, 1))
    return literal


def optimise(model: nn.Module, losses: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Backward and a step of SGD."""
    optimizer.zero_grad(set_to_none=True)
    total_loss(losses).backward()
    optimizer.step()
    return {name: value.detach() for name, value in losses.items()}


def forever(make: Callable[[int], Any]) -> Iterator:
    """Epoch after epoch of the loader make(epoch)."""
    epoch = 0
    while True:
        epoch += 1
        yield from make(epoch)


def ours(model: nn.Module, images: np.ndarray, m: int, precision: str, device: torch.device, feed: str) -> Step:
    """A step of the project; feed: host (crops cut ahead and copied), device (resident images), tensor (no input)."""
    model = copy.deepcopy(model).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    resident = torch.from_numpy(np.array(images)).to(device) if feed == "device" else None

    def loader(epoch: int) -> TwoViewLoader | ResidentLoader:
        plan = EpochPlan(len(images), m, images.shape[1], 0, epoch)
        return TwoViewLoader(images, plan, 2) if resident is None else ResidentLoader(resident, plan)

    batches = forever(loader)
    fixed = model.normalization(next(batches)[0].to(device)) if feed == "tensor" else None

    def step() -> dict[str, Tensor]:
        inputs = fixed if fixed is not None else model.normalization(next(batches)[0].to(device, non_blocking=True))
        with network_autocast(device, precision):
            losses = cbswr_losses(model, inputs)
        return optimise(model, losses, optimizer)

    return step


def reference(model: nn.Module, images: np.ndarray, m: int, device: torch.device) -> Step:
    """A literal step with 4 loader workers."""
    literal = literal_model(model).to(device).train()
    optimizer = torch.optim.SGD(literal.parameters(), lr=1e-3)
    spec = model.normalization
    loader = torch.utils.data.DataLoader(
        LiteralViews(images, spec.order, spec.mean, spec.std),
        m,
        shuffle=True,
        num_workers=4,
        prefetch_factor=1,
        drop_last=True,
    )
    batches = forever(lambda _: loader)

    def step() -> dict[str, Tensor]:
        inputs = torch.cat(next(batches)).to(device)
        return optimise(literal, literal_losses(literal, inputs), optimizer)

    return step


def largest_difference(model: nn.Module, images: np.ndarray, m: int, device: torch.device) -> float:
    """Largest relative difference of a loss between the two on one batch, in float32, dropout off."""
    views, _ = next(iter(TwoViewLoader(images, EpochPlan(len(images), m, images.shape[1], 0, 1), 0)))
    here = model.to(device)
    inputs = here.normalization(views.to(device))
    mine, literal = copy.deepcopy(here).train(), literal_model(here).to(device).train()
    for network in (mine, literal):
        network.clustering[1].eval()
    with torch.no_grad():
        a, b = cbswr_losses(mine, inputs), literal_losses(literal, inputs)
    return max(abs(float(a[name]) / float(b[name]) - 1) for name in b)


def measure(backbone: str, size: int, m: int, count: int, precisions: list[str], repeats: int) -> dict[str, Any]:
    """All ways of one backbone; the step without input is of the first precision."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = build_model(backbone)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npy"
        np.save(path, np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8))
        images = np.load(path, mmap_mode="r")
        difference = largest_difference(model, images, m, device)
        ways = {
            **{f"ours, {name}": ours(model, images, m, name, device, "host") for name in precisions},
            f"ours, {precisions[0]}, no input": ours(model, images, m, precisions[0], device, "tensor"),
            "literal, fp32": reference(model, images, m, device),
        }
        if device.type == "cuda":
            name = f"ours, {precisions[0]}, resident images"
            ways[name] = ours(model, images, m, precisions[0], device, "device")
        timed = paired.in_turn(ways, repeats, device)
    for figures in timed.values():
        figures["rows_per_second"] = 2 * m / figures["median_s"]
    return {"rows": 2 * m, "image_size": size, "largest_relative_loss_difference_fp32": difference, "ways": timed}


def main() -> None:
    parser = paired.arguments("train_step", " ".join(__doc__.split()))
    parser.add_argument("--backbones", nargs="+", default=["googlenet", "resnet18"])
    parser.add_argument("--precisions", nargs="+", choices=["bf16", "fp32"], default=["bf16", "fp32"])
    parser.add_argument("--batch", type=int, default=64, help="m, images a batch (default 64)")
    options = parser.parse_args()
    keep_freed_memory()
    size, m, count = (64, 4, 16) if options.tiny else (256, options.batch, 8 * options.batch)
    backbones = ["googlenet"] if options.tiny else options.backbones
    result = {name: measure(name, size, m, count, options.precisions, options.repeats) for name in backbones}
    paired.write({"data": "random pixels", **result}, options)


if __name__ == "__main__":
    sys.exit(main())
