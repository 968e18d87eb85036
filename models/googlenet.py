"""Inception-v1 as Caffe has it, the paper's backbone: LRN, no batch norm, pools in ceil mode."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.lrn import make_lrn

# Caffe's name of each block -> its place in the sequence (places 4 and 10 are pools)
CAFFE_BLOCKS = {
    "conv1": 0,
    "conv2": 1,
    "inception_3a": 2,
    "inception_3b": 3,
    "inception_4a": 5,
    "inception_4b": 6,
    "inception_4c": 7,
    "inception_4d": 8,
    "inception_4e": 9,
    "inception_5a": 11,
    "inception_5b": 12,
}

# place -> (in, 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection)
_INCEPTION_WIDTHS = {
    2: (192, 64, 96, 128, 16, 32, 32),
    3: (256, 128, 128, 192, 32, 96, 64),
    5: (480, 192, 96, 208, 16, 48, 64),
    6: (512, 160, 112, 224, 24, 64, 64),
    7: (512, 128, 128, 256, 24, 64, 64),
    8: (512, 112, 144, 288, 32, 64, 64),
    9: (528, 256, 160, 320, 32, 128, 128),
    11: (832, 256, 160, 320, 32, 128, 128),
    12: (832, 384, 192, 384, 48, 128, 128),
}


class _NamedConvs(nn.Module):
    """Convolutions under Caffe's names, which are no Python identifiers ("7x7_s2")."""

    def add_conv(self, name: str, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        self.add_module(name, nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2))

    def conv(self, name: str, x: Tensor) -> Tensor:
        return F.relu(self._modules[name](x), inplace=True)


def _pool3_stride2(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 2, ceil_mode=True)


class _Conv1(_NamedConvs):
    def __init__(self, lrn: str) -> None:
        super().__init__()
        self.add_conv("7x7_s2", 3, 64, 7, stride=2)
        self.norm = make_lrn(lrn, 64)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, 64, H/4, W/4)
        return self.norm(_pool3_stride2(self.conv("7x7_s2", x)))


class _Conv2(_NamedConvs):
    def __init__(self, lrn: str) -> None:
        super().__init__()
        self.add_conv("3x3_reduce", 64, 64, 1)
        self.add_conv("3x3", 64, 192, 3)
        self.norm = make_lrn(lrn, 192)

    def forward(self, x: Tensor) -> Tensor:  # (B, 64, h, w) -> (B, 192, h/2, w/2)
        return _pool3_stride2(self.norm(self.conv("3x3", self.conv("3x3_reduce", x))))


class _Inception(_NamedConvs):
    def __init__(self, inputs: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        width_1x1, reduce_3x3, width_3x3, reduce_5x5, width_5x5, pool_proj = widths
        self.add_conv("1x1", inputs, width_1x1, 1)
        self.add_conv("3x3_reduce", inputs, reduce_3x3, 1)
        self.add_conv("3x3", reduce_3x3, width_3x3, 3)
        self.add_conv("5x5_reduce", inputs, reduce_5x5, 1)
        self.add_conv("5x5", reduce_5x5, width_5x5, 5)
        self.add_conv("pool_proj", inputs, pool_proj, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, inputs, h, w) -> (B, sum of the branches, h, w)
        branches = (
            self.conv("1x1", x),
            self.conv("3x3", self.conv("3x3_reduce", x)),
            self.conv("5x5", self.conv("5x5_reduce", x)),
            self.conv("pool_proj", F.max_pool2d(x, 3, 1, padding=1, ceil_mode=True)),
        )
        return torch.cat(branches, 1)


def caffe_googlenet(lrn: str = "caffe") -> nn.Sequential:
    """Make the backbone of the paper, He-initialized.

    It takes (B, 3, 224, 224) BGR, 0-255 minus the mean, and gives a feature map (B, 1024, 7, 7).
    Source: Szegedy et al. 2015, with the widths and the layer order of Caffe's bvlc_googlenet.

    Args:
        lrn: "caffe" or "fallback", see `models.lrn.make_lrn`.
    """
    blocks: list[nn.Module] = [_Conv1(lrn), _Conv2(lrn)]
    for place in range(2, 13):
        if place in _INCEPTION_WIDTHS:
            inputs, *widths = _INCEPTION_WIDTHS[place]
            blocks.append(_Inception(inputs, tuple(widths)))
        else:
            blocks.append(nn.MaxPool2d(3, 2, ceil_mode=True))
    backbone = nn.Sequential(*blocks)
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return backbone


def from_caffe_name(name: str) -> str | None:
    """Translate `inception_3a.1x1.weight` to the backbone's `2.1x1.weight`; None for a layer it
    does not have.
    """
    block, _, rest = name.partition(".")
    return f"{CAFFE_BLOCKS[block]}.{rest}" if block in CAFFE_BLOCKS and rest else None
