"""From feature maps to the pooled feature: which stages of a backbone are pooled, how, and in which parts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from utils.arguments import POOLS
from utils.errors import UserError

LARGEST_STRIPES = 64
LAST = r"last[1-9]\d{0,2}"  # last2: the last two stages, whatever their names
GEM_POWER = 3.0
GEM_FLOOR = 1e-6  # under the root, for its gradient at maps of zeros


@dataclass(frozen=True)
class Pooling:
    """Which stages are pooled, and how.

    layers: names of `BackboneSpec.stages` in the order of the network, the last stage among them, or ("last2",) for the
    last two; () is the last stage alone. kinds: of `POOLS`, one for all layers or one for each. unit: the pooled
    feature of every layer, and all of them together, are brought to unit length; False, for one layer in one piece,
    leaves it as it is, as the paper does.
    stripes: into how many horizontal stripes the map is divided, which are pooled one by one and joined, from top to
    bottom; one number for all layers or one for each.
    """

    layers: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ("avg",)
    unit: bool = False
    stripes: tuple[int, ...] = (1,)

    @classmethod
    def parse(cls, layers: str | None, pool: str | None, unit: bool, stripes: str | None = None) -> Pooling:
        """Of the options: names, and numbers of `stripes`, with commas between them; None for the defaults.

        Raises UserError for an unknown pool, a layer named twice, a number of stripes that is none from 1 to
        LARGEST_STRIPES, and another number of pools or of stripes than of layers.
        """
        names = tuple(layers.split(",")) if layers else ()
        count = max(1, int(names[0][4:]) if len(names) == 1 and re.fullmatch(LAST, names[0]) else len(names))
        kinds = tuple((pool or "avg").split(","))
        for kind in kinds:
            if kind not in POOLS:
                raise UserError(f"--pool {pool}: unknown pool {kind!r} (choose from {', '.join(POOLS)})")
        if len(kinds) not in {1, count}:
            raise UserError(f"--pool {pool}: names {len(kinds)} pools for {count} layers; give one, or one for "
                            "each layer")  # fmt: skip
        if len(set(names)) < len(names):
            raise UserError(f"--layers {layers}: names a layer twice")
        counts = tuple((stripes or "1").split(","))
        if not all(re.fullmatch(r"[0-9]{1,4}", text) and 1 <= int(text) <= LARGEST_STRIPES for text in counts):
            raise UserError(f"--stripes {stripes}: takes whole numbers from 1 to {LARGEST_STRIPES}, with commas "
                            "between them")  # fmt: skip
        if len(counts) not in {1, count}:
            raise UserError(f"--stripes {stripes}: names {len(counts)} numbers for {count} layers; give "
                            "one, or one for each layer")  # fmt: skip
        numbers = tuple(map(int, counts))
        return cls(names, kinds, unit or count > 1 or max(numbers) > 1, numbers)

    def options(self) -> dict[str, str | None]:
        """As `parse` takes it: layers, pool and stripes."""
        return {"layers": ",".join(self.layers) or None, "pool": ",".join(self.kinds),
                "stripes": ",".join(map(str, self.stripes))}  # fmt: skip

    def resolved(self, stages: dict[str, tuple[str, int]], backbone: str) -> Pooling:
        """The same with the names of the layers that "last2", "last3", ... stand for.

        Raises UserError unless the layers are stages of the backbone, in its order, and end with the last.
        """
        order = list(stages)
        if len(self.layers) == 1 and re.fullmatch(LAST, self.layers[0]):
            count = int(self.layers[0][4:])
            if count > len(order):
                known = f"has {len(order)} stages" if order else "names no stages; leave --layers out"
                raise UserError(f"--layers {self.layers[0]}: {backbone} {known}")
            return replace(self, layers=tuple(order[-count:]))
        for name in self.layers:
            if name not in stages:
                known = f"choose from {', '.join(order)}" if order else "it has the last one alone; leave --layers out"
                raise UserError(f"--layers: {backbone} has no stage {name!r} ({known})")
        if self.layers and (
            [n for n in order if n in self.layers] != list(self.layers) or self.layers[-1] != order[-1]
        ):
            raise UserError(f"--layers {','.join(self.layers)}: must be in the order of the network and end with its "
                            f"last stage, {order[-1]}")  # fmt: skip
        return self

    def width(self, channels: list[int]) -> int:
        """Length of the pooled feature of layers with maps of so many channels."""
        return sum(width * count for width, count in zip(channels, self._each(self.stripes, channels), strict=True))

    @staticmethod
    def _each(settings: tuple, layers: Sequence) -> tuple:
        """A setting for each of the layers."""
        return settings * len(layers) if len(settings) == 1 else settings

    def __call__(self, maps: list[Tensor]) -> Tensor:
        """Feature maps (B, C_l, h_l, w_l) of the layers -> pooled (B, `width` of the C_l), float32 or float64."""
        settings = zip(maps, self._each(self.kinds, maps), self._each(self.stripes, maps), strict=True)
        parts = [pool_stripes(as_float(one), kind, count) for one, kind, count in settings]
        if not self.unit:
            return parts[0]
        return F.normalize(torch.cat([F.normalize(part, dim=1) for part in parts], 1), dim=1)

    def __str__(self) -> str:
        """In words, for what is printed."""
        names = self.layers or ("",)
        settings = zip(names, self._each(self.kinds, names), self._each(self.stripes, names), strict=True)
        return " + ".join(
            kind + (f" of {layer}" if layer else "") + (f" in {count} stripes" if count > 1 else "")
            for layer, kind, count in settings
        )


PAPER = Pooling()  # the average of the last stage


def as_float(x: Tensor) -> Tensor:
    """`x` in float32, or float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


def pool_stripes(feature_map: Tensor, kind: str, count: int) -> Tensor:
    """Pool maps (B, C, h, w) in `count` horizontal stripes, from the top: (B, count * C).

    Stripe i takes the rows from floor(i h / count) to ceil((i + 1) h / count), as adaptive pooling does: neighbours
    share a row where h is no multiple of count. Source of the stripes: Sun et al., "Beyond part models", 2018, who pool
    pictures of people so.
    """
    if count == 1:
        return pool(feature_map, kind)
    height = feature_map.shape[2]
    ends = [(i * height // count, -(-(i + 1) * height // count)) for i in range(count)]
    return torch.cat([pool(feature_map[:, :, first:end], kind) for first, end in ends], 1)


def pool(feature_map: Tensor, kind: str) -> Tensor:
    """Pool maps (B, C, h, w) to (B, C): "avg" mean, "max" maximum, "gem" generalised mean of power 3.

    Source of the generalised mean: Radenovic, Tolias and Chum, "Fine-tuning CNN image retrieval with no human
    annotation", 2018; its power is kept at 3, where they begin.
    """
    if kind == "avg":
        return feature_map.mean((2, 3))
    if kind == "max":
        return feature_map.amax((2, 3))
    return feature_map.clamp(min=GEM_FLOOR).pow(GEM_POWER).mean((2, 3)).pow(1 / GEM_POWER)
