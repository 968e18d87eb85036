"""The registry of backbones."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock

from models.googlenet import CAFFE_BLOCKS, caffe_googlenet
from models.spec import CAFFE, IMAGENET, PLUS_MINUS_ONE, BackboneSpec
from models.timm_backbones import TIMM_PREFIX, timm_spec
from utils.errors import UserError, nearest_hint


def _torchvision_resnet(name: str) -> nn.Module:
    network = getattr(torchvision.models, name)(weights=None)
    kept = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
    return nn.Sequential(OrderedDict((part, getattr(network, part)) for part in kept))


def _torchvision_googlenet() -> nn.Module:
    network = torchvision.models.googlenet(
        weights=None, aux_logits=False, transform_input=False, init_weights=False
    )
    dropped = ("avgpool", "dropout", "fc", "aux1", "aux2")
    parts = network.named_children()
    return nn.Sequential(OrderedDict((name, part) for name, part in parts if name not in dropped))


def _small_resnet() -> nn.Module:
    """Make a ResNet-10 with a 3x3 stem and a total stride of 8, for images of 32 to 96 pixels."""
    backbone = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 32, 3, 2, padding=1, bias=False),
            bn1=nn.BatchNorm2d(32),
            relu=nn.ReLU(inplace=True),
            layer1=nn.Sequential(BasicBlock(32, 32)),
            layer2=nn.Sequential(_downsampling_block(32, 64)),
            layer3=nn.Sequential(_downsampling_block(64, 128)),
        )
    )
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return backbone


def _downsampling_block(inputs: int, outputs: int) -> nn.Module:
    shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))
    return BasicBlock(inputs, outputs, 2, shortcut)


def _resnet_spec(name: str, widths: tuple[int, ...]) -> BackboneSpec:
    return BackboneSpec(
        partial(_torchvision_resnet, name),
        widths[-1],
        IMAGENET,
        torchvision_weights=name.replace("resnet", "ResNet") + "_Weights",
        stages=_resnet_stages(widths),
    )


def _resnet_stages(widths: tuple[int, ...]) -> dict[str, tuple[str, int]]:
    return {f"layer{i}": (f"layer{i}", width) for i, width in enumerate(widths, 1)}


def _caffe_spec(lrn: str) -> BackboneSpec:
    stages = {name: (str(CAFFE_BLOCKS[name]), width) for name, width in _INCEPTION_STAGES.items()}
    make = partial(caffe_googlenet, lrn)
    return BackboneSpec(make, 1024, CAFFE, smallest_crop=31, stages=stages)


_INCEPTION_STAGES = {"inception_3b": 480, "inception_4e": 832, "inception_5b": 1024}
_BASIC_WIDTHS = (64, 128, 256, 512)
_BOTTLENECK_WIDTHS = (256, 512, 1024, 2048)

BACKBONES = {
    "googlenet": _caffe_spec("caffe"),
    "googlenet_fallback_lrn": _caffe_spec("fallback"),
    "googlenet_bn": BackboneSpec(
        _torchvision_googlenet,
        1024,
        PLUS_MINUS_ONE,
        torchvision_weights="GoogLeNet_Weights",
        smallest_crop=15,
        stages={
            name.replace("_", ""): (name.replace("_", ""), width)
            for name, width in _INCEPTION_STAGES.items()
        },
    ),
    "resnet18": _resnet_spec("resnet18", _BASIC_WIDTHS),
    "resnet34": _resnet_spec("resnet34", _BASIC_WIDTHS),
    "resnet50": _resnet_spec("resnet50", _BOTTLENECK_WIDTHS),
    "resnet101": _resnet_spec("resnet101", _BOTTLENECK_WIDTHS),
    "resnet_small": BackboneSpec(
        _small_resnet, 128, IMAGENET, stages=_resnet_stages((32, 64, 128))
    ),
}


def backbone_spec(name: str) -> BackboneSpec:
    """Return the spec of a name of BACKBONES or of `timm:NAME`. Raises UserError for any other
    name.
    """
    if name in BACKBONES:
        return BACKBONES[name]
    if name.startswith(TIMM_PREFIX):
        return timm_spec(name)
    hint = nearest_hint(name, BACKBONES)
    names = ", ".join(BACKBONES)
    raise UserError(f"unknown backbone {name!r}{hint} (choose from {names}, {TIMM_PREFIX}NAME)")


def check_crop_size(backbone: str, crop: int) -> None:
    """Raise UserError if crops of `crop` pixels a side are too small for the backbone."""
    smallest = BACKBONES[backbone].smallest_crop if backbone in BACKBONES else 1
    if crop < smallest:
        raise UserError(
            f"the backbone {backbone} takes crops of at least {smallest} px, and these images are "
            f"cropped to {crop}; pre-process them larger, or use the backbone resnet_small"
        )
