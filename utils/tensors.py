"""Small helpers for tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def as_float(x: Tensor) -> Tensor:
    """Return `x` in float32, or as it is if it is float64."""
    return x if x.dtype == torch.float64 else x.float()
