"""Backbones of the timm package, `timm:NAME`: convolutional networks and vision transformers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache, partial
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.spec import BackboneSpec, InputNormalization
from utils.errors import UserError
from utils.tensors import as_float

TIMM_PREFIX = "timm:"
_NAME = re.compile(r"timm:\w+(\.\w+)?")  # nothing that timm would take for an address or a folder


@lru_cache(maxsize=8)
def timm_spec(backbone: str) -> BackboneSpec:
    """Return the spec of `timm:NAME` or `timm:NAME.TAG`, with random weights; nothing is
    downloaded.

    Raises UserError if timm is not installed, does not know the name, or the network has no
    feature map as wide as its pooled feature.
    """
    with torch.random.fork_rng(devices=[]):  # a look at a network draws nothing
        network = TimmBackbone(backbone)
    make = partial(TimmBackbone, backbone)
    return BackboneSpec(make, network.channels, network.normalization, stages=network.stages)


class TimmBackbone(nn.Module):
    """A network of timm without its classifier: crops of any size -> feature map (B, C, h, w).

    Crops are resized (bicubic, antialiased) to the network's own input size. The feature map is
    that of the last layer; of a transformer it holds the patch tokens at their places. It is
    shifted by one vector an image, so that its mean is what the network's own pooling gives
    (average, class token or attention, with its norm).
    """

    def __init__(self, backbone: str) -> None:
        super().__init__()
        self.network = _create(backbone)
        self.name = backbone
        self.channels = self.network.num_features
        if getattr(self.network, "head_hidden_size", self.channels) != self.channels:
            raise UserError(
                f"the backbone {backbone} pools to {self.network.head_hidden_size} dimensions and "
                f"its feature map has {self.channels}; choose a network where they are equal"
            )
        config = import_timm().data.resolve_model_data_config(self.network)
        if config["input_size"][0] != 3:
            raise UserError(
                f"the backbone {backbone} takes images of {config['input_size'][0]} channels"
            )
        self.input_size: tuple[int, int] = tuple(config["input_size"][1:])
        mean, std = (tuple(255 * value for value in config[name]) for name in ("mean", "std"))
        self.normalization = InputNormalization("RGB", mean, std)
        self.stages = _stages(self.network)

    def forward(self, x: Tensor) -> Tensor:
        """Turn normalized crops (B, 3, H, W) into a feature map (B, C, h, w), at least float32."""
        return self._shifted(self.network.forward_features(resized(x, self.input_size)))

    def maps(self, x: Tensor, names: Sequence[str]) -> list[Tensor]:
        """Return the feature maps (B, C_l, h_l, w_l) of stages, the last of which is "last"."""
        places = [list(self.stages).index(name) for name in names[:-1]]
        features, maps = self.network.forward_intermediates(
            resized(x, self.input_size), indices=places
        )
        return [*maps, self._shifted(features)]

    def _shifted(self, features: Tensor) -> Tensor:
        """Return what forward_features gives as the map whose mean is the network's own pooling."""
        pooled = self.network.forward_head(features, pre_logits=True)  # (B, C)
        feature_map = self._as_map(features)
        if pooled.shape != feature_map.shape[:2]:
            raise UserError(
                f"the backbone {self.name} pools {tuple(feature_map.shape)} to "
                f"{tuple(pooled.shape)}; choose another network"
            )
        with torch.autocast(pooled.device.type, enabled=False):
            wide = as_float(feature_map)
            shift = as_float(pooled) - wide.mean((2, 3))
            return wide + shift[:, :, None, None]

    def _as_map(self, features: Tensor) -> Tensor:
        """Bring the result of timm's forward_features to (B, C, h, w)."""
        if features.dim() == 4:
            channels_last = str(getattr(self.network, "output_fmt", "NCHW")).endswith("NHWC")
            return features.permute(0, 3, 1, 2) if channels_last else features
        patches = getattr(self.network, "patch_embed", None)
        if features.dim() != 3 or not hasattr(patches, "grid_size"):
            raise UserError(f"the backbone {self.name} has no feature map of rows and columns")
        tokens = features[:, self.network.num_prefix_tokens :]  # without class and register tokens
        return tokens.transpose(1, 2).unflatten(2, tuple(patches.grid_size))


def _stages(network: nn.Module) -> dict[str, tuple[str, int]]:
    """Return the stages that can be pooled: name -> (path of the module that ends it, channels).

    "last" is the whole network, with what follows its last stage.
    """
    info = list(getattr(network, "feature_info", None) or [])
    if not info or not hasattr(network, "forward_intermediates"):
        return {}
    stages = {
        f"stage{number}": (f"network.{stage['module']}", stage["num_chs"])
        for number, stage in enumerate(info[:-1], 1)
    }
    return stages | {"last": ("network", network.num_features)}


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images (B, C, H, W) to (B, C, *size), bicubic as Pillow does, by two matrix products.

    Unlike torch's operation they are deterministic on a GPU and part of ONNX.
    """
    if tuple(x.shape[-2:]) == size:
        return x
    wide = as_float(x)
    with torch.autocast(x.device.type, enabled=False):
        rows = _resize_matrix(int(x.shape[-2]), size[0]).to(wide)
        columns = _resize_matrix(int(x.shape[-1]), size[1]).to(wide)
        return rows @ wide @ columns.t()


@lru_cache(maxsize=16)
def _resize_matrix(old: int, new: int) -> Tensor:
    """Return the matrix (new, old) that resizes a line of pixels."""
    with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        lines = torch.eye(old, dtype=torch.float64)[None, None]  # (1, 1, old, old)
        return F.interpolate(lines, (new, old), mode="bicubic", antialias=True)[0, 0]


def import_timm() -> ModuleType:
    """Import timm. Raises UserError if it is not installed."""
    try:
        import timm
    except ImportError:
        raise UserError("backbones of timm need that package; pip install timm") from None
    return timm


def _create(backbone: str) -> nn.Module:
    timm = import_timm()
    name = backbone.removeprefix(TIMM_PREFIX)
    if not _NAME.fullmatch(backbone) or not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name.partition('.')[0][:12]}*")[:5])
        hint = f"; it knows {close}" if close else "; see timm.list_models()"
        raise UserError(f"timm {timm.__version__} knows no network {name!r}{hint}")
    try:
        return timm.create_model(name, pretrained=False, num_classes=0)
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"timm cannot make {name}: {' '.join(str(error).split())[:300]}") from None
