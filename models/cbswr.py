"""The CBSwR network: backbone, embedding head, cluster head, decoder; named as in the released checkpoints."""

from __future__ import annotations

import difflib
import os

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbones import BACKBONES
from models.decoder import Decoder
from models.weights import load_backbone_weights
from utils.errors import UserError


def _as_float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class CBSwR(nn.Module):
    """image -> feature map -> pooled -> embedding -> cluster logits; centroid feature map -> reconstruction.

    The backbone and the decoder run in the autocast dtype; pooling, heads and normalisations in float32 (or float64).
    """

    def __init__(self, backbone: str, n_cluster: int, low_dim: int) -> None:
        super().__init__()
        spec = BACKBONES[backbone]
        self.backbone_name = backbone
        self.n_cluster = n_cluster
        self.low_dim = low_dim
        self.channels = spec.channels
        self.normalization = spec.normalization
        self.base_model = spec.make()
        self.decoder = Decoder(spec.channels)
        self.feat_ext = nn.Sequential(nn.Linear(spec.channels, low_dim))
        self.clustering = nn.Sequential(nn.BatchNorm1d(low_dim), nn.Dropout(0.6), nn.Linear(low_dim, n_cluster))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, H, W) -> embedding (B, D), cluster_logits (B, K), feature_map (B, C, h, w).

        Embedding and logits have unit length. The input is what `normalization` makes of pixels.
        """
        feature_map = self.base_model(x)
        embedding = self.embed(self.pool(feature_map))
        return embedding, self.cluster(embedding), feature_map

    def pool(self, feature_map: Tensor) -> Tensor:
        """Average pool: (B, C, h, w) -> pooled (B, C), float32 or float64; not normalised."""
        return _as_float(feature_map).mean((2, 3))

    def embed(self, pooled: Tensor) -> Tensor:
        """Embedding head: pooled (B, C) -> embedding (B, D) of unit length."""
        with torch.autocast(pooled.device.type, enabled=False):
            return F.normalize(self.feat_ext(pooled), dim=1)

    def cluster(self, embedding: Tensor) -> Tensor:
        """Cluster head: embedding (B, D) -> cluster_logits (B, K) of unit length."""
        with torch.autocast(embedding.device.type, enabled=False):
            return F.normalize(self.clustering(embedding), dim=1)

    def reconstruction_target(self, inputs: Tensor, kind: str = "input") -> Tensor:
        """What the decoder should give for network input (B, 3, H, W), divided by 255.

        "input": pixels minus the mean, as in the released code (it leaves the decoder's range (0, 1));
        "image": the pixels themselves, in [0, 1]. Channels in the network's order.
        """
        if kind == "input":
            return self.normalization.mean_subtracted(inputs) / 255
        if kind == "image":
            return self.normalization.pixels(inputs) / 255
        raise ValueError(f"recon_target is input or image, not {kind!r}")

    def reconstructed_pixels(self, reconstruction: Tensor, kind: str = "input") -> Tensor:
        """What a decoder trained on `reconstruction_target` of that kind shows: (B, 3, H, W) -> uint8 RGB (B, H, W, 3).

        Pixels darker than the mean cannot be reconstructed of kind "input": the decoder's range begins at 0.
        """
        pixels = 255 * _as_float(reconstruction)
        if kind == "input":
            pixels = pixels + pixels.new_tensor(self.normalization.mean).view(1, 3, 1, 1)
        if self.normalization.order == "BGR":
            pixels = pixels.flip(1)
        return pixels.round().clamp(0, 255).byte().permute(0, 2, 3, 1)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """For mining, clustering and evaluation: images (B, 3, H, W) -> pooled (B, C), embedding (B, D).

        Both have unit length.
        """
        pooled = self.pool(self.base_model(x))
        return F.normalize(pooled, dim=1), self.embed(pooled)


def build_model(
    backbone: str = "googlenet",
    n_cluster: int = 32,
    low_dim: int = 128,
    weights: str | os.PathLike | None = None,
) -> CBSwR:
    """Make a CBSwR network (paper section 3); heads and decoder start from torch's global random generator.

    backbone: a name of `models.BACKBONES`. weights: None or "none" (random), "auto" (the usual ImageNet weights), or
    the path of a torch or HDF5 file with the backbone's weights.
    Raises UserError for an unknown backbone or weights that cannot be had or do not fit.
    """
    if backbone not in BACKBONES:
        close = difflib.get_close_matches(backbone, BACKBONES, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"unknown backbone {backbone!r}{hint} (choose from {', '.join(BACKBONES)})")
    if n_cluster < 1 or low_dim < 1:
        raise UserError(f"n_cluster and low_dim are at least 1, not {n_cluster} and {low_dim}")
    model = CBSwR(backbone, n_cluster, low_dim)
    if weights is not None and weights != "none":
        load_backbone_weights(model.base_model, backbone, BACKBONES[backbone], weights)
    return model
