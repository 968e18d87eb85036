"""The embedder as an ONNX file, for programs without PyTorch."""

from __future__ import annotations

import copy
import os
import warnings

import torch
from torch import Tensor, nn

from models.cbswr import CBSwR
from models.lrn import LocalResponseNorm, _bands
from utils.errors import UserError
from utils.files import written_whole

OPSET = 17


class _PlainNorm(nn.Module):
    """`LocalResponseNorm` of operations that ONNX has; its own function works in place, which a trace does not see."""

    def __init__(self, norm: LocalResponseNorm, channels: int) -> None:
        super().__init__()
        band, _ = _bands(channels, norm.kind, norm.size, norm.alpha, torch.float32, torch.device("cpu"))
        self.register_buffer("band", band.T[:, :, None, None].contiguous())  # (C, C, 1, 1)
        self.beta, self.k = norm.beta, norm.k

    def forward(self, x: Tensor) -> Tensor:
        return x * (nn.functional.conv2d(x * x, self.band) + self.k).pow(-self.beta)


class _Embedder(nn.Module):
    """Crops uint8 RGB (B, crop, crop, 3) -> embeddings or pooled features (B, D) of unit length."""

    def __init__(self, model: CBSwR, features: str, flip: bool) -> None:
        super().__init__()
        self.model, self.part, self.flip = model, ("pooled", "embedding").index(features), flip

    def forward(self, images: Tensor) -> Tensor:
        return self.model.features(self.model.normalization(images), self.flip)[self.part]


def export_onnx(
    model: CBSwR, path: str | os.PathLike, crop: int, features: str = "embedding", flip: bool = False
) -> None:
    """Write the embedder of a network for crops of a side, in pixels, in batches of any size; the model stays as it is.

    The file takes `images`, uint8 RGB (B, crop, crop, 3), the centre crops of squashed images, and gives `features`,
    float32 (B, D) of unit length: the embedding, or the pooled features; with `flip` the file averages image and mirror
    image. Raises UserError where onnx is not installed.
    """
    try:
        import onnx  # noqa: F401  # torch would fail with an error of its own
    except ImportError:
        raise UserError("--onnx: needs the package onnx; pip install onnx") from None
    model = copy.deepcopy(model).cpu().float().eval()
    images = torch.zeros(2, crop, crop, 3, dtype=torch.uint8)
    _make_plain(model, images)
    with written_whole(path) as beside, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # sizes are constants but for the batch's
        torch.onnx.export(
            _Embedder(model, features, flip).eval(), (images,), str(beside), input_names=["images"],
            output_names=["features"], dynamic_axes={"images": {0: "batch"}, "features": {0: "batch"}},
            opset_version=OPSET, dynamo=False,
        )  # fmt: skip


def _make_plain(model: CBSwR, images: Tensor) -> None:
    """Replace every `LocalResponseNorm`; a run tells how many channels each one sees."""
    channels: dict[nn.Module, int] = {}
    norms = [module for module in model.modules() if isinstance(module, LocalResponseNorm)]
    hooks = [norm.register_forward_pre_hook(lambda m, x: channels.update({m: x[0].shape[1]})) for norm in norms]
    with torch.no_grad():
        model.features(model.normalization(images))
    for hook in hooks:
        hook.remove()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LocalResponseNorm):
                setattr(parent, name, _PlainNorm(child, channels[child]))
