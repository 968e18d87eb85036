"""Features of many images: one pass of a network in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from utils.distributed import ALONE, Processes
from utils.errors import DivergedError


def network_autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which a network runs: bfloat16 for "bf16", nothing for "fp32"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@torch.inference_mode()
def pooled_features(
    model: Any,
    batches: Iterable[Tensor],
    poolings: Sequence[Any],
    precision: str = "fp32",
    processes: Processes = ALONE,
    flip: bool = False,
) -> list[Tensor]:
    """Compute the features (N, C) of images by each of several poolings, on the CPU.

    Rows are float32 of unit length. The model stays in evaluation mode.

    Args:
        batches: as in `extract_features`.
        poolings: of layers that the model pools, as `models.Pooling`.
        flip: average the pooled features of image and mirror image.

    Raises DivergedError if a feature is not finite.
    """
    device = next(model.parameters()).device
    model.eval()
    pooled: list[list[Tensor]] = [[] for _ in poolings]
    for batch in batches:
        with network_autocast(device, precision):
            inputs = model.normalization(batch.to(device, non_blocking=True))
            images = [inputs, inputs.flip(3)] if flip else [inputs]
            views = [model.maps(image) for image in images]
            for rows, pooling in zip(pooled, poolings, strict=True):
                rows.append(F.normalize(sum(map(pooling, views)), dim=1).float().cpu())
    return _finite([processes.gather_batches(rows) for rows in pooled])


@torch.inference_mode()
def extract_features(
    model: Any,
    batches: Iterable[Tensor],
    precision: str = "fp32",
    processes: Processes = ALONE,
    flip: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute pooled features (N, C) and embeddings (N, D), float32 on the CPU.

    The training mode of the model is restored afterwards.

    Args:
        batches: uint8 RGB tensors (b, H, W, 3). Of several processes each brings every count-th
            batch, beginning with its rank; all get all rows, bit for bit those of one process.
        flip: average the pooled features of image and mirror image.

    Raises DivergedError if a feature is not finite.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    pooled = []
    embeddings = []
    try:
        for batch in batches:
            with network_autocast(device, precision):
                inputs = model.normalization(batch.to(device, non_blocking=True))
                batch_pooled, batch_embeddings = model.features(inputs, flip)
            pooled.append(batch_pooled.float().cpu())
            embeddings.append(batch_embeddings.float().cpu())
    finally:
        model.train(was_training)
    return tuple(_finite([processes.gather_batches(x) for x in (pooled, embeddings)]))


def _finite(features: list[Tensor]) -> list[Tensor]:
    """Return features as they are. Raises DivergedError if one is not finite."""
    if not all(part.isfinite().all() for part in features):
        raise DivergedError("the network's features are not finite: its training diverged")
    return features
