"""What a backbone says of itself: how it is made, the input that it expects, its stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class InputNormalization:
    """How pixels (RGB, 0-255) become network input: reordered, minus `mean`, divided by `std`.

    Attributes:
        order: "RGB" or "BGR", the channel order of the network.
        mean, std: a number for each channel in that order, in 0-255 units.
    """

    order: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, images: Tensor) -> Tensor:
        """Turn uint8 RGB images (B, H, W, 3) into float32 input (B, 3, H, W), channels last in
        memory.
        """
        x = images.permute(0, 3, 1, 2)
        if self.order == "BGR":
            x = x.flip(1)
        x = x.to(torch.float32, memory_format=torch.channels_last)
        return x.sub_(_per_channel(self.mean, x)).div_(_per_channel(self.std, x))

    def mean_subtracted(self, inputs: Tensor) -> Tensor:
        """Turn network input (B, 3, H, W) into pixels minus the mean, in 0-255 units."""
        return inputs * _per_channel(self.std, inputs)

    def pixels(self, inputs: Tensor) -> Tensor:
        """Turn network input (B, 3, H, W) into pixels 0-255, channels in the network's order."""
        return self.mean_subtracted(inputs) + _per_channel(self.mean, inputs)


def _per_channel(values: tuple[float, float, float], like: Tensor) -> Tensor:
    on_host = torch.tensor(values, dtype=like.dtype).view(1, 3, 1, 1)
    return on_host.to(like.device, non_blocking=True)  # made on a GPU, it would wait for that


def _in_255(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(255 * value for value in values)


CAFFE = InputNormalization("BGR", (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0))
IMAGENET = InputNormalization("RGB", _in_255((0.485, 0.456, 0.406)), _in_255((0.229, 0.224, 0.225)))
PLUS_MINUS_ONE = InputNormalization("RGB", (127.5,) * 3, (127.5,) * 3)  # torchvision's GoogLeNet


@dataclass(frozen=True)
class BackboneSpec:
    """A backbone.

    Attributes:
        make: makes the module, images (B, 3, H, W) -> feature map (B, C, h, w), with random
        weights.
        channels: C.
        normalization: of the input.
        torchvision_weights: name of the torchvision class that holds its ImageNet weights, if
        there is one.
        smallest_crop: side in pixels below which the last pooling leaves nothing.
        stages: the stages that can be pooled or trained alone, in order: name -> (path in the
            module, channels).
    """

    make: Callable[[], nn.Module]
    channels: int
    normalization: InputNormalization
    torchvision_weights: str | None = None
    smallest_crop: int = 1
    stages: dict[str, tuple[str, int]] = field(default_factory=dict)
