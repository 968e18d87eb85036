"""Local response normalization across channels: Caffe's, and the fallback of torch."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class LocalResponseNorm(nn.Module):
    """Divide by the root of the squares around a channel: y = x / (k + a / n sum x^2)^beta.

    The sum runs over the n = `size` channels around each one. It equals
    `torch.nn.LocalResponseNorm`, which is slower, and `torch.nn.CrossMapLRN2d` on a GPU with torch
    1.1, with which the paper's networks were trained.
    """

    def __init__(
        self, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
    ) -> None:
        super().__init__()
        self.size = size
        self.alpha = alpha
        self.beta = beta
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (B, C, H, W)."""
        half = self.size // 2
        padded = F.pad(x * x, (0, 0, 0, 0, half, half))
        sums = sum(padded[:, shift : shift + x.shape[1]] for shift in range(self.size))
        return x * (self.k + self.alpha / self.size * sums).pow(-self.beta)


def make_lrn(kind: str) -> nn.Module:
    """Make the normalization of the paper's backbone.

    kind: "caffe", or "fallback" for what `torch.nn.CrossMapLRN2d` computes on a CPU and in every
    torch after 1.1. There the running sum never drops channel 0, so that x_0^2 stays in every
    later window, and the gradient sums over the window one channel too low.
    """
    if kind == "fallback":
        return nn.CrossMapLRN2d(5, 1e-4, 0.75, 1.0)
    return LocalResponseNorm()
