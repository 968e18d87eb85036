"""Local response normalization across channels: Caffe's, and the fallback of torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LocalResponseNorm(nn.Module):
    """Normalize by the squares of the channels around: y = x / (k + alpha / n sum x^2)^beta.

    The sum runs over the n = `size` channels around each one. It equals
    `torch.nn.LocalResponseNorm` and `torch.nn.CrossMapLRN2d` on a GPU with torch 1.1, with which
    the paper's networks were trained; as a convolution of one pixel it is faster than either.
    """

    def __init__(
        self,
        channels: int,
        size: int = 5,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 1.0,
    ) -> None:
        super().__init__()
        self.size = size
        self.alpha = alpha
        self.beta = beta
        self.k = k
        numbers = torch.arange(channels)
        is_near = (numbers[:, None] - numbers).abs() <= size // 2
        self.register_buffer("is_near", is_near[:, :, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (B, C, H, W)."""
        sums = F.conv2d(x * x, self.is_near.to(x))
        return x * (self.k + self.alpha / self.size * sums).pow(-self.beta).to(x)


def make_lrn(kind: str, channels: int) -> nn.Module:
    """Make the normalization of the paper's backbone.

    kind: "caffe", or "fallback" for what `torch.nn.CrossMapLRN2d` computes on a CPU and in every
    torch after 1.1. There the running sum never drops channel 0, so that x_0^2 stays in every
    later window, and the gradient sums over the window one channel too low.
    """
    if kind == "fallback":
        return nn.CrossMapLRN2d(5, 1e-4, 0.75, 1.0)
    return LocalResponseNorm(channels)
