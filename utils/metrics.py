"""Retrieval and clustering metrics of an embedding: Recall@K, NMI (the paper, section 4.1), MAP@R, R-precision, AMI."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.clustering import kmeans
from utils.search import as_matrix, first_hit_ranks, nearest_neighbors

Gallery = tuple[Tensor | np.ndarray, Tensor | np.ndarray | Sequence[int]]  # embeddings (G, D) and labels (G,)


def _whole_numbers(labels: Tensor | np.ndarray | Sequence[int]) -> Tensor:
    """Labels as a tensor (N,); ValueError if they are not whole numbers in one row."""
    tensor = torch.as_tensor(labels)
    if tensor.ndim != 1:
        raise ValueError(f"labels must have the shape (N,), not {tuple(tensor.shape)}")
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex()):
        raise ValueError(f"labels must be integers, not {tensor.dtype}")
    return tensor


def _as_labels(labels: Tensor | np.ndarray | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Labels as int64 (N,) numbered 0 .. classes - 1; raises as `_whole_numbers`."""
    return torch.unique(_whole_numbers(labels).to(device), return_inverse=True)[1]


def _checked(embeddings: Tensor | np.ndarray, labels: Tensor | np.ndarray | Sequence[int]) -> tuple[Tensor, Tensor]:
    matrix = as_matrix(embeddings, "embeddings")
    numbered = _as_labels(labels, matrix.device)
    if len(matrix) != len(numbered):
        raise ValueError(f"{len(matrix)} embeddings but {len(numbered)} labels")
    if len(matrix) < 2:
        raise ValueError(f"at least 2 embeddings are needed, not {len(matrix)}")
    return matrix, numbered


class _Search(NamedTuple):
    """Queries (Q, D) of labels (Q,), the rows (N, D) and labels (N,) searched; `alone`: they are the same images."""

    queries: Tensor
    query_labels: Tensor
    rows: Tensor
    labels: Tensor
    alone: bool

    @property
    def options(self) -> dict:
        """The queries as `utils.search` takes them."""
        return {} if self.alone else {"queries": self.queries}


def _checked_search(embeddings, labels, gallery: Gallery | None) -> _Search:
    """The arguments of a score, checked, the labels of both sides numbered alike."""
    if gallery is None:
        matrix, numbered = _checked(embeddings, labels)
        return _Search(matrix, numbered, matrix, numbered, True)
    queries, rows = as_matrix(embeddings, "embeddings"), as_matrix(gallery[0], "gallery embeddings")
    sides = [_whole_numbers(side).to(rows.device) for side in (labels, gallery[1])]
    for name, matrix, side in (("", queries, sides[0]), ("gallery ", rows, sides[1])):
        if len(matrix) != len(side):
            raise ValueError(f"{len(matrix)} {name}embeddings but {len(side)} {name}labels")
        if len(matrix) == 0:
            raise ValueError(f"at least 1 {name or 'query '}embedding is needed, not 0")
    if queries.shape[1] != rows.shape[1]:
        raise ValueError(f"embeddings have {queries.shape[1]} columns, those of the gallery {rows.shape[1]}")
    numbered = torch.unique(torch.cat(sides), return_inverse=True)[1].split([len(queries), len(rows)])
    return _Search(queries.to(rows.device), numbered[0], rows, numbered[1], False)


def recall_at_k(
    embeddings: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | Sequence[int],
    ks: Sequence[int] = (1, 2, 4, 8),
    *,
    gallery: Gallery | None = None,
    memory_mb: float = 512,
) -> dict[int, float]:
    """Recall@K: the share of images that have one of their class among their K nearest other images.

    embeddings (N, D) floating point, tensor on any device or array; labels (N,) any integers; with a gallery, its
    embeddings (G, D) and labels (G,), the images search that alone and not each other. Distances are
    Euclidean on the rows as they are: nothing is normalised here (for unit vectors the order is that of the cosine).
    Every image is a query, one that is alone in its class (has none of it in the gallery) is a query without a hit. Of
    images at the same distance the one with the lower index is nearer; K beyond N - 1 means all others, K beyond G the
    whole gallery.
    Returns {K: share in [0, 1]}, equal to a search in float64; memory beside the embeddings: one or two float32 copies
    of them and at most memory_mb MiB.
    Raises ValueError for wrong shapes, different lengths, non-finite values, fewer than 2 images (1 with a gallery, and
    1 in it) or a K below 1.
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"ks must be whole numbers from 1, not {tuple(ks)}")
    given = _checked_search(embeddings, labels, gallery)
    limit = min(max(ks), len(given.rows))
    options = {} if given.alone else {**given.options, "query_labels": given.query_labels}
    ranks = first_hit_ranks(given.rows, given.labels, limit, memory_mb=memory_mb, **options)
    hits = torch.bincount(ranks, minlength=limit + 1)[:limit].cumsum(0).tolist()  # hits[r]: first hit at rank <= r
    return {int(k): hits[min(k, limit) - 1] / len(given.queries) for k in ks}


def precision_at_r(
    embeddings: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | Sequence[int],
    *,
    gallery: Gallery | None = None,
    memory_mb: float = 512,
) -> dict[str, float]:
    """R-precision and MAP@R: of the R nearest other images those of the query's class, R being all that could be.

    embeddings (N, D), labels (N,) and gallery as for `recall_at_k`; of images whose distances float32 cannot tell apart
    any may count as the R-th. For a query with R other images of its class (R of it in the gallery), R-precision is
    the share of its class among the R nearest; MAP@R is 1/R times the sum of the precision at i over those i <= R whose
    i-th nearest is of the class, so that it asks for the right order as well (Musgrave, Belongie and Lim, "A metric
    learning reality check", 2020). Both are means over the queries with R >= 1: an image that is alone in its class
    (has none of it in the gallery) is no query.
    Returns {"r_precision": .., "map@r": ..}, shares in [0, 1]; memory: N times the largest R indices and distances, and
    what `recall_at_k` takes. Raises ValueError as `recall_at_k`, and where no query has an R of 1 or more.
    """
    given = _checked_search(embeddings, labels, gallery)
    classes = int(torch.maximum(given.labels.max(), given.query_labels.max())) + 1
    wanted = torch.bincount(given.labels, minlength=classes)[given.query_labels] - int(given.alone)  # R of each, (N,)
    most = int(wanted.max())
    if most < 1:
        found = "is alone in its class" if given.alone else "has a class that the gallery lacks"
        raise ValueError(f"every image {found}: there is nothing to find")
    _, found = nearest_neighbors(given.rows, most, memory_mb=memory_mb, **given.options)
    place = torch.arange(1, most + 1, device=found.device)
    hits = (given.labels[found] == given.query_labels[:, None]) & (place <= wanted[:, None])  # (N, R)
    hits, wanted = hits[wanted > 0], wanted[wanted > 0].double()
    precision = hits.cumsum(1).double() / place
    return {
        "r_precision": float((hits.sum(1) / wanted).mean()),
        "map@r": float(((precision * hits).sum(1) / wanted).mean()),
    }


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
    """NMI of the labels and a k-means clustering of the embeddings: the first score of `clustering_scores`."""
    return clustering_scores(embeddings, labels, seed, n_init, max_iter, engine)["nmi"]


def clustering_scores(
    embeddings: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | Sequence[int],
    seed: int = 0,
    n_init: int = 10,
    max_iter: int = 300,
    engine: str = "auto",
    adjusted: bool = False,
) -> dict[str, float]:
    """NMI, and if asked for AMI, of the labels and a k-means clustering into as many clusters as classes are present.

    embeddings (N, D), labels (N,) as for `recall_at_k`; n_init, max_iter, engine as for `clustering.kmeans`. The
    figures depend on that protocol: print `clustering.protocol(...)` with them. `adjusted` adds "ami", scikit-learn's
    `adjusted_mutual_info_score` (Vinh, Epps and Bailey, 2010): 0 for clusters by chance, whatever their number, where
    NMI grows with it. Returns {"nmi": .., "ami": ..}. Raises ValueError as `recall_at_k`, and where the embeddings have
    fewer distinct rows than there are classes.
    """
    matrix, numbered = _checked(embeddings, labels)
    classes = int(numbered.max()) + 1
    assignments, _, _ = kmeans(matrix, classes, n_init=n_init, max_iter=max_iter, seed=seed, engine=engine)
    scores = {"nmi": nmi(numbered, assignments)}
    if adjusted:
        from sklearn.metrics import adjusted_mutual_info_score

        scores["ami"] = float(adjusted_mutual_info_score(numbered.cpu().numpy(), assignments.cpu().numpy()))
    return scores
