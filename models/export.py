"""The embedder as an ONNX file, for programs without PyTorch."""

from __future__ import annotations

import copy
import os
import warnings
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.cbswr import CBSwR
from utils.errors import UserError
from utils.files import written_whole

OPSET = 17


class _UnitFeatures(nn.Module):
    """Crops uint8 RGB (B, crop, crop, 3) -> embeddings or pooled features (B, D) of unit length."""

    def __init__(self, model: CBSwR, features: str, flip: bool) -> None:
        super().__init__()
        self.model = model
        self.features = features
        self.flip = flip

    def forward(self, images: Tensor) -> Tensor:
        pooled, embedding = self.model.features(self.model.normalization(images), self.flip)
        if self.features == "embedding":
            return embedding
        return F.normalize(pooled, dim=1)


def export_onnx(
    model: CBSwR,
    path: str | os.PathLike,
    crop: int,
    features: str = "embedding",
    flip: bool = False,
) -> None:
    """Write the embedder of a network.

    The file takes `images`, uint8 RGB (B, crop, crop, 3), center crops of squashed images, in
    batches of any size, and gives `features`, float32 (B, D) of unit length.

    Args:
        crop: side of the crops in pixels.
        features: "embedding" or "pooled".
        flip: average the features of an image and its mirror image.

    Raises UserError if the package onnx is not installed, and for googlenet_fallback_lrn.
    """
    if find_spec("onnx") is None:  # torch would fail with an error of its own
        raise UserError("an ONNX file needs the package onnx; pip install onnx")
    if any(isinstance(module, nn.CrossMapLRN2d) for module in model.modules()):
        raise UserError(f"{model.backbone_name} cannot be written: ONNX knows no such LRN")
    model = copy.deepcopy(model).cpu().float()
    with written_whole(path) as beside, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on sizes that become constants
        torch.onnx.export(
            _UnitFeatures(model, features, flip).eval(),
            (torch.zeros(2, crop, crop, 3, dtype=torch.uint8),),
            str(beside),
            input_names=["images"],
            output_names=["features"],
            dynamic_axes={"images": {0: "batch"}, "features": {0: "batch"}},
            opset_version=OPSET,
            dynamo=False,
        )
