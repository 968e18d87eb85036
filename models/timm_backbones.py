"""Backbones of the timm package, `timm:NAME`: convolutional networks and vision transformers."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbones import BackboneSpec, InputNormalization
from utils.errors import UserError

PREFIX = "timm:"
_NAME = re.compile(r"\w+(\.\w+)?")  # nothing that timm would take for an address or a folder


def is_timm_name(backbone: object) -> bool:
    """Whether it has the form timm:NAME or timm:NAME.TAG; timm need not know it."""
    named = isinstance(backbone, str) and backbone.startswith(PREFIX)
    return named and _NAME.fullmatch(backbone.removeprefix(PREFIX)) is not None


def timm_spec(backbone: str) -> BackboneSpec:
    """The spec of timm:NAME, random weights; nothing is downloaded.

    Raises UserError where timm is not installed, does not know the name, or the network has no feature map as wide as
    its pooled feature.
    """
    network = TimmBackbone(backbone)
    return BackboneSpec(lambda: network, network.channels, network.normalization)


class TimmBackbone(nn.Module):
    """A network of timm without its classifier: crops of any size -> feature map (B, C, h, w).

    Crops are resized (bicubic, antialiased) to the network's own input size. The map is that of the last layer, of a
    transformer its patch tokens in their places, shifted by one vector an image: its mean is what the network's own
    pooling gives (average, class token, attention, with the norms that belong to it).
    """

    def __init__(self, backbone: str) -> None:
        super().__init__()
        self.network = _create(backbone)
        self.name, self.channels = backbone, self.network.num_features
        if getattr(self.network, "head_hidden_size", self.channels) != self.channels:
            raise UserError(
                f"--backbone {backbone}: its pooled feature has {self.network.head_hidden_size} dimensions and its "
                f"feature map {self.channels}; choose a network where they are the same"
            )
        config = _timm().data.resolve_model_data_config(self.network)
        self.input_size: tuple[int, int] = tuple(config["input_size"][1:])
        mean, std = ([255 * value for value in config[name]] for name in ("mean", "std"))
        if config["input_size"][0] != 3:
            raise UserError(f"--backbone {backbone}: takes images of {config['input_size'][0]} channels, not of 3")
        self.normalization = InputNormalization("RGB", tuple(mean), tuple(std))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised crops (B, 3, H, W) -> feature map (B, C, h, w), float32 (float64 for float64 input)."""
        features = self.network.forward_features(resized(x, self.input_size))
        pooled = self.network.forward_head(features, pre_logits=True)  # (B, C)
        feature_map = self._as_map(features)
        if pooled.shape != feature_map.shape[:2]:
            shapes = f"its pooled feature {tuple(pooled.shape)} does not fit its map {tuple(feature_map.shape)}"
            raise UserError(f"--backbone {self.name}: {shapes}; choose another network")
        wide = torch.promote_types(feature_map.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            feature_map, pooled = feature_map.to(wide), pooled.to(wide)
            return feature_map + (pooled - feature_map.mean((2, 3)))[:, :, None, None]

    def _as_map(self, features: Tensor) -> Tensor:
        """What timm's forward_features gives, as (B, C, h, w)."""
        if features.dim() == 4:
            channels_last = str(getattr(self.network, "output_fmt", "NCHW")).endswith("NHWC")
            return features.permute(0, 3, 1, 2) if channels_last else features
        patches = getattr(self.network, "patch_embed", None)
        if features.dim() != 3 or not hasattr(patches, "grid_size"):
            raise UserError(f"--backbone {self.name}: has no feature map of rows and columns; choose another network")
        tokens = features[:, self.network.num_prefix_tokens :]  # without class and register tokens
        return tokens.transpose(1, 2).unflatten(2, tuple(patches.grid_size))


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (B, C, H, W) -> (B, C, *size), bicubic as Pillow does it, as two products of matrices.

    (Which, other than the operation of torch, are deterministic on a GPU and known to ONNX.)
    """
    if tuple(x.shape[-2:]) == size:
        return x
    wide = x if x.dtype == torch.float64 else x.float()
    with torch.autocast(x.device.type, enabled=False):
        rows, columns = (_weights(int(old), new).to(wide) for old, new in zip(x.shape[-2:], size, strict=True))
        return rows @ wide @ columns.t()


@lru_cache(maxsize=16)
def _weights(old: int, new: int) -> Tensor:
    """(new, old): how much each old pixel of a line counts in each new one."""
    with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        lines = torch.eye(old, dtype=torch.float64)[None, None]  # (1, 1, old, old)
        return F.interpolate(lines, (new, old), mode="bicubic", antialias=True)[0, 0]


def load_timm_weights(backbone: TimmBackbone, weights: str | os.PathLike) -> None:
    """Fill `backbone` in place; weights: "auto" (timm's pretrained ones, downloaded) or a file with timm's names.

    Raises UserError where they cannot be had or are those of another network.
    """
    from models.weights import fill, read_weights_file

    if weights == "auto":
        try:
            source = _timm().create_model(backbone.name.removeprefix(PREFIX), pretrained=True, num_classes=0)
        except Exception as error:  # of timm, of the hub, of the network below it: nothing in common
            raise UserError(
                f"cannot get timm's pretrained weights of {backbone.name} ({' '.join(str(error).split())[:300]}); give "
                f"--weights FILE (a state_dict of that network, .safetensors or .pth), or --weights none"
            ) from None
        backbone.network.load_state_dict(source.state_dict())
        return
    fill(backbone.network, read_weights_file(weights), backbone.name, str(weights))


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError:
        raise UserError("--backbone timm:NAME: needs the package timm; pip install timm") from None
    return timm


def _create(backbone: str) -> nn.Module:
    if not is_timm_name(backbone):
        raise UserError(
            f"--backbone {backbone}: expected timm:NAME, a name of timm.list_models(), as timm:resnet50.a1_in1k"
        )
    timm, name = _timm(), backbone.removeprefix(PREFIX)
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name.partition('.')[0][:12]}*")[:5])
        raise UserError(f"--backbone {backbone}: timm {timm.__version__} knows no such network"
                        + (f"; it knows {close}" if close else "; see timm.list_models()"))  # fmt: skip
    try:
        return timm.create_model(name, pretrained=False, num_classes=0)
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"--backbone {backbone}: timm cannot make it: {' '.join(str(error).split())[:300]}") from None
