"""Local response normalization across channels: as Caffe defines it, and as torch's fallback
computes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor, nn

LRN_KINDS = ("caffe", "fallback")
CHUNK = 1 << 18  # values of a chunk on the CPU, so that the passes over it stay in the cache


@lru_cache(maxsize=16)
def _bands(
    channels: int, kind: str, size: int, alpha: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return matrices (C, C) that sum over the window and scale by alpha / size: for squares, for
    gradients.

    `band[j, c]` says whether channel j is in the window of channel c; rows (P, C) are multiplied
    with it.
    """
    half = size // 2
    offset = torch.arange(channels)[:, None] - torch.arange(channels)  # j - c
    forward = offset.abs() <= half
    backward = forward
    if kind == "fallback":
        forward = forward.clone()
        forward[0, half + 1 :] = True
        backward = (offset >= -half - 1) & (offset <= half - 1)
    return tuple(
        (band.to(torch.float64) * (alpha / size)).to(device, dtype) for band in (forward, backward)
    )


def _rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield matching chunks (P, C) of channels-last tensors (B, C, H, W), as views."""
    flat = [t.permute(0, 2, 3, 1).view(-1, t.shape[1]) for t in tensors]
    step = max(1, CHUNK // flat[0].shape[1]) if tensors[0].device.type == "cpu" else len(flat[0])
    for start in range(0, len(flat[0]), step):
        yield tuple(rows[start : start + step] for rows in flat)


def _factors(x: Tensor, band: Tensor, beta: float, k: float) -> tuple[Tensor, Tensor]:
    """Return s = k + the scaled window sum of squares, and s^-beta, both (P, C)."""
    s = (x * x) @ band + k
    if beta != 0.75:
        return s, s.pow(-beta)
    root = s.rsqrt()  # s^-3/4 by roots: several times faster than a power
    return s, root * root.sqrt()


class _LocalResponseNorm(torch.autograd.Function):
    """y = x * s^-beta; only x is kept for the gradient."""

    @staticmethod
    def forward(
        ctx, x: Tensor, kind: str, size: int, alpha: float, beta: float, k: float
    ) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x)
        ctx.constants = (kind, size, alpha, beta, k)
        band, _ = _bands(x.shape[1], kind, size, alpha, x.dtype, x.device)
        y = torch.empty_like(x)
        for x_rows, y_rows in _rows(x, y):
            torch.mul(x_rows, _factors(x_rows, band, beta, k)[1], out=y_rows)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        # dy_j/dx_i = [i = j] s_j^-beta - 2 beta alpha / size * x_i x_j s_j^(-beta - 1) for the j
        # whose window holds i
        (x,) = ctx.saved_tensors
        kind, size, alpha, beta, k = ctx.constants
        band, grad_band = _bands(x.shape[1], kind, size, alpha, x.dtype, x.device)
        grad = grad.contiguous(memory_format=torch.channels_last)
        out = torch.empty_like(x)
        for x_rows, grad_rows, out_rows in _rows(x, grad, out):
            s, factor = _factors(x_rows, band, beta, k)
            direct = grad_rows * factor
            shared = (direct * x_rows).div_(s) @ grad_band
            torch.sub(direct, shared.mul_(x_rows), alpha=2 * beta, out=out_rows)
        return out, None, None, None, None, None


class LocalResponseNorm(nn.Module):
    """Normalize across channels: y = x / (k + alpha / size * sum over the window of x^2)^beta, (B,
    C, H, W).

    kind "caffe": Caffe's layer, which divides alpha by the window size. It equals
    `torch.nn.LocalResponseNorm`, and `torch.nn.CrossMapLRN2d` on a GPU with torch 1.1, with which
    the paper's networks were trained. kind "fallback": what `torch.nn.CrossMapLRN2d` computes on a
    CPU and in every later torch. Its running sum never drops channel 0, so that x_0^2 stays in
    every later window, and its gradient sums over the window one channel too low.
    """

    def __init__(
        self,
        kind: str = "caffe",
        size: int = 5,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 1.0,
    ) -> None:
        super().__init__()
        if kind not in LRN_KINDS or size % 2 == 0:
            raise ValueError(
                f"expected a kind of {LRN_KINDS} and an odd size, not {kind!r}, {size}"
            )
        self.kind = kind
        self.size = size
        self.alpha = alpha
        self.beta = beta
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (B, C, H, W)."""
        return _LocalResponseNorm.apply(x, self.kind, self.size, self.alpha, self.beta, self.k)

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"
