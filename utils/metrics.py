"""Scores of an embedding: Recall@K and NMI (paper, section 4.1), MAP@R, R-precision, AMI."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
from torch import Tensor

from utils.clustering import kmeans
from utils.retrieval import as_matrix, neighbor_blocks

TIE = 1e-5  # difference of cosines that rounding may make
Labels = Tensor | np.ndarray | Sequence
Gallery = tuple[Tensor | np.ndarray, Labels]  # embeddings (G, D) and labels (G,)


class _Search:
    """Queries and the rows that they search, with the labels of both sides numbered alike."""

    def __init__(
        self, embeddings: Tensor | np.ndarray, labels: Labels, gallery: Gallery | None
    ) -> None:
        self.queries = as_matrix(embeddings)
        self.rows = self.queries if gallery is None else as_matrix(gallery[0])
        self.excludes_query = gallery is None
        sides = [_as_labels(labels, len(self.queries))]
        if gallery is not None:
            sides.append(_as_labels(gallery[1], len(self.rows)))
        numbers = np.unique(np.concatenate(sides), return_inverse=True)[1]
        numbers = torch.from_numpy(numbers).to(self.queries.device)
        self.query_labels = numbers[: len(self.queries)]
        self.labels = numbers[-len(self.rows) :]
        self.most = len(self.rows) - self.excludes_query
        """Rows that a query can find."""
        if self.most < 1:
            raise ValueError("there is nothing to search: at least 2 embeddings are needed")

    def hits(self, k: int, memory_mb: float) -> Iterator[tuple[slice, Tensor]]:
        """Yield some queries after the others, with bool (B, k): whether the j-th nearest row has
        the label of the query.
        """
        queries = None if self.excludes_query else self.queries
        start = 0
        for _, nearest in neighbor_blocks(self.rows, k, queries=queries, memory_mb=memory_mb):
            block = slice(start, start + len(nearest))
            start = block.stop
            yield block, self.labels[nearest] == self.query_labels[block, None]


def _as_labels(labels: Labels, count: int) -> np.ndarray:
    array = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if array.shape != (count,):
        raise ValueError(f"expected {count} labels, got the shape {array.shape}")
    return array


def mean_log_rank(first: Tensor, second: Tensor) -> float:
    """Return the mean logarithm of the ranks at which rows find their partners; 0 if all are first.

    Of rows that are equally similar the partner comes last.

    Args:
        first: (N, D) of unit length.
        second: (N, D) of unit length, the partners in the same order. Rows of each side search all
            rows of the other, and the ranks of both directions count.
    """
    similarity = first @ second.T
    of_partner = similarity.diagonal() - TIE
    ranks = [(s >= of_partner[:, None]).sum(1) for s in (similarity, similarity.T)]
    return float(torch.cat(ranks).double().log().mean())


def recall_at_k(
    embeddings: Tensor | np.ndarray,
    labels: Labels,
    ks: Sequence[int] = (1, 2, 4, 8),
    *,
    gallery: Gallery | None = None,
    memory_mb: float = 512,
) -> dict[int, float]:
    """Recall@K: the share of queries with at least one of their K nearest rows in the same class.

    Every image is a query, also one that is alone in its class (it cannot hit).

    Args:
        embeddings: (N, D), compared by Euclidean distance as they are; nothing is normalized here.
        labels: (N,), numbers or texts.
        gallery: embeddings (G, D) and labels (G,) that are searched instead of all other images.
        ks: the K; one larger than the number of rows means all rows.
        memory_mb: bound on the memory beside the embeddings, in MiB.

    Returns {K: share in [0, 1]}. Raises ValueError for shapes that do not fit and values that are
    not finite.
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"the K of Recall@K are whole numbers of at least 1, not {ks}")
    search = _Search(embeddings, labels, gallery)
    n_hits = dict.fromkeys(ks, 0)
    for _, hits in search.hits(min(max(ks), search.most), memory_mb):
        for k in n_hits:
            n_hits[k] += int(hits[:, :k].any(1).sum())
    return {k: count / len(search.queries) for k, count in n_hits.items()}


def precision_at_r(
    embeddings: Tensor | np.ndarray,
    labels: Labels,
    *,
    gallery: Gallery | None = None,
    memory_mb: float = 512,
) -> dict[str, float]:
    """R-precision and MAP@R, with R the number of rows of the query's class that it can find.

    R-precision is the share of the R nearest rows that are of the class; MAP@R is the mean, over
    the R ranks, of the precision at the ranks that hit (Musgrave, Belongie and Lim, "A metric
    learning reality check", 2020). Queries with R = 0 do not count.

    Args and errors are those of `recall_at_k`. Returns {"r_precision": .., "map@r": ..}, shares in
    [0, 1].
    """
    search = _Search(embeddings, labels, gallery)
    n_classes = int(torch.cat([search.labels, search.query_labels]).max()) + 1
    sizes = torch.bincount(search.labels, minlength=n_classes)
    r = sizes[search.query_labels] - int(search.excludes_query)  # (Q,)
    if int(r.max()) < 1:
        raise ValueError("no query has an image of its class to find")
    ranks = torch.arange(1, int(r.max()) + 1, device=r.device)
    shares = torch.zeros(2, len(r), dtype=torch.float64, device=r.device)
    for block, hits in search.hits(len(ranks), memory_mb):
        hits &= ranks <= r[block, None]
        precision = hits.cumsum(1).double() / ranks
        shares[:, block] = torch.stack([hits.sum(1), (precision * hits).sum(1)]) / r[block]
    r_precision, map_at_r = shares[:, r > 0].mean(1).tolist()
    return {"r_precision": r_precision, "map@r": map_at_r}


def clustering_scores(
    embeddings: Tensor | np.ndarray,
    labels: Labels,
    seed: int = 0,
    n_init: int = 10,
    max_iter: int = 300,
    engine: str = "auto",
) -> dict[str, float]:
    """NMI and AMI of the labels and a k-means clustering into as many clusters as there are
    classes.

    NMI is 2 I / (H + H). AMI is adjusted for chance (Vinh, Epps and Bailey, 2010): 0 for random
    clusters. Both depend on how k-means is run (`utils.clustering.kmeans`), so print that beside
    them.

    Returns {"nmi": .., "ami": ..}. Raises ValueError as `kmeans`.
    """
    array = _as_labels(labels, len(embeddings))
    n_classes = len(np.unique(array))
    assignments = kmeans(
        embeddings, n_classes, n_init=n_init, max_iter=max_iter, seed=seed, engine=engine
    )[0]
    clusters = torch.as_tensor(assignments).cpu().numpy()
    return {
        "nmi": float(normalized_mutual_info_score(array, clusters)),
        "ami": float(adjusted_mutual_info_score(array, clusters)),
    }


def clustering_nmi(
    embeddings: Tensor | np.ndarray,
    labels: Labels,
    seed: int = 0,
    n_init: int = 10,
    max_iter: int = 300,
    engine: str = "auto",
) -> float:
    """Return the NMI of `clustering_scores`."""
    return clustering_scores(embeddings, labels, seed, n_init, max_iter, engine)["nmi"]
