"""Features of many images: one pass of a network in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from utils.distributed import ALONE, Processes
from utils.errors import DivergedError


def network_autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which a network runs: bfloat16 for "bf16", nothing for "fp32"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def pooled_features(
    model: Any,
    batches: Iterable[Tensor],
    poolings: Sequence[Any],
    precision: str = "fp32",
    processes: Processes = ALONE,
    flip: bool = False,
) -> list[Tensor]:
    """Compute the pooled features (N, C) of images by each of several poolings, float32 on the CPU.

    Args:
        batches, flip: as in `extract_features`.
        poolings: of layers that the model pools, as `models.Pooling`.

    Raises DivergedError if a feature is not finite.
    """

    def features_of(inputs: Tensor) -> list[Tensor]:
        views = model.view_maps(inputs, flip)
        return [pooling.over_views(views) for pooling in poolings]

    return _of_all(features_of, model, batches, precision, processes)


def extract_features(
    model: Any,
    batches: Iterable[Tensor],
    precision: str = "fp32",
    processes: Processes = ALONE,
    flip: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute pooled features (N, C) and embeddings (N, D), float32 on the CPU.

    Args:
        batches: uint8 RGB tensors (b, H, W, 3). Of several processes each brings every count-th
            batch, beginning with its rank; all get all rows, bit for bit those of one process.
        flip: average the pooled features of images and mirror images.

    Raises DivergedError if a feature is not finite.
    """
    features_of = partial(model.features, flip=flip)
    pooled, embeddings = _of_all(features_of, model, batches, precision, processes)
    return pooled, embeddings


@torch.inference_mode()
def _of_all(
    features_of: Callable[[Tensor], Sequence[Tensor]],
    model: Any,
    batches: Iterable[Tensor],
    precision: str,
    processes: Processes,
) -> list[Tensor]:
    """Compute some features of normalized images; the training mode is restored afterwards."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    parts = []
    try:
        for batch in batches:
            with network_autocast(device, precision):
                inputs = model.normalization(batch.to(device, non_blocking=True))
                parts.append([rows.float().cpu() for rows in features_of(inputs)])
    finally:
        model.train(was_training)
    parts = processes.gather_batches(parts)
    features = [torch.cat(rows) for rows in zip(*parts, strict=True)]
    if not all(rows.isfinite().all() for rows in features):
        raise DivergedError("the network's features are not finite: its training diverged")
    return features
