"""STML: contextual similarity, the relaxed contrastive loss that follows it, self-distillation.

Source: Kim et al., "Self-taught metric learning without labels", CVPR 2022, and the code that its
authors published.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from utils.tensors import as_float


def contextual_similarity(
    embeddings: Tensor, images: Tensor, n_neighbors: int = 10, sigma: float = 3.0
) -> Tensor:
    """Compute the similarity of the rows of a batch, by their distance and shared neighbors.

    The result is the mean of two similarities. The first is exp(-d^2 / sigma) of the distance d.
    The second compares neighborhoods: R(i) holds the rows j that are among the nearest of i while
    i is among the nearest of j; C_ij = |R(i) and R(j)| / |R(i)| for j in R(i), else 0, averaged
    over the nearer half of the neighbors of i, and over (i, j) and (j, i).

    Args:
        embeddings: (B, D) of unit length.
        images: (B,) the image of each row. Rows of one image are the nearest to each other.
        n_neighbors: how many rows are the nearest, the row itself among them.

    Returns (B, B), symmetric, in [0, 1], float32 (float64 for float64 input).
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        x = as_float(embeddings)
        distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        pairwise = torch.exp(-distances.square() / sigma)
        same_image = images[:, None] == images
        count = min(n_neighbors, len(x))
        nearest = pairwise.masked_fill(same_image, 1.0).topk(count).indices  # (B, k)
        near = torch.zeros_like(pairwise).scatter_(1, nearest, 1.0)
        mutual = near * near.T  # (B, B), row i is R(i)
        overlap = mutual * (mutual @ mutual.T) / mutual.sum(1, keepdim=True).clamp(min=1)
        context = overlap[nearest[:, : max(1, round(count / 2))]].mean(1)
        return (pairwise + (context + context.T) / 2) / 2


def relaxed_contrastive_loss(embeddings: Tensor, similarity: Tensor, margin: float = 1.0) -> Tensor:
    """Pull rows together as far as they are similar, and push them apart as far as they are not.

    With d_ij the distance of two rows divided by the mean distance of row i to all rows, the loss
    is the mean over i != j of w_ij d_ij^2 + (1 - w_ij) max(0, margin - d_ij)^2. (The paper divides
    the sum by B; the mean, as in its code, does not grow with B.)

    Args:
        embeddings: (B, D), B > 1.
        similarity: w, (B, B) in [0, 1].

    Returns a scalar, float32 (float64 for float64 input). Raises ValueError for shapes that do not
    fit.
    """
    n_rows = len(embeddings)
    if embeddings.dim() != 2 or n_rows < 2 or similarity.shape != (n_rows, n_rows):
        raise ValueError(
            "embeddings must be (B, D), B > 1, with similarity (B, B), got "
            f"{tuple(embeddings.shape)} and {tuple(similarity.shape)}"
        )
    with torch.autocast(embeddings.device.type, enabled=False):
        distances = _relative_distances(embeddings)
        pull = similarity * distances.square()
        push = (1 - similarity) * (margin - distances).clamp(min=0).square()
        loss = pull + push
        return (loss.sum() - loss.diagonal().sum()) / (n_rows * (n_rows - 1))


def self_distillation_loss(small: Tensor, large: Tensor) -> Tensor:
    """Have a small embedding rank the rows of a batch as a large one does.

    The loss is the Kullback-Leibler divergence of softmax(-d_ij) over j, from that of the large
    embedding to that of the small one, averaged over i; d_ij as in `relaxed_contrastive_loss`.

    Args:
        small: (B, D).
        large: (B, E); it gets no gradient.

    Returns a scalar, float32 (float64 for float64 input). Raises ValueError for shapes that do not
    fit.
    """
    if small.dim() != 2 or large.dim() != 2 or len(small) != len(large):
        raise ValueError(
            f"small and large must be (B, D) and (B, E), got {tuple(small.shape)} and "
            f"{tuple(large.shape)}"
        )
    with torch.autocast(small.device.type, enabled=False):
        target = F.log_softmax(-_relative_distances(large.detach()), dim=1)
        log_p = F.log_softmax(-_relative_distances(small), dim=1)
        return F.kl_div(log_p, target, reduction="batchmean", log_target=True)


def _relative_distances(embeddings: Tensor) -> Tensor:
    """Return distances (B, B), each row divided by its mean."""
    x = as_float(embeddings)
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    return distances / distances.mean(1, keepdim=True).clamp(min=1e-12)
