"""From feature maps to the pooled feature: which stages are pooled, how, and in which parts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from utils.errors import UserError
from utils.tensors import as_float

POOLS = ("avg", "gem", "max")
LARGEST_STRIPES = 64
LAST_STAGES = re.compile(r"last([1-9]\d{0,2})")  # last2: the last two stages, whatever their names
GEM_POWER = 3.0
GEM_FLOOR = 1e-6  # keeps the gradient of the root finite where a feature map is zero


@dataclass(frozen=True)
class Pooling:
    """Which stages of a backbone are pooled, and how.

    Attributes:
        layers: names of stages in the order of the network, the last stage among them, or
            ("last2",) for the last two; () is the last stage.
        kinds: of POOLS, one for all layers or one for each.
        unit: whether the pooled feature of each layer, and all of them joined, get unit length.
            False, for one layer in one piece, leaves it as it is, as the paper does.
        stripes: horizontal stripes that a feature map is pooled in, one number for all layers or
            one for each.
    """

    layers: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ("avg",)
    unit: bool = False
    stripes: tuple[int, ...] = (1,)

    @classmethod
    def parse(
        cls, layers: str | None, pool: str | None, unit: bool, stripes: str | None = None
    ) -> Pooling:
        """Make a pooling from texts with commas between their parts; None for the defaults.

        Raises UserError for an unknown pool, a layer named twice, impossible stripes, and numbers
        of pools or stripes that do not fit the layers.
        """
        names = tuple(layers.split(",")) if layers else ()
        last = LAST_STAGES.fullmatch(layers or "")
        n_layers = int(last.group(1)) if last else max(1, len(names))
        kinds = tuple((pool or "avg").split(","))
        unknown = [kind for kind in kinds if kind not in POOLS]
        if unknown:
            raise UserError(f"unknown pool {unknown[0]!r} (choose from {', '.join(POOLS)})")
        if len(set(names)) < len(names):
            raise UserError(f"layers {layers}: a layer is named twice")
        texts = (stripes or "1").split(",")
        if not all(
            re.fullmatch(r"[0-9]{1,4}", t) and 1 <= int(t) <= LARGEST_STRIPES for t in texts
        ):
            raise UserError(
                f"stripes {stripes}: give whole numbers from 1 to {LARGEST_STRIPES}, with commas"
            )
        for what, parts in (("pool", kinds), ("stripes", texts)):
            if len(parts) not in {1, n_layers}:
                raise UserError(
                    f"{what} {','.join(parts)}: {len(parts)} values for {n_layers} layers; give "
                    "one, or one for each layer"
                )
        counts = tuple(map(int, texts))
        return cls(names, kinds, unit or n_layers > 1 or max(counts) > 1, counts)

    def options(self) -> dict[str, str | None]:
        """Return the texts that `parse` takes: layers, pool and stripes."""
        return {
            "layers": ",".join(self.layers) or None,
            "pool": ",".join(self.kinds),
            "stripes": ",".join(map(str, self.stripes)),
        }

    def resolved(self, stages: dict[str, tuple[str, int]], backbone: str) -> Pooling:
        """Replace "last2" and the like by the names of stages.

        Raises UserError unless the layers are stages of the backbone in its order, ending with the
        last one.
        """
        order = list(stages)
        known = f"its stages are {', '.join(order)}" if order else "it names no stages"
        last = LAST_STAGES.fullmatch(self.layers[0]) if len(self.layers) == 1 else None
        if last:
            count = int(last.group(1))
            if count > len(order):
                raise UserError(f"layers {self.layers[0]}: {backbone} has fewer stages ({known})")
            return replace(self, layers=tuple(order[-count:]))
        missing = [name for name in self.layers if name not in stages]
        if missing:
            raise UserError(f"layers: {backbone} has no stage {missing[0]!r} ({known})")
        in_order = tuple(name for name in order if name in self.layers)
        if self.layers and (in_order != self.layers or self.layers[-1] != order[-1]):
            raise UserError(
                f"layers {','.join(self.layers)}: must be in the order of {backbone} and end with "
                f"its last stage ({known})"
            )
        return self

    @property
    def in_stripes(self) -> bool:
        """Whether a layer is pooled in more than one stripe."""
        return max(self.stripes) > 1

    def width(self, channels: Sequence[int]) -> int:
        """Return the length of the pooled feature of layers with so many channels."""
        stripes = _for_each(self.stripes, len(channels))
        return sum(width * count for width, count in zip(channels, stripes, strict=True))

    def stripes_of(self, pooled: Tensor, channels: Sequence[int]) -> list[Tensor]:
        """Return (N, count, C_l) of each layer in stripes, from pooled features (N, `width`)."""
        stripes = _for_each(self.stripes, len(channels))
        sizes = [width * count for width, count in zip(channels, stripes, strict=True)]
        parts = zip(pooled.split(sizes, 1), stripes, strict=True)
        return [part.unflatten(1, (count, -1)) for part, count in parts if count > 1]

    def __call__(self, maps: Sequence[Tensor]) -> Tensor:
        """Pool the feature maps (B, C_l, h_l, w_l) of the layers to (B, `width`), in float32 or
        64.
        """
        kinds = _for_each(self.kinds, len(maps))
        stripes = _for_each(self.stripes, len(maps))
        parts = [
            pool_stripes(as_float(feature_map), kind, count)
            for feature_map, kind, count in zip(maps, kinds, stripes, strict=True)
        ]
        if not self.unit:
            return parts[0]
        return F.normalize(torch.cat([F.normalize(part, dim=1) for part in parts], 1), dim=1)

    def over_views(self, views: Sequence[Sequence[Tensor]]) -> Tensor:
        """Average the pooled features (B, `width`) of several views of the same images."""
        parts = [self(maps) for maps in views]
        if len(parts) == 1:
            return parts[0]
        mean = sum(parts) / len(parts)
        return F.normalize(mean, dim=1) if self.unit else mean

    def __str__(self) -> str:
        """Describe the pooling in words."""
        names = self.layers or ("",)
        kinds = _for_each(self.kinds, len(names))
        stripes = _for_each(self.stripes, len(names))
        texts = []
        for layer, kind, count in zip(names, kinds, stripes, strict=True):
            of_layer = f" of {layer}" if layer else ""
            in_stripes = f" in {count} stripes" if count > 1 else ""
            texts.append(f"{kind}{of_layer}{in_stripes}")
        return " + ".join(texts)


PAPER = Pooling()  # the average of the last stage


def _for_each(settings: tuple, n_layers: int) -> tuple:
    return settings * n_layers if len(settings) == 1 else settings


def pool_stripes(feature_map: Tensor, kind: str, count: int) -> Tensor:
    """Pool (B, C, h, w) in `count` horizontal stripes, from top to bottom: (B, count * C).

    Stripe i holds the rows from floor(i h / count) to ceil((i + 1) h / count), as in adaptive
    pooling. Source of the stripes: Sun et al., "Beyond part models", 2018.
    """
    height = feature_map.shape[2]
    stripes = [
        feature_map[:, :, i * height // count : -(-(i + 1) * height // count)] for i in range(count)
    ]
    return torch.cat([pool(stripe, kind) for stripe in stripes], 1)


def pool(feature_map: Tensor, kind: str) -> Tensor:
    """Pool (B, C, h, w) to (B, C): "avg" mean, "max" maximum, "gem" generalized mean of power 3.

    Source of the generalized mean: Radenovic, Tolias and Chum, "Fine-tuning CNN image retrieval
    with no human annotation", 2018.
    """
    if kind == "avg":
        return feature_map.mean((2, 3))
    if kind == "max":
        return feature_map.amax((2, 3))
    powers = feature_map.clamp(min=GEM_FLOOR).pow(GEM_POWER)
    return powers.mean((2, 3)).pow(1 / GEM_POWER)
