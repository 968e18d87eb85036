"""Choose the start of a training without labels: the pooling, and the head in closed form.

A candidate is judged by the images that its head was not fitted to: given one part of an image, at
which place does it find another part of the same image, among parts of all those images? Frozen
features of few or varied images are hard to improve; where they can be, this measure agrees with
R@1 (docs/results.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import exp

import torch
from torch import Tensor
from torch.nn import functional as F

from models.closed_form import Spectrum
from utils.metrics import mean_log_rank

POWERS = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75)
FEWEST = 100  # images that can judge; fewer keep the frozen features
FOLDS = 4
MOST_FITTED = 50_000  # images that a judged head is fitted to
PAIRS = {(0, 1): 2 / 3, (2, 3): 1 / 3}  # of parts (datasets.views.part_crops), and their weights


@dataclass(frozen=True)
class Start:
    """A pooling with a head in closed form.

    Attributes:
        pooling: its number.
        kind: of the head: "svd" for the frozen features, or "whiten".
        power: of the whitening.
        score: 1 / the geometric mean rank of the part that is looked for, in (0, 1].
    """

    pooling: int
    kind: str
    power: float
    score: float

    def __str__(self) -> str:
        return "frozen features" if self.kind == "svd" else f"whiten {self.power:g}"


@torch.no_grad()
def score_starts(pooled: Sequence[Tensor], parts: Sequence[Tensor], index: Tensor) -> list[Start]:
    """Score every start; with fewer than FEWEST images the frozen features of the first pooling.

    All directions are kept, however many the head will have: cut to 512, stripes look worse on cars
    than their R@1 is.

    Args:
        pooled: of each pooling the features (N, C) of all images.
        parts: of each pooling the features (n, 4, C) of the parts of n images.
        index: (n,) the numbers of these images.
    """
    heads = [("svd", 0.0), *(("whiten", power) for power in POWERS)]
    if len(pooled[0]) < FEWEST:
        heads = heads[:1]
        pooled = pooled[:1]
    folds = torch.arange(len(index)) % FOLDS
    scores: dict[tuple, list[float]] = {}
    for number, fold in product(range(len(pooled)), folds.unique()):
        fitted_to = torch.ones(len(pooled[number]), dtype=torch.bool)
        fitted_to[index[folds == fold]] = False
        features = pooled[number][_thinned(fitted_to.nonzero().flatten(), MOST_FITTED)]
        held_out = parts[number][folds == fold]
        spectra = {"svd": Spectrum.of(features, centered=False), "whiten": Spectrum.of(features)}
        for kind, power in heads:
            weight, bias = spectra[kind].head(features.shape[1], power)
            embedded = F.normalize(held_out @ weight.T + bias, dim=2)
            pairs = PAIRS.items()
            log_ranks = (w * mean_log_rank(embedded[:, a], embedded[:, b]) for (a, b), w in pairs)
            scores.setdefault((number, kind, power), []).append(sum(log_ranks))
    return [Start(*start, exp(-sum(ranks) / len(ranks))) for start, ranks in scores.items()]


def _thinned(index: Tensor, most: int) -> Tensor:
    """Return at most so many of some numbers (n,), evenly spaced."""
    if len(index) <= most:
        return index
    return index[torch.linspace(0, len(index) - 1, most).long()]


def best_of(starts: Sequence[Start]) -> Start:
    """Return the start with the highest score, of equals the first."""
    return max(starts, key=lambda start: start.score)
