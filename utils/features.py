"""Features of many images: one pass of a network in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from utils.distributed import ALONE, Processes
from utils.errors import DivergedError


def network_autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which a network runs: bfloat16 for "bf16", nothing for "fp32"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@torch.inference_mode()
def pooled_features(
    model: Any,
    batches: Iterable[Tensor],
    precision: str = "fp32",
    processes: Processes = ALONE,
    flip: bool = False,
    poolings: Sequence[Any] | None = None,
) -> list[Tensor]:
    """Compute the pooled features (N, C) of images by each of some poolings, float32 on the CPU.

    The network computes in evaluation mode; its mode is restored afterwards.

    Args:
        batches: uint8 RGB tensors (b, H, W, 3). Of n processes each brings every n-th batch,
            beginning with its rank; all get all rows, bit for bit those of one process.
        flip: average the pooled features of images and mirror images.
        poolings: of the layers that the model pools, as `models.Pooling`; None: the model's.

    Raises DivergedError if a feature is not finite.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    parts = []
    try:
        for batch in batches:
            with network_autocast(device, precision):
                inputs = model.normalization(batch.to(device, non_blocking=True))
                views = model.view_maps(inputs, flip)
                pooled = [pooling.over_views(views) for pooling in poolings or [model.pooling]]
                parts.append([rows.float().cpu() for rows in pooled])
    finally:
        model.train(was_training)
    parts = processes.gather_batches(parts)
    return [_finite(torch.cat(rows)) for rows in zip(*parts, strict=True)]


@torch.no_grad()
def embeddings_of(model: Any, pooled: Tensor) -> Tensor:
    """Return the embeddings (N, D) of pooled features (N, C), on the CPU.

    Raises DivergedError if one is not finite.
    """
    return _finite(model.embed(pooled.to(next(model.parameters()).device)).cpu())


def _finite(features: Tensor) -> Tensor:
    if not features.isfinite().all():
        raise DivergedError("the network's features are not finite: its training diverged")
    return features
