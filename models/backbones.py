"""Every backbone: image batch -> feature map, with the input normalisation that its weights were trained with."""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from models.googlenet import CAFFE_BLOCKS, caffe_googlenet
from utils.errors import UserError


@dataclass(frozen=True)
class InputNormalization:
    """How pixels (RGB, 0-255) become network input: reordered, minus `mean`, divided by `std` (both in 0-255 units).

    `mean` and `std` are in the network's own channel order.
    """

    order: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, images: Tensor) -> Tensor:
        """Turn uint8 RGB images (B, H, W, 3) into float32 input (B, 3, H, W), channels last in memory."""
        x = images.permute(0, 3, 1, 2)
        if self.order == "BGR":
            x = x.flip(1)
        x = x.to(torch.float32, memory_format=torch.channels_last)
        return x.sub_(self._per_channel(self.mean, x)).div_(self._per_channel(self.std, x))

    def mean_subtracted(self, inputs: Tensor) -> Tensor:
        """Undo the division: network input (B, 3, H, W) -> pixels minus the mean, 0-255 units."""
        return inputs if set(self.std) == {1.0} else inputs * self._per_channel(self.std, inputs)

    def pixels(self, inputs: Tensor) -> Tensor:
        """Undo all but the channel order: network input (B, 3, H, W) -> pixels, 0-255."""
        return self.mean_subtracted(inputs) + self._per_channel(self.mean, inputs)

    @staticmethod
    def _per_channel(values: tuple[float, float, float], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, 3, 1, 1)


CAFFE = InputNormalization("BGR", (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0))
IMAGENET = InputNormalization("RGB", (0.485 * 255, 0.456 * 255, 0.406 * 255), (0.229 * 255, 0.224 * 255, 0.225 * 255))
# torchvision trained its GoogLeNet on images in [-1, 1]
PLUS_MINUS_ONE = InputNormalization("RGB", (127.5, 127.5, 127.5), (127.5, 127.5, 127.5))


def _torchvision_resnet(name: str) -> nn.Module:
    import torchvision

    network = getattr(torchvision.models, name)(weights=None)
    kept = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
    return nn.Sequential(OrderedDict((part, getattr(network, part)) for part in kept))


def _torchvision_googlenet() -> nn.Module:
    import torchvision

    network = torchvision.models.googlenet(weights=None, aux_logits=False, transform_input=False, init_weights=False)
    dropped = ("avgpool", "dropout", "fc", "aux1", "aux2")
    return nn.Sequential(OrderedDict((part, m) for part, m in network.named_children() if part not in dropped))


def _small_resnet() -> nn.Module:
    """A ResNet-10 with a 3x3 stem and a total stride of 8, for images of 32 to 96 pixels."""
    from torchvision.models.resnet import BasicBlock

    def stage(inputs: int, outputs: int, stride: int) -> nn.Module:
        shortcut = None
        if stride != 1 or inputs != outputs:
            shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        return nn.Sequential(BasicBlock(inputs, outputs, stride, shortcut))

    widths = (32, 32, 64, 128)
    stem = [
        ("conv1", nn.Conv2d(3, widths[0], 3, 2, padding=1, bias=False)),
        ("bn1", nn.BatchNorm2d(widths[0])),
        ("relu", nn.ReLU(inplace=True)),
    ]
    stages = [(f"layer{i}", stage(widths[i - 1], widths[i], 1 if i == 1 else 2)) for i in (1, 2, 3)]
    backbone = nn.Sequential(OrderedDict(stem + stages))
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return backbone


@dataclass(frozen=True)
class BackboneSpec:
    """A backbone: how to make it, the width of its map, the input it expects, where its usual weights are."""

    make: Callable[[], nn.Module]
    channels: int
    normalization: InputNormalization
    torchvision_weights: str | None = None
    smallest_crop: int = 1  # side in pixels; of less, the last pooling leaves nothing
    stages: dict[str, tuple[str, int]] = field(default_factory=dict)  # what --layers names: child, channels of its map


def _resnet_stages(*widths: int) -> dict[str, tuple[str, int]]:
    return {f"layer{i}": (f"layer{i}", width) for i, width in enumerate(widths, 1)}


_CAFFE_STAGES = {name: (str(CAFFE_BLOCKS[name]), width)
                 for name, width in (("inception_3b", 480), ("inception_4e", 832), ("inception_5b", 1024))}  # fmt: skip
_BN_STAGES = {name.replace("_", ""): (name.replace("_", ""), width) for name, (_, width) in _CAFFE_STAGES.items()}
_BASIC, _BOTTLENECK = _resnet_stages(64, 128, 256, 512), _resnet_stages(256, 512, 1024, 2048)


BACKBONES = {
    "googlenet": BackboneSpec(caffe_googlenet, 1024, CAFFE, smallest_crop=31, stages=_CAFFE_STAGES),
    "googlenet_caffe": BackboneSpec(lambda: caffe_googlenet(lrn="caffe"), 1024, CAFFE, smallest_crop=31,
                                    stages=_CAFFE_STAGES),
    "googlenet_bn": BackboneSpec(_torchvision_googlenet, 1024, PLUS_MINUS_ONE, "GoogLeNet_Weights", 15, _BN_STAGES),
    **{name: BackboneSpec(partial(_torchvision_resnet, name), 512, IMAGENET, f"ResNet{name[6:]}_Weights", stages=_BASIC)
       for name in ("resnet18", "resnet34")},
    **{name: BackboneSpec(partial(_torchvision_resnet, name), 2048, IMAGENET, f"ResNet{name[6:]}_Weights",
                          stages=_BOTTLENECK)
       for name in ("resnet50", "resnet101")},
    "resnet_small": BackboneSpec(_small_resnet, 128, IMAGENET, stages=_resnet_stages(32, 64, 128)),
}  # fmt: skip


def backbone_spec(name: str) -> BackboneSpec:
    """The backbone of a name of BACKBONES, or of a network of timm, `timm:NAME`. Raises UserError for others."""
    if name in BACKBONES:
        return BACKBONES[name]
    if name.startswith("timm:"):
        from models.timm_backbones import timm_spec  # only its users wait for it

        return timm_spec(name)
    close = difflib.get_close_matches(name, BACKBONES, 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise UserError(f"unknown backbone {name!r}{hint} (choose from {', '.join(BACKBONES)}, timm:NAME)")


def check_crop_size(backbone: str, crop: int) -> None:
    """Raise UserError for crops of `crop` pixels a side, too small for `backbone` to make a feature map of."""
    smallest = BACKBONES[backbone].smallest_crop if backbone in BACKBONES else 1  # timm's are resized to
    if crop < smallest:
        raise UserError(
            f"--backbone {backbone}: takes crops of at least {smallest} px, and these images are cropped to {crop}; "
            f"pre-process them larger, or use --backbone resnet_small"
        )
