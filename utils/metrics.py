"""Retrieval and clustering metrics of an embedding: Recall@K and NMI (the paper, section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from utils.clustering import kmeans
from utils.search import as_matrix, first_hit_ranks


def _as_labels(labels: Tensor | np.ndarray | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Labels as int64 (N,) numbered 0 .. classes - 1; ValueError if they are not whole numbers in one row."""
    tensor = torch.as_tensor(labels)
    if tensor.ndim != 1:
        raise ValueError(f"labels must have the shape (N,), not {tuple(tensor.shape)}")
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex()):
        raise ValueError(f"labels must be integers, not {tensor.dtype}")
    return torch.unique(tensor.to(device), return_inverse=True)[1]


def _checked(embeddings: Tensor | np.ndarray, labels: Tensor | np.ndarray | Sequence[int]) -> tuple[Tensor, Tensor]:
    matrix = as_matrix(embeddings, "embeddings")
    numbered = _as_labels(labels, matrix.device)
    if len(matrix) != len(numbered):
        raise ValueError(f"{len(matrix)} embeddings but {len(numbered)} labels")
    if len(matrix) < 2:
        raise ValueError(f"at least 2 embeddings are needed, not {len(matrix)}")
    return matrix, numbered


def recall_at_k(
    embeddings: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | Sequence[int],
    ks: Sequence[int] = (1, 2, 4, 8),
    *,
    memory_mb: float = 512,
) -> dict[int, float]:
    """Recall@K: the share of images that have one of their class among their K nearest other images.

    embeddings (N, D) floating point, tensor on any device or array; labels (N,) any integers. Distances are
    Euclidean on the rows as they are: nothing is normalised here (for unit vectors the order is that of the cosine).
    Every image is a query, one that is alone in its class is a query without a hit. Of images at the same distance
    the one with the lower index is nearer; K beyond N - 1 means all others.
    Returns {K: share in [0, 1]}, equal to a search in float64; memory beside the embeddings: one or two float32 copies
    of them and at most memory_mb MiB.
    Raises ValueError for wrong shapes, different lengths, non-finite values, fewer than 2 images or a K below 1.
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"ks must be whole numbers from 1, not {tuple(ks)}")
    matrix, numbered = _checked(embeddings, labels)
    limit = min(max(ks), len(matrix))
    ranks = first_hit_ranks(matrix, numbered, limit, memory_mb=memory_mb)
    hits = torch.bincount(ranks, minlength=limit + 1)[:limit].cumsum(0).tolist()  # hits[r]: first hit at rank <= r
    return {int(k): hits[min(k, limit) - 1] / len(matrix) for k in ks}


def nmi(labels_a: Tensor | np.ndarray | Sequence[int], labels_b: Tensor | np.ndarray | Sequence[int]) -> float:
    """Normalised mutual information 2 I / (H + H) of two labellings (N,) of the same images, in float64.

    Equal to scikit-learn's `normalized_mutual_info_score` (arithmetic mean): 1 when both have at most one class,
    0 when one of them says nothing about the other. Raises ValueError for wrong shapes or different lengths.
    """
    a, b = _as_labels(labels_a), _as_labels(labels_b)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} labels against {len(b)}")
    sizes_a, sizes_b = torch.bincount(a), torch.bincount(b)
    if len(sizes_a) == len(sizes_b) == 1 or len(a) == 0:
        return 1.0
    cells, both = torch.unique(a * len(sizes_b) + b, return_counts=True)
    share = both.double() / len(a)
    expected = sizes_a[cells // len(sizes_b)].double() * sizes_b[cells % len(sizes_b)] / len(a) ** 2
    information = float((share * (share / expected).log()).sum())
    if information <= torch.finfo(torch.float64).eps:
        return 0.0
    return min(1.0, 2 * information / (_entropy(sizes_a) + _entropy(sizes_b)))


def _entropy(sizes: Tensor) -> float:
    """Entropy in nats of class sizes (C,), all above 0."""
    share = sizes.double() / sizes.sum()
    return float(-(share * share.log()).sum())


def clustering_nmi(
    embeddings: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | Sequence[int],
    seed: int = 0,
    n_init: int = 10,
    max_iter: int = 300,
    engine: str = "auto",
) -> float:
    """NMI of the labels and a k-means clustering of the embeddings into as many clusters as classes are present.

    embeddings (N, D), labels (N,) as for `recall_at_k`; n_init, max_iter, engine as for `clustering.kmeans`. The
    figure depends on that protocol: print `clustering.protocol(...)` with it. Raises ValueError as `recall_at_k`,
    and where the embeddings have fewer distinct rows than there are classes.
    """
    matrix, numbered = _checked(embeddings, labels)
    classes = int(numbered.max()) + 1
    assignments, _, _ = kmeans(matrix, classes, n_init=n_init, max_iter=max_iter, seed=seed, engine=engine)
    return nmi(numbered, assignments)
