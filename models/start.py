"""Choose the start of a training without labels: stripes or not, and the head in closed form.

Stripes compare images part by part, from top to bottom: of use where images that are alike have the
same thing at the same height, as photos cropped to an object do, and harmful elsewhere. A head is
judged by images that it was not fitted to, a quarter of them at a time: given one part of an image,
at which place does it find another part of the same image, among parts of the others?
docs/results.md shows how well both measures agree with R@1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

import torch
from torch import Tensor
from torch.nn import functional as F

from models.closed_form import Spectrum
from utils.metrics import mean_log_rank
from utils.retrieval import nearest_neighbors

ALIGNED = 0.95  # share of stripes that find their like at the same height
MOST_ALIKE = 2  # similar images that a stripe is looked for in; one may be a copy
MOST_COMPARED = 5000  # images whose stripes are compared
POWERS = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.0)
AS_GOOD = 0.98  # of the highest score; R@1 of aligned images peaks at more whitening than the score
FEWEST = 100  # images that can judge heads; fewer keep the frozen features
FEWEST_ALIGNED = 50  # the same, where images are aligned; fewer are not asked whether they are
FOLDS = 4
MOST_FITTED = 50_000  # images that a judged head is fitted to
PAIRS = {(0, 1): 2 / 3, (2, 3): 1 / 3}  # of parts (datasets.views.part_crops), and their weights
PAIRS_ALIGNED = {(0, 1): 1.0}  # the others lie at different heights


@dataclass(frozen=True)
class Head:
    """A head in closed form.

    Attributes:
        kind: "svd" for the frozen features, or "whiten".
        power: of the whitening.
        score: 1 / the geometric mean rank of the part that is looked for, in (0, 1].
    """

    kind: str
    power: float
    score: float

    @property
    def name(self) -> str:
        """What it is, in words."""
        return "frozen features" if self.kind == "svd" else f"whiten {self.power:g}"

    def __str__(self) -> str:
        return f"{self.name} {self.score:.3f}"


@torch.no_grad()
def aligned_share(pooled: Tensor, stripes: Sequence[Tensor]) -> float:
    """Return which share of stripes is most like the stripe of the same height in similar images.

    Args:
        pooled: features (N, C) of whole images, by which they are similar; N at least 3.
        stripes: of each layer features (N, n, C_l) of n stripes from top to bottom.
    """
    some = _thinned(torch.arange(len(pooled)), MOST_COMPARED)
    alike = nearest_neighbors(pooled[some], MOST_ALIKE)[1]
    shares = []
    for layer in stripes:
        layer = F.normalize(layer[some] - layer[some].mean((0, 1)), dim=2)
        similarity = layer[:, None] @ layer[alike].mT  # (N, MOST_ALIKE, n, n)
        shares.append((similarity.argmax(3) == torch.arange(layer.shape[1])).float().mean())
    return float(sum(shares) / len(shares))


@torch.no_grad()
def score_heads(pooled: Tensor, parts: Tensor, index: Tensor, is_aligned: bool) -> list[Head]:
    """Score every head; of too few images (see FEWEST) the frozen features alone.

    All directions are kept, however many the head will have.

    Args:
        pooled: features (N, C) of all images.
        parts: features (n, 4, C) of the parts of n images.
        index: (n,) the numbers of these images.
        is_aligned: whether things lie at the same height in similar images, see `aligned_share`.
    """
    heads = [("svd", 0.0), *(("whiten", power) for power in POWERS)]
    pairs, fewest = (PAIRS_ALIGNED, FEWEST_ALIGNED) if is_aligned else (PAIRS, FEWEST)
    if len(pooled) < fewest:
        heads = heads[:1]
    folds = torch.arange(len(index)) % FOLDS
    scores: dict[tuple, list[float]] = {}
    for fold in folds.unique():
        fitted_to = torch.ones(len(pooled), dtype=torch.bool)
        fitted_to[index[folds == fold]] = False
        features = pooled[_thinned(fitted_to.nonzero().flatten(), MOST_FITTED)]
        held_out = parts[folds == fold]
        spectra = {"svd": Spectrum.of(features, centered=False), "whiten": Spectrum.of(features)}
        for kind, power in heads:
            weight, bias = spectra[kind].head(features.shape[1], power)
            embedded = F.normalize(held_out @ weight.T + bias, dim=2)
            log_ranks = (
                w * mean_log_rank(embedded[:, a], embedded[:, b]) for (a, b), w in pairs.items()
            )
            scores.setdefault((kind, power), []).append(sum(log_ranks))
    return [Head(*head, exp(-sum(ranks) / len(ranks))) for head, ranks in scores.items()]


def best_of(heads: Sequence[Head], is_aligned: bool) -> Head:
    """Return the head with the highest score; of aligned images the last one that is as good."""
    best = max(heads, key=lambda head: head.score)
    if not is_aligned:
        return best
    return [head for head in heads if head.score >= AS_GOOD * best.score][-1]


def _thinned(index: Tensor, most: int) -> Tensor:
    """Return at most so many of some numbers (n,), evenly spaced."""
    if len(index) <= most:
        return index
    return index[torch.linspace(0, len(index) - 1, most).long()]
