"""Random tensors for tests, equal each time, and how near to each other numbers have to be."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

DOUBLE = {"rtol": 1e-10, "atol": 1e-12}  # two ways to compute a formula in float64


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Draw standard normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(*shape: int, seed: int = 0) -> Tensor:
    """Draw vectors of unit length along the last dimension, in float64."""
    return F.normalize(noise(*shape, seed=seed), dim=-1)


def random_pixels(count: int, size: int, seed: int = 0) -> Tensor:
    """Draw images, uint8 (count, size, size, 3)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)


def assert_same_gradients(values: list[Tensor], inputs: Tensor, **tolerance: float) -> None:
    """Compare the gradients of two scalars."""
    gradients = [torch.autograd.grad(value, inputs, retain_graph=True)[0] for value in values]
    torch.testing.assert_close(*gradients, **(tolerance or DOUBLE))
