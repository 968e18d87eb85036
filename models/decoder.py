"""The decoder: a centroid feature map -> the image that it stands for."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.batch_norm import track_statistics
from utils.tensors import as_float

WIDTHS = (128, 64, 32, 16, 16)


class WeightedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose row i may stand for `counts[i]` equal rows.

    In training the statistics are those of the batch in which every row is repeated `counts[i]`
    times, so that decoding each distinct row once gives the numbers of decoding all rows. Names
    and buffers are those of BatchNorm2d.
    """

    def forward(self, x: Tensor, counts: Tensor | None = None) -> Tensor:
        """Normalize x (U, C, H, W); `counts` (U,) positive, None for all ones."""
        if counts is None or not self.training:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return self._normalize(as_float(x), counts).to(x.dtype)

    def _normalize(self, x: Tensor, counts: Tensor) -> Tensor:
        counts = counts.to(x.dtype)
        total = counts.sum() * x.shape[2] * x.shape[3]
        weight = counts / total  # (U,), sums to 1 / (H W)
        mean = torch.einsum("u,uc->c", weight, x.sum((2, 3)))
        centered = x - mean[:, None, None]
        var = torch.einsum("u,uc->c", weight, centered.square().sum((2, 3)))
        track_statistics(self, mean, var, total)
        scale = torch.rsqrt(var + self.eps) * self.weight
        return centered * scale[:, None, None] + self.bias[:, None, None]


class Decoder(nn.Module):
    """Feature maps (U, C, h, w) -> images (U, 3, H, W) in (0, 1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in zip((channels, *WIDTHS[:-1]), WIDTHS, strict=True):
            # ReLU and upsampling hold no weights; they keep their places in the published numbers
            layers += [
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                WeightedBatchNorm2d(outputs),
                nn.ReLU(inplace=True),
                nn.Identity(),
            ]
        layers.append(nn.Conv2d(WIDTHS[-1], 3, 3, padding=1, bias=False))
        self.decoder = nn.Sequential(*layers)

    def forward(
        self,
        feature_maps: Tensor,
        size: tuple[int, int] | None = None,
        counts: Tensor | None = None,
    ) -> Tensor:
        """Decode feature maps.

        Args:
            size: (H, W) of the images; None: 32 times that of the feature maps.
            counts: (U,) how many equal rows each row stands for (see `WeightedBatchNorm2d`).
        """
        height, width = size or (32 * feature_maps.shape[2], 32 * feature_maps.shape[3])
        x = feature_maps
        for block in range(len(WIDTHS)):
            conv, norm, relu, _ = self.decoder[4 * block : 4 * block + 4]
            x = relu(norm(conv(x), counts))
            divisor = 2 ** (len(WIDTHS) - 1 - block)
            block_size = (math.ceil(height / divisor), math.ceil(width / divisor))
            x = F.interpolate(x, block_size, mode="nearest")
        return torch.sigmoid(self.decoder[-1](x))
