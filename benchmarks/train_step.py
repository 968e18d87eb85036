"""A training step, its input included, beside a literal one.

The literal step is what the formulas of the paper say at first reading: views by torchvision in 4
workers, float32, contiguous, torch's own layers, a loop over clusters, each row decoded.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, if run as a script

from benchmarks import paired
from datasets.arrays import Split
from datasets.views import EpochPlan, crop_size, images_on, two_view_batches
from losses import cbswr_losses, rim_loss, total_loss
from models import build_model
from models.lrn import LocalResponseNorm
from utils.errors import run_script
from utils.features import network_autocast
from utils.options import whole

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class LiteralViews(torch.utils.data.Dataset):
    """Two views of each image by PIL and torchvision, as the released code makes them."""

    def __init__(self, images: np.ndarray, spec: Any) -> None:
        order = [2, 1, 0] if spec.order == "BGR" else [0, 1, 2]
        self.images = images
        self.transform = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.RandomCrop(crop_size(images.shape[1])),
                transforms.RandomHorizontalFlip(0.75),
                transforms.ToTensor(),
                transforms.Lambda(lambda x: (x * 255)[order]),
                transforms.Normalize(spec.mean, spec.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.images[index]), self.transform(self.images[index])


def literal_losses(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Compute the losses as the paper writes them."""
    m = len(inputs) // 2
    embedding, logits, maps = model(inputs)
    labels = logits[:m].argmax(1).repeat(2)
    present = torch.unique(labels)
    centroids = torch.stack([maps[labels == label].mean(0) for label in present])
    centers = model.embed(model.pool([centroids.detach()])).detach()
    is_other = labels[:, None] != present
    exps = (embedding @ centers.t() / 0.1).exp()
    swapped = embedding.roll(m, 0).detach()
    positive = ((embedding * swapped).sum(1) / 0.1).exp() / (exps * is_other).sum(1)
    negative = torch.log(1 - exps / exps.sum(1, keepdim=True)) * is_other
    decoded = model.decoder(centroids[torch.searchsorted(present, labels)], size=inputs.shape[-2:])
    target = model.reconstruction_target(inputs)
    return {
        "metric": -(positive.log() + negative.sum(1)).mean(),
        "rim": rim_loss(logits),
        "reconstruction": nn.functional.mse_loss(decoded, target),
    }


def literal_model(model: nn.Module) -> nn.Module:
    """Return a contiguous copy with torch's local response norm."""
    literal = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    for parent in literal.modules():
        for name, child in parent.named_children():
            if isinstance(child, LocalResponseNorm):
                norm = nn.LocalResponseNorm(child.size, child.alpha, child.beta, child.k)
                setattr(parent, name, norm)
    return literal


def stepper(
    model: nn.Module,
    make_losses: Callable[[nn.Module, Tensor], dict],
    make_batches: Callable[[int], Iterator[Tensor]],
) -> Callable[[], None]:
    """Return a function that takes a step of SGD on the next batch, epoch after epoch."""
    model = model.to(DEVICE).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def all_batches() -> Iterator[Tensor]:
        epoch = 0
        while True:
            epoch += 1
            yield from make_batches(epoch)

    batches = all_batches()

    def step() -> None:
        losses = make_losses(model, next(batches).to(DEVICE, non_blocking=True))
        optimizer.zero_grad()
        total_loss(losses).backward()
        optimizer.step()

    return step


def our_step(model: nn.Module, images: np.ndarray, m: int, precision: str) -> Callable[[], None]:
    """Return a step as train.py takes it, m images in two views."""
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    labels = np.zeros(len(images), np.int64)
    split = Split(images, labels, Path(), np.arange(len(images)))
    (source,) = images_on(DEVICE, [images], "auto")

    def make_batches(epoch: int) -> Iterator[Tensor]:
        plan = EpochPlan(split, m, seed=0, epoch=epoch)
        return (views for views, _ in two_view_batches(source, plan, workers=2))

    def make_losses(model: nn.Module, views: Tensor) -> dict[str, Tensor]:
        with network_autocast(DEVICE, precision):
            return cbswr_losses(model, model.normalization(views))

    return stepper(model, make_losses, make_batches)


def literal_step(model: nn.Module, images: np.ndarray, m: int) -> Callable[[], None]:
    """Return a literal step, m images in two views."""
    views = LiteralViews(images, model.normalization)
    loader = torch.utils.data.DataLoader(views, m, shuffle=True, num_workers=4, drop_last=True)
    return stepper(literal_model(model), literal_losses, lambda _: map(torch.cat, loader))


def main(argv: Sequence[str] | None = None) -> None:
    """Time the steps of each backbone, and write the result."""
    parser = paired.make_parser("train_step", "Seconds of a training step, beside a literal one's.")
    add = parser.add_argument
    add("--backbones", nargs="+", default=["googlenet", "resnet18"], help="which to train")
    add("--batch", type=whole(2), default=64, help="m, images a batch")
    options = parser.parse(argv)
    size = 256
    m = options.batch
    backbones = options.backbones
    if options.tiny:
        size = 32
        m = 4
        backbones = ["resnet_small"]
    images = np.random.default_rng(0).integers(0, 256, (8 * m, size, size, 3), np.uint8)
    result: dict[str, Any] = {"data": f"random pixels, {size} px"}
    for backbone in backbones:
        model = build_model(backbone)
        ways = {f"ours, {p}": our_step(model, images, m, p) for p in ("fp32", "bf16")}
        ways["literal, fp32"] = literal_step(model, images, m)
        result[backbone] = {"rows": 2 * m, "ways": paired.in_turn(ways, options.repeats)}
    paired.write(result, options)


if __name__ == "__main__":
    run_script(main)
