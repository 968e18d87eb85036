"""Features of many images: one pass of a network in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from utils.distributed import ALONE, Processes
from utils.errors import DivergedError


def network_autocast(device: torch.device | str, precision: str) -> torch.autocast:
    """The autocast context of `--precision`: bf16 for the network, nothing for fp32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")


@torch.inference_mode()
def extract_features(
    model: Any,
    batches: Iterable[Tensor],
    precision: str = "fp32",
    processes: Processes = ALONE,
    flip: bool = False,
) -> tuple[Tensor, Tensor]:
    """Pooled features (N, C) and embeddings (N, D) of all images, of unit length, float32 on the CPU.

    batches: uint8 RGB tensors (b, H, W, 3); of several processes each brings every count-th batch, beginning with
    number `rank`, and all get all rows, bit for bit those of one. The model's training mode is restored afterwards.
    flip: the pooled features are the average of the image's and its mirror image's (see `CBSwR.features`).
    Raises DivergedError when a feature is not finite, as in a network whose training diverged.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    pooled, embeddings = [], []
    try:
        for batch in batches:
            with network_autocast(device, precision):
                parts = model.features(model.normalization(batch.to(device, non_blocking=True)), flip)
            pooled.append(parts[0].float().cpu())
            embeddings.append(parts[1].float().cpu())
    finally:
        model.train(was_training)
    features = processes.gather_batches(pooled), processes.gather_batches(embeddings)
    if not all(part.isfinite().all() for part in features):
        raise DivergedError("the network's features are not finite: its training diverged")
    return features
