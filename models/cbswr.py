"""The CBSwR network: backbone, embedding head, cluster head, decoder."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from models.backbones import backbone_spec
from models.decoder import Decoder
from models.pooling import PAPER, Pooling
from models.timm_backbones import TimmBackbone
from models.weights import load_backbone_weights
from utils.errors import UserError
from utils.tensors import as_float

DROPOUT = 0.6  # of the cluster head


class CBSwR(nn.Module):
    """image -> feature map -> pooled -> embedding -> cluster logits; feature map -> image.

    Parts have the names of the released checkpoints. The backbone and the decoder run in the
    autocast dtype; pooling, heads and normalizations in float32 (or float64).
    """

    def __init__(
        self, backbone: str, n_cluster: int, low_dim: int, pooling: Pooling = PAPER
    ) -> None:
        super().__init__()
        spec = backbone_spec(backbone)
        self.backbone_name = backbone
        self.n_cluster = n_cluster
        self.low_dim = low_dim
        self.pooling = pooling.resolved(spec.stages, backbone)
        self.pooled_dim = pooled_width(backbone, pooling)
        self.normalization = spec.normalization
        self._stages = [path for path, _ in spec.stages.values()]
        self._pooled_stages = [spec.stages[name][0] for name in self.pooling.layers]
        self._trains_statistics = False  # of the batch norms of the backbone
        self.base_model = spec.make()
        self.decoder = Decoder(spec.channels)
        self.feat_ext = nn.Sequential(nn.Linear(self.pooled_dim, low_dim))
        self.clustering = nn.Sequential(
            nn.BatchNorm1d(low_dim), nn.Dropout(DROPOUT), nn.Linear(low_dim, n_cluster)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute all of the network but the decoder.

        Args:
            x: (B, 3, H, W), what `normalization` makes of pixels.

        Returns embedding (B, D) and cluster_logits (B, K), both of unit length, and feature_map
        (B, C, h, w) of the last stage.
        """
        maps = self.maps(x)
        embedding = self.embed(self.pool(maps))
        return embedding, self.cluster(embedding), maps[-1]

    def maps(self, x: Tensor) -> list[Tensor]:
        """Return the feature maps (B, C_l, h_l, w_l) of the pooled layers, the last stage last."""
        if len(self._pooled_stages) < 2:
            return [self.base_model(x)]
        if isinstance(self.base_model, TimmBackbone):
            return self.base_model.maps(x, self.pooling.layers)
        maps = []
        for name, part in self.base_model.named_children():
            x = part(x)
            if name in self._pooled_stages:
                maps.append(x)
        return maps

    def view_maps(self, x: Tensor, flip: bool) -> list[list[Tensor]]:
        """Return the `maps` of images and, with `flip`, those of their mirror images."""
        views = [x, x.flip(3)] if flip else [x]
        return [self.maps(view) for view in views]

    def pool(self, maps: Sequence[Tensor]) -> Tensor:
        """Pool feature maps (B, C_l, h_l, w_l) of the pooled layers to (B, C)."""
        return self.pooling(maps)

    def embed(self, pooled: Tensor) -> Tensor:
        """Embedding head: pooled (B, C) -> embedding (B, D) of unit length."""
        with torch.autocast(pooled.device.type, enabled=False):
            return F.normalize(self.feat_ext(pooled), dim=1)

    def cluster(self, embedding: Tensor) -> Tensor:
        """Cluster head: embedding (B, D) -> cluster_logits (B, K) of unit length."""
        with torch.autocast(embedding.device.type, enabled=False):
            return F.normalize(self.clustering(embedding), dim=1)

    def features(self, x: Tensor, flip: bool = False) -> tuple[Tensor, Tensor]:
        """Compute pooled (B, C) and embedding (B, D) of images (B, 3, H, W).

        The embedding has unit length; pooled has where `Pooling.unit` says so.

        Args:
            flip: average the pooled features of the images and of their mirror images.
        """
        pooled = self.pooling.over_views(self.view_maps(x, flip))
        return pooled, self.embed(pooled)

    def train_parts(self, n_stages: int = 0, batch_norm: bool = False) -> None:
        """Choose what is trained.

        Args:
            n_stages: the last stages of the backbone that are trained; 0: all of it.
            batch_norm: whether the backbone's batch norms take the statistics of the batch. If
                not, they keep those that they have.

        Raises UserError if the backbone has fewer stages.
        """
        if n_stages > len(self._stages):
            raise UserError(
                f"{self.backbone_name} has {len(self._stages)} stages that can be trained alone, "
                f"fewer than {n_stages}"
            )
        if 0 < n_stages < len(self._stages):
            self._freeze_up_to(self._stages[-n_stages - 1])
        self._trains_statistics = batch_norm
        self.train(self.training)

    @property
    def has_batch_norm(self) -> bool:
        """Whether the backbone has any."""
        return any(isinstance(module, _BatchNorm) for module in self.base_model.modules())

    def train(self, mode: bool = True) -> CBSwR:
        """Set the mode, as of every module; kept and frozen batch norms stay in evaluation mode."""
        super().train(mode)
        for module in self.base_model.modules():
            if isinstance(module, _BatchNorm) and self._keeps_statistics(module):
                module.eval()
        return self

    def _keeps_statistics(self, norm: _BatchNorm) -> bool:
        is_frozen = norm.weight is not None and not norm.weight.requires_grad
        return is_frozen or not self._trains_statistics

    def _freeze_up_to(self, stage: str) -> None:
        """Freeze all modules of the backbone up to the end of a stage, in their order."""
        was_inside = False
        for name, module in self.base_model.named_modules():
            is_inside = f"{name}.".startswith(f"{stage}.")
            if was_inside and not is_inside:
                return
            was_inside = is_inside
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)

    @torch.no_grad()
    def set_head(self, weight: Tensor, bias: Tensor) -> None:
        """Give the embedding head a weight (D, C) and a bias (D,)."""
        self.feat_ext[0].weight.copy_(weight)
        self.feat_ext[0].bias.copy_(bias)

    def shorten(self, dim: int) -> None:
        """Keep the first `dim` numbers of the embedding, for heads whose numbers are in order.

        The cluster head no longer fits then. Raises UserError if the embedding has fewer.
        """
        if not 1 <= dim <= self.low_dim:
            raise UserError(f"the embedding has {self.low_dim} dimensions, not {dim}")
        head = self.feat_ext[0]
        head.weight = nn.Parameter(head.weight[:dim].detach().clone())
        head.bias = nn.Parameter(head.bias[:dim].detach().clone())
        head.out_features = dim
        self.low_dim = dim

    def reconstruction_target(self, inputs: Tensor, kind: str = "input") -> Tensor:
        """Return what the decoder should give for inputs (B, 3, H, W), divided by 255.

        Args:
            kind: "input" for pixels minus the mean, as released (partly outside of the decoder's
                range 0 to 1); "image" for the pixels.
        """
        if kind == "input":
            return self.normalization.mean_subtracted(inputs) / 255
        if kind == "image":
            return self.normalization.pixels(inputs) / 255
        raise ValueError(f"the reconstruction target is input or image, not {kind!r}")

    def reconstructed_pixels(self, reconstruction: Tensor, kind: str = "input") -> Tensor:
        """Turn reconstructions (B, 3, H, W) of such a target into uint8 RGB (B, H, W, 3)."""
        pixels = 255 * as_float(reconstruction)
        if kind == "input":
            pixels = pixels + pixels.new_tensor(self.normalization.mean).view(1, 3, 1, 1)
        if self.normalization.order == "BGR":
            pixels = pixels.flip(1)
        return pixels.round().clamp(0, 255).byte().permute(0, 2, 3, 1)


def pooled_channels(backbone: str, pooling: Pooling) -> list[int]:
    """Return the channels C_l of each layer that is pooled."""
    spec = backbone_spec(backbone)
    layers = pooling.resolved(spec.stages, backbone).layers
    return [spec.stages[name][1] for name in layers] or [spec.channels]


def pooled_width(backbone: str, pooling: Pooling) -> int:
    """Return the length C of the pooled feature."""
    return pooling.width(pooled_channels(backbone, pooling))


def build_model(
    backbone: str = "googlenet",
    n_cluster: int = 32,
    low_dim: int = 128,
    weights: str | os.PathLike | None = None,
    pooling: Pooling = PAPER,
) -> CBSwR:
    """Make a CBSwR network (paper, section 3).

    Heads, decoder and random weights are drawn from torch's global generator.

    Args:
        backbone: a name of `models.BACKBONES`, or timm:NAME.
        n_cluster: K, the size of the cluster head.
        low_dim: D, the size of the embedding.
        weights: of the backbone: None or "none" (random), "auto" (its usual ImageNet weights), or
            the path of a torch, HDF5 or safetensors file.

    Raises UserError for an unknown backbone or layer, and weights that are missing or do not fit.
    """
    if n_cluster < 1 or low_dim < 1:
        raise UserError(f"n_cluster and low_dim are at least 1, not {n_cluster} and {low_dim}")
    model = CBSwR(backbone, n_cluster, low_dim, pooling)
    if weights is not None and weights != "none":
        load_backbone_weights(model.base_model, backbone, weights)
    return model
