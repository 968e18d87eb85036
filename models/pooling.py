"""From feature maps to the pooled feature: which stages of a backbone are pooled, and how."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from utils.arguments import POOLS
from utils.errors import UserError

GEM_POWER = 3.0
GEM_FLOOR = 1e-6  # under the root, for its gradient at maps of zeros


@dataclass(frozen=True)
class Pooling:
    """Which stages are pooled, and how.

    layers: names of `BackboneSpec.stages` in the order of the network, the last stage among them; () is the last stage
    alone. kinds: of `POOLS`, one for all layers or one for each. unit: the pooled feature of every layer, and all of
    them together, are brought to unit length; False, for one layer alone, leaves them as they are, as the paper does.
    """

    layers: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ("avg",)
    unit: bool = False

    @classmethod
    def parse(cls, layers: str | None, pool: str | None, unit: bool) -> Pooling:
        """Of the options: `layers` and `pool` are names with commas between them, None for the defaults.

        Raises UserError for an unknown pool, a layer named twice and another number of pools than of layers.
        """
        names = tuple(layers.split(",")) if layers else ()
        kinds = tuple((pool or "avg").split(","))
        for kind in kinds:
            if kind not in POOLS:
                raise UserError(f"--pool {pool}: unknown pool {kind!r} (choose from {', '.join(POOLS)})")
        if len(kinds) not in {1, max(1, len(names))}:
            raise UserError(f"--pool {pool}: names {len(kinds)} pools for {max(1, len(names))} layers; give one, or "
                            "one for each layer")  # fmt: skip
        if len(set(names)) < len(names):
            raise UserError(f"--layers {layers}: names a layer twice")
        return cls(names, kinds, unit or len(names) > 1)

    def check(self, stages: dict[str, tuple[str, int]], backbone: str) -> None:
        """Raise UserError unless the layers are stages of the backbone, in its order, and end with the last."""
        order = list(stages)
        for name in self.layers:
            if name not in stages:
                known = f"choose from {', '.join(order)}" if order else "it has the last one alone; leave --layers out"
                raise UserError(f"--layers: {backbone} has no stage {name!r} ({known})")
        if self.layers and (
            [n for n in order if n in self.layers] != list(self.layers) or self.layers[-1] != order[-1]
        ):
            raise UserError(f"--layers {','.join(self.layers)}: must be in the order of the network and end with its "
                            f"last stage, {order[-1]}")  # fmt: skip

    def __call__(self, maps: list[Tensor]) -> Tensor:
        """Feature maps (B, C_l, h_l, w_l) of the layers -> pooled (B, sum of C_l), float32 or float64."""
        kinds = self.kinds * len(maps) if len(self.kinds) == 1 else self.kinds
        parts = [pool(as_float(one), kind) for one, kind in zip(maps, kinds, strict=True)]
        if not self.unit:
            return parts[0]
        return F.normalize(torch.cat([F.normalize(part, dim=1) for part in parts], 1), dim=1)

    def __str__(self) -> str:
        """In words, for what is printed."""
        kinds = self.kinds * len(self.layers) if len(self.kinds) == 1 else self.kinds
        return " + ".join(f"{kind} of {layer}" for kind, layer in zip(kinds, self.layers, strict=True)) or self.kinds[0]


PAPER = Pooling()  # the average of the last stage


def as_float(x: Tensor) -> Tensor:
    """`x` in float32, or float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


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
