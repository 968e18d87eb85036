"""Local response normalisation across channels: as Caffe defines it, and as the released code really computed it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LRN_KINDS = ("released", "caffe")


def _window_sum(x: Tensor, below: int, above: int) -> Tensor:
    """Sum over the channels c - below ... c + above, zeros outside: Tensor (B, C, H, W) to the same shape."""
    total = x.clone(memory_format=torch.preserve_format)
    for shift in range(1, below + 1):
        total[:, shift:] += x[:, :-shift]
    for shift in range(1, above + 1):
        total[:, :-shift] += x[:, shift:]
    return total


class _LocalResponseNorm(torch.autograd.Function):
    """y = x * s^-beta with s = k + alpha / size * (window sum of x^2); only x is kept for the gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, size: int, alpha: float, beta: float, k: float, released: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.constants = (size, alpha, beta, k, released)
        return x * _scale(x, size, alpha, k, released).pow_(-beta)

    @staticmethod
    def backward(ctx, grad: Tensor):
        # dy_j/dx_i = [i = j] s_j^-beta - 2 beta alpha / size * x_i x_j s_j^(-beta - 1) for the j whose window holds i
        (x,) = ctx.saved_tensors
        size, alpha, beta, k, released = ctx.constants
        half, off = size // 2, int(released)
        scale = _scale(x, size, alpha, k, released)
        direct = grad * scale.pow(-beta)
        shared = _window_sum(direct * x / scale, half + off, half - off)
        return direct - shared.mul_(x).mul_(2 * beta * alpha / size), None, None, None, None, None


def _scale(x: Tensor, size: int, alpha: float, k: float, released: bool) -> Tensor:
    square = x * x
    total = _window_sum(square, size // 2, size // 2)
    if released:
        first_left = size // 2 + 1
        total[:, first_left:] += square[:, :1]
    return total.mul_(alpha / size).add_(k)


class LocalResponseNorm(nn.Module):
    """Across-channel normalisation y = x / (k + alpha / size * sum over the window of x^2)^beta, (B, C, H, W) alike.

    kind "caffe": Caffe's LRN layer, which also divides alpha by the window size; equal to `torch.nn.LocalResponseNorm`
    (odd sizes) with its exact gradient.
    kind "released": what `torch.nn.CrossMapLRN2d` computes, which the released code used. It differs in two ways: the
    running sum never drops channel 0, so that x_0^2 stays in every window that should have left it behind; and the
    gradient sums over the window one channel too low. The authors' checkpoints were trained through both.
    """

    def __init__(
        self, kind: str = "released", size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
    ) -> None:
        super().__init__()
        if kind not in LRN_KINDS or size % 2 == 0:
            raise ValueError(
                f"LocalResponseNorm takes a kind of {LRN_KINDS} and an odd window, not {kind!r} and {size}"
            )
        self.kind, self.size, self.alpha, self.beta, self.k = kind, size, alpha, beta, k

    def forward(self, x: Tensor) -> Tensor:
        return _LocalResponseNorm.apply(x, self.size, self.alpha, self.beta, self.k, self.kind == "released")

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"
