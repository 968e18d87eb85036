"""The CBSwR network: backbone, embedding head, cluster head, decoder; named as in the released checkpoints."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbones import backbone_spec
from models.decoder import Decoder
from models.pooling import PAPER, Pooling, as_float
from models.weights import load_backbone_weights
from utils.errors import UserError


class CBSwR(nn.Module):
    """image -> feature map -> pooled -> embedding -> cluster logits; centroid feature map -> reconstruction.

    The backbone and the decoder run in the autocast dtype; pooling, heads and normalisations in float32 (or float64).
    """

    def __init__(self, backbone: str, n_cluster: int, low_dim: int, pooling: Pooling = PAPER) -> None:
        super().__init__()
        self._keep_statistics = False  # of the backbone's batch norms, in training
        spec = backbone_spec(backbone)
        pooling = pooling.resolved(spec.stages, backbone)
        self.backbone_name = backbone
        self.n_cluster = n_cluster
        self.low_dim = low_dim
        self.pooling = pooling
        self.channels = spec.channels
        self.pooled_dim = pooled_width(backbone, pooling)
        self._stages = [child for child, _ in spec.stages.values()]
        self._tapped = [spec.stages[name][0] for name in pooling.layers]
        self._frozen: list[str] = []  # children of the backbone that are not trained
        self.normalization = spec.normalization
        self.base_model = spec.make()
        self.decoder = Decoder(spec.channels)
        self.feat_ext = nn.Sequential(nn.Linear(self.pooled_dim, low_dim))
        self.clustering = nn.Sequential(nn.BatchNorm1d(low_dim), nn.Dropout(0.6), nn.Linear(low_dim, n_cluster))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, H, W) -> embedding (B, D), cluster_logits (B, K), feature_map (B, C, h, w).

        Embedding and logits have unit length. The input is what `normalization` makes of pixels.
        """
        maps = self.maps(x)
        embedding = self.embed(self.pool(*maps))
        return embedding, self.cluster(embedding), maps[-1]

    def maps(self, x: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) -> the feature maps (B, C_l, h_l, w_l) of the pooled layers, the last one last."""
        return self.end_maps(*self.begin_maps(x))

    def begin_maps(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The part of `maps` that is not trained: its result, and the maps of the pooled layers in it."""
        return self._through(x, [], trained=False) if self._frozen else (x, [])

    def end_maps(self, x: Tensor, found: list[Tensor]) -> list[Tensor]:
        """The rest of `maps`, from what `begin_maps` gave."""
        if len(self._tapped) < 2 and not self._frozen:
            return [self.base_model(x)]
        return self._through(x, found, trained=True)[1]

    def _through(self, x: Tensor, found: list[Tensor], trained: bool) -> tuple[Tensor, list[Tensor]]:
        """Through the trained or the frozen children of the backbone; the maps found are added to those given."""
        children, found = dict(self.base_model.named_children()), list(found)
        last = list(children)[-1]
        for name, part in children.items():
            if (name not in self._frozen) == trained:
                x = part(x)
                if name in self._tapped or (name == last and not self._tapped):
                    found.append(x)
        return x, found

    def train_last(self, stages: int) -> None:
        """Train the last `stages` stages of the backbone only, and keep the statistics of all its batch norms.

        Raises UserError where it has no so many to name.
        """
        if not 1 <= stages <= len(self._stages):
            known = f"has {len(self._stages)} stages" if self._stages else "names no stages"
            raise UserError(f"--train_stages {stages}: {self.backbone_name} {known}; give a smaller number, or leave "
                            "the option out to train all")  # fmt: skip
        children = list(self.base_model._modules)
        first = children.index(self._stages[-stages - 1]) + 1 if stages < len(self._stages) else 0
        self._frozen = children[:first]
        for name in self._frozen:
            self.base_model.get_submodule(name).requires_grad_(False)
        self._keep_statistics = True
        self.train(self.training)

    def shorten(self, dim: int) -> None:
        """Keep the first `dim` numbers of the embedding; the cluster head has nothing to work on then.

        Those of a head in closed form are in the order of their directions: the shorter embedding is the one that the
        closed form for `dim` would give. Raises UserError where there are fewer.
        """
        if not 1 <= dim <= self.low_dim:
            raise UserError(f"--dim {dim}: the embedding has {self.low_dim} dimensions only")
        whole = self.feat_ext[0]
        head = nn.Linear(self.pooled_dim, dim, device=whole.weight.device, dtype=whole.weight.dtype)
        head.load_state_dict({name: value[:dim] for name, value in whole.state_dict().items()})
        self.feat_ext, self.low_dim = nn.Sequential(head), dim

    def train(self, mode: bool = True) -> CBSwR:
        """As of every module; what `train_last` keeps as it is stays in evaluation mode."""
        super().train(mode)
        if self._keep_statistics:
            for name, part in self.base_model.named_modules():
                if name.partition(".")[0] in self._frozen or isinstance(part, nn.modules.batchnorm._BatchNorm):
                    part.eval()
        return self

    def pool(self, *maps: Tensor) -> Tensor:
        """Pool the feature maps of the layers, by default the average of the last: (B, C, h, w) -> pooled (B, C)."""
        return self.pooling(list(maps))

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
        pixels = 255 * as_float(reconstruction)
        if kind == "input":
            pixels = pixels + pixels.new_tensor(self.normalization.mean).view(1, 3, 1, 1)
        if self.normalization.order == "BGR":
            pixels = pixels.flip(1)
        return pixels.round().clamp(0, 255).byte().permute(0, 2, 3, 1)

    def features(self, x: Tensor, flip: bool = False) -> tuple[Tensor, Tensor]:
        """For mining, clustering and evaluation: images (B, 3, H, W) -> pooled (B, C), embedding (B, D).

        Both have unit length. `flip` averages the pooled features of the image and of its mirror image.
        """
        pooled = self.pool(*self.maps(x))
        if flip:
            pooled = (pooled + self.pool(*self.maps(x.flip(3)))) / 2
        unit = F.normalize(pooled, dim=1)
        return unit, self.embed(unit if self.pooling.unit else pooled)


def pooled_width(backbone: str, pooling: Pooling) -> int:
    """Length of the pooled feature."""
    spec = backbone_spec(backbone)
    layers = pooling.resolved(spec.stages, backbone).layers
    return pooling.width([spec.stages[name][1] for name in layers] or [spec.channels])


def build_model(
    backbone: str = "googlenet",
    n_cluster: int = 32,
    low_dim: int = 128,
    weights: str | os.PathLike | None = None,
    pooling: Pooling = PAPER,
) -> CBSwR:
    """Make a CBSwR network (paper section 3); heads and decoder start from torch's global random generator.

    backbone: a name of `models.BACKBONES`, or timm:NAME. weights: None or "none" (random), "auto" (the usual ImageNet
    weights), or the path of a torch, HDF5 or safetensors file with the backbone's weights. pooling: see
    `models.pooling.Pooling`.
    Raises UserError for an unknown backbone or layer, or weights that cannot be had or do not fit.
    """
    if n_cluster < 1 or low_dim < 1:
        raise UserError(f"n_cluster and low_dim are at least 1, not {n_cluster} and {low_dim}")
    model = CBSwR(backbone, n_cluster, low_dim, pooling)
    if weights is not None and weights != "none":
        load_backbone_weights(model.base_model, backbone, weights)
    return model
