"""Small helpers for tensors."""

from __future__ import annotations

from torch import Tensor


def as_float(x: Tensor) -> Tensor:
    """Return `x` in float32, or as it is if it is float64."""
    return x if x.dtype.itemsize == 8 and x.is_floating_point() else x.float()
