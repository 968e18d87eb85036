"""For torch.hub: `torch.hub.load(REPOSITORY, "cbswr", checkpoint=...)` gives an `Embedder`."""

from __future__ import annotations

import os

from embedder import Embedder

dependencies = ["torch", "torchvision", "numpy", "PIL", "h5py", "tqdm"]


def cbswr(checkpoint: str | os.PathLike, **options) -> Embedder:
    """Load a checkpoint or a run's folder, to embed images; options are those of `Embedder`."""
    return Embedder(checkpoint, **options)


def frozen(backbone: str = "resnet18", **options) -> Embedder:
    """Load a frozen backbone, for its pooled features; options are those of `Embedder`."""
    return Embedder(backbone, **options)
