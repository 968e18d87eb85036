"""Contextual similarity of a teacher, the relaxed contrastive loss that follows it, and self-distillation.

Source: Kim et al., "Self-taught metric learning without labels" (STML), CVPR 2022.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses.alone import metric_alone
from models.pooling import as_float
from models.teacher import Teacher
from utils.distributed import ALONE, Processes

SIGMA, NEIGHBORS, MARGIN = 3.0, 10, 1.0  # of that paper


def contextual_similarity(embeddings: Tensor, neighbors: int = NEIGHBORS, sigma: float = SIGMA) -> Tensor:
    """How much the rows of a batch belong together: embeddings (B, D) of unit length -> (B, B), symmetric, in [0, 1].

    The mean of two similarities: exp(-d^2 / sigma) of their distance d; and how far their neighbourhoods agree, where j
    is in R(i) if each is among the `neighbors` nearest of the other (a row is its own nearest): |R(i) and R(j)| /
    |R(i)| if j is in R(i), else 0, averaged over the nearest half of the neighbours of i, and over (i, j) and (j, i).
    A batch of fewer rows than neighbours takes all of them.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        x = as_float(embeddings)
        distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(-1.0)  # itself first
        count = min(neighbors, len(x))
        nearest = distance.topk(count, largest=False).indices  # (B, k)
        near = torch.zeros_like(distance).scatter_(1, nearest, 1.0)
        mutual = near * near.T  # (B, B), rows R(i)
        context = mutual * (mutual @ mutual.T) / mutual.sum(1, keepdim=True)
        context = context[nearest[:, : max(1, count // 2)]].mean(1)
        pairwise = torch.exp(-distance.fill_diagonal_(0.0).square() / sigma)
        return (pairwise + (context + context.T) / 2) / 2


def relaxed_contrastive_loss(embeddings: Tensor, similarity: Tensor, margin: float = MARGIN) -> Tensor:
    """Pull rows together as far as they are similar and push them apart as far as they are not.

    embeddings: (B, D), B > 1; similarity: (B, B) in [0, 1]. With d_ij the distance of two rows divided by the mean
    distance of row i to all rows, returns the mean over i != j of w d^2 + (1 - w) max(0, margin - d)^2, a scalar,
    float32 (float64 for float64 input). (The paper divides the sum by B; the mean keeps its size for all batches.)
    Raises ValueError for shapes that do not fit.
    """
    rows = len(embeddings)
    if embeddings.dim() != 2 or rows < 2 or similarity.shape != (rows, rows):
        raise ValueError(
            f"embeddings must be (B, D) of B > 1 rows with similarity (B, B), got {tuple(embeddings.shape)} and "
            f"{tuple(similarity.shape)}"
        )
    with torch.autocast(embeddings.device.type, enabled=False):
        distance = _relative_distances(embeddings)
        loss = similarity * distance.square() + (1 - similarity) * (margin - distance).clamp(min=0).square()
        return (loss - torch.diag(torch.diag(loss))).sum() / (rows * (rows - 1))


def self_distillation_loss(small: Tensor, large: Tensor) -> Tensor:
    """Have the small embedding rank the rows of a batch as the large one does.

    small: (B, D), large: (B, E), which gets no gradient. Of the softmax over j of -d_ij, with d_ij the distances of
    `relaxed_contrastive_loss`, i among the j: the Kullback-Leibler divergence of the small embedding's from the large
    one's, the mean over the rows i; a scalar, float32 (float64 for float64 input). Raises ValueError for embeddings of
    different numbers of rows.
    """
    if small.dim() != 2 or large.dim() != 2 or len(small) != len(large):
        raise ValueError(f"small and large must be (B, D) and (B, E), got {tuple(small.shape)} and "
                         f"{tuple(large.shape)}")  # fmt: skip
    with torch.autocast(small.device.type, enabled=False):
        given = F.log_softmax(-_relative_distances(large.detach()), dim=1)
        return F.kl_div(F.log_softmax(-_relative_distances(small), dim=1), given, reduction="batchmean",
                        log_target=True)  # fmt: skip


def _relative_distances(embeddings: Tensor) -> Tensor:
    """Distances (B, B) of rows, divided by the mean of those of row i to all rows."""
    x = as_float(embeddings)
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    return distance / distance.mean(1, keepdim=True).clamp(min=1e-12)


class ContextualStep(nn.Module):
    """The loss of a batch by the contextual similarity that a teacher sees in it.

    With a teacher that has a large embedding this is STML as published: the similarity is that of the teacher's large
    embedding at unit length, the network's embedding and a large one of its own follow it, neither at unit length, by
    half each, and the former learns from the latter (`self_distillation_loss`).

    What comes before the trained stages is computed once, for both.
    """

    own_rate = 1  # of the large embedding, by that of the network

    def __init__(
        self, model: Any, teacher: Teacher, weight: float = 1.0, processes: Processes = ALONE,
        large: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.teacher, self.weight, self.processes = model, teacher, weight, processes
        self.large = large

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Two views of images (2m, 3, H, W) -> "loss", with a gradient, "metric", and zeros for the other losses."""
        begun = self.model.begin_maps(inputs)
        with torch.no_grad():
            seen = self._pool(self.teacher.network, begun)
            target = contextual_similarity(self.teacher.embed(seen))
        pooled = self._pool(self.model, begun)
        if self.large is None:
            return metric_alone(relaxed_contrastive_loss(self.model.embed(pooled), target), self.weight)
        with torch.autocast(pooled.device.type, enabled=False):
            small, large = self.model.feat_ext(pooled), self.large(pooled)
        followed = relaxed_contrastive_loss(small, target) + relaxed_contrastive_loss(large, target)
        return metric_alone(followed / 2 + self_distillation_loss(small, large), self.weight)

    def _pool(self, network: Any, begun: tuple[Tensor, list[Tensor]]) -> Tensor:
        return self.processes.gather_views(network.pool(*network.end_maps(*begun)))  # (2m, C) of the whole batch


def large_embedding(channels: int, dim: int) -> nn.Linear:
    """A second embedding head of pooled features (B, channels), used in training alone; orthogonal at first."""
    head = nn.Linear(channels, dim)
    nn.init.orthogonal_(head.weight)
    nn.init.zeros_(head.bias)
    return head
