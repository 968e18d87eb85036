"""k-means: good starts, Lloyd iterations by blocks, no empty cluster, the same result for the same seed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from utils.search import as_matrix, frame_of, framed, full_float32, nearest_neighbors, squared_distances

ENGINES = ("auto", "torch", "faiss", "sklearn")
CPU_BLOCK = 1 << 20  # scores per block of rows: they stay in the cache of the cores
GPU_BLOCK = 1 << 26
GREEDY_UP_TO = 512  # clusters; more are seeded in rounds, as a pass over the data per centroid would cost too much
SEEDING_ROUNDS = 64


def has_faiss() -> bool:
    """Whether faiss can be imported here."""
    try:
        import faiss  # noqa: F401
    except ImportError:
        return False
    return True


def pick_engine(n: int, d: int, k: int, device: torch.device | str = "cpu") -> str:
    """The engine that "auto" stands for, for n rows of d columns and k clusters on a device.

    Always "torch" so far: faiss starts from random rows and ended at a higher inertia, though sooner, with 10 starts of
    50 iterations on the CPU (`benchmarks/kmeans.py` compares them). On a GPU the two have not been compared.
    """
    return "torch"


def protocol(n_init: int, max_iter: int, engine: str) -> str:
    """One line that says what `kmeans` does with these settings, to be printed beside every NMI.

    engine is "torch", "faiss" or "sklearn": for "auto" ask `pick_engine` first.
    """
    if engine not in ENGINES[1:]:
        raise ValueError(f"engine must be one of {', '.join(ENGINES[1:])}, not {engine!r}")
    if engine == "sklearn":
        return f"k-means++, best of {n_init} start(s) x <={max_iter} iterations, scikit-learn"
    if engine == "faiss":
        return f"k-means, best of {n_init} random start(s) x {max_iter} iterations, faiss engine"
    return f"k-means++, best of {n_init} start(s) x <={max_iter} iterations, torch engine"


def cluster_sizes(assignments: Tensor | np.ndarray, k: int) -> Tensor:
    """Number of rows in each of k clusters, (k,) int64, from assignments (N,); ValueError for one outside 0 .. k-1."""
    clusters = torch.as_tensor(assignments)
    if clusters.numel() and not (int(clusters.min()) >= 0 and int(clusters.max()) < k):
        raise ValueError(f"assignments must lie in 0 .. {k - 1}, found {int(clusters.min())} .. {int(clusters.max())}")
    return torch.bincount(clusters, minlength=k)


def kmeans(
    features: Tensor | np.ndarray,
    k: int,
    *,
    n_init: int = 1,
    max_iter: int = 300,
    seed: int = 0,
    engine: str = "auto",
    tol: float = 1e-4,
) -> tuple[Tensor, Tensor, float] | tuple[np.ndarray, np.ndarray, float]:
    """Cluster rows into k non-empty clusters of small squared distance to their centroids.

    features (N, D) floating point. The torch engine makes n_init independent k-means++ starts and keeps the best;
    of each, Lloyd iterations run until no row changes its cluster, for max_iter iterations, or until the squared
    movement of all centroids together is at most tol times the mean variance of the columns, as in scikit-learn. The
    faiss engine makes n_init random starts of max_iter iterations.
    The sklearn engine is scikit-learn's KMeans, n_init independent k-means++ starts on the CPU.
    Returns assignments (N,) int64, centroids (k, D) float32 and the inertia (sum of squared distances to the
    centroids, in float64): tensors on the features' device, or arrays for an array. Each row is assigned to its
    nearest centroid, at equal distance to the one of lower index.
    Raises ValueError for a wrong shape, non-finite values, k outside 1 .. N, fewer than k distinct rows, an unknown
    engine, or settings below 1; ImportError for engine "faiss" where faiss is not installed.
    """
    matrix = as_matrix(features)
    _check(matrix, k, n_init, max_iter, engine)
    if engine == "auto":
        engine = pick_engine(len(matrix), matrix.shape[1], k, matrix.device)
    if engine == "faiss":
        centroids = _faiss_centroids(matrix, k, n_init, max_iter, seed)
    elif engine == "sklearn":
        centroids = _sklearn_centroids(matrix, k, n_init, max_iter, seed, tol)
    else:
        centre, scale = frame_of(matrix)
        with full_float32():
            found = _best_run(_Rows(framed(matrix, (centre, scale))), k, n_init, max_iter, seed, tol)
        centroids = (found.double() / scale + centre).float()
    assignments, centroids = _settle(matrix, centroids)
    inertia = float(
        squared_distances(matrix, centroids, (torch.arange(len(matrix), device=matrix.device), assignments)).sum()
    )
    if isinstance(features, np.ndarray):
        return assignments.numpy(), centroids.numpy(), inertia
    return assignments, centroids, inertia


def _check(matrix: Tensor, k: int, n_init: int, max_iter: int, engine: str) -> None:
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, not {engine!r}")
    if not 1 <= k <= len(matrix):
        raise ValueError(f"k must lie in 1 .. {len(matrix)} (the number of rows), not {k}")
    if n_init < 1 or max_iter < 1:
        raise ValueError(f"n_init and max_iter must be at least 1, not {n_init} and {max_iter}")


class _Rows:
    """The rows (N, D) float32 in the forms that the iterations need."""

    def __init__(self, rows: Tensor) -> None:
        self.plain = rows
        self.norms = rows.square().sum(1)
        self.noise = self.norms * ((rows.shape[1] + 8) * 2.0**-22)  # bound for a distance near 0, (N,)
        self.block = CPU_BLOCK if rows.device.type == "cpu" else GPU_BLOCK

    def nearest(self, centroids: Tensor) -> tuple[Tensor, Tensor]:
        """Cluster (N,) int64 of the nearest centroid and squared distance (N,) float32, in float32 arithmetic."""
        parts = [scores.max(1) for scores in self._scores(centroids)]
        best, clusters = (torch.cat(column) for column in zip(*parts, strict=True))
        return clusters, (self.norms - 2 * best).clamp_(min=0)

    def _scores(self, centroids: Tensor) -> Iterator[Tensor]:
        """Blocks (B, k) of x.c - |c|^2 / 2: the larger, the nearer."""
        bias = centroids.square().sum(1).mul(-0.5)
        for block in self.plain.split(max(1, self.block // len(centroids))):
            yield torch.addmm(bias, block, centroids.T)

    def means(self, clusters: Tensor, k: int) -> Tensor:
        """Mean row (k, D) of each cluster, none of them empty."""
        sizes = torch.bincount(clusters, minlength=k)[:, None]
        return _add_rows(self.plain.new_zeros(k, self.plain.shape[1]), clusters, self.plain).div_(sizes)


def _add_rows(sums: Tensor, clusters: Tensor, rows: Tensor) -> Tensor:
    """sums[clusters[i]] += rows[i], in a fixed order on every device, so that a seed gives one result."""
    if rows.device.type == "cpu":
        return sums.index_add_(0, clusters, rows)
    order = torch.argsort(clusters, stable=True)
    sizes = torch.bincount(clusters, minlength=len(sums))
    return sums.add_(torch.nn.functional.embedding_bag(order, rows, sizes.cumsum(0) - sizes, mode="sum"))


@dataclass
class _State:
    """Centroids (k, D), the cluster (N,) of each row under them, squared distances (N,) to them, and their sum."""

    centroids: Tensor
    clusters: Tensor
    distances: Tensor
    inertia: float

    @classmethod
    def under(cls, rows: _Rows, centroids: Tensor) -> _State:
        clusters, distances = rows.nearest(centroids)
        return cls(centroids, clusters, distances, float(distances.sum(dtype=torch.float64)))


def _best_run(rows: _Rows, k: int, n_init: int, max_iter: int, seed: int, tol: float) -> Tensor:
    """Centroids (k, D) of the best of n_init independent runs, each a k-means++ start and Lloyd iterations."""
    generator = torch.Generator().manual_seed(seed)
    limit = tol * float(rows.plain.var(0, correction=0).mean())
    best: _State | None = None
    for _ in range(n_init):
        state = _lloyd(rows, _State.under(rows, _plus_plus(rows, k, generator)), max_iter, limit)
        if best is None or state.inertia < best.inertia:
            best = state
    return best.centroids


def _lloyd(rows: _Rows, state: _State, iterations: int, limit: float) -> _State:
    """Lloyd iterations until no row changes its cluster or the centroids move by at most `limit` (squared)."""
    for _ in range(iterations):
        after = _State.under(rows, _moved(rows, state))
        moved = float((after.centroids - state.centroids).square().sum(dtype=torch.float64))
        settled = moved <= limit or torch.equal(after.clusters, state.clusters)
        state = after
        if settled:
            break
    return state


def _moved(rows: _Rows, state: _State) -> Tensor:
    """The centroids (k, D) of a state's clusters."""
    k = len(state.centroids)
    return rows.means(_without_empty(state.clusters, state.distances, k), k)


def _without_empty(clusters: Tensor, distances: Tensor, k: int) -> Tensor:
    """The clusters (N,) with every empty one given the row farthest from its centroid, but no cluster's only row."""
    counts = torch.bincount(clusters, minlength=k)
    empty = (counts == 0).nonzero().flatten().tolist()
    if not empty:
        return clusters
    clusters, sizes = clusters.clone(), counts.tolist()
    for row in torch.argsort(distances, descending=True, stable=True).tolist():
        if not empty:
            break
        before = int(clusters[row])
        if sizes[before] > 1:
            sizes[before] -= 1
            clusters[row] = empty.pop()
    return clusters


def _draw(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Up to `count` different indices, drawn with probability proportional to the weights (N,), never one of weight 0.

    The indices with the largest weight / exponential variate are such a draw (Efraimidis and Spirakis, 2006).
    """
    weights = weights.double().cpu()
    keys = weights / torch.empty_like(weights).exponential_(generator=generator)
    best = keys.topk(min(count, len(keys)))
    return best.indices[best.values > 0].to(weights.device)


def _plus_plus(rows: _Rows, k: int, generator: torch.Generator) -> Tensor:
    """k rows (k, D), drawn with probability proportional to the squared distance to those drawn before.

    Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding" (2007). Up to GREEDY_UP_TO clusters it is
    their greedy variant, as in scikit-learn: of 2 + log k rows drawn, the one that lowers the inertia most is kept.
    """
    device = rows.plain.device
    chosen = torch.randint(len(rows.plain), (1,), generator=generator).to(device)
    fresh, distances = chosen, torch.full_like(rows.norms, torch.inf)
    while len(chosen) < k:
        distances = torch.minimum(distances, rows.nearest(rows.plain[fresh])[1])
        distances[distances <= rows.noise] = 0
        wanted = 1 if k <= GREEDY_UP_TO else min(-(-k // SEEDING_ROUNDS), k - len(chosen))
        drawn = _draw(distances, 2 + int(math.log(k)) if k <= GREEDY_UP_TO else wanted, generator).to(device)
        if len(drawn) < wanted:
            return _distinct(rows.plain, k, generator)
        fresh = _most_useful(rows, distances, drawn) if k <= GREEDY_UP_TO else drawn
        chosen = torch.cat([chosen, fresh])
    return rows.plain[chosen]


def _most_useful(rows: _Rows, distances: Tensor, drawn: Tensor) -> Tensor:
    """The one (1,) of the rows `drawn` (T,) that leaves the least sum of squared distances (N,) if it is added."""
    candidates = rows.plain[drawn]
    to_each = rows.norms[:, None] + rows.norms[drawn] - 2 * rows.plain @ candidates.T  # (N, T)
    left = torch.minimum(to_each.clamp_(min=0), distances[:, None]).sum(0)
    return drawn[left.argmin()].view(1)


def _distinct(rows: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k distinct rows where float32 distances can no longer tell rows apart; ValueError if there are fewer."""
    distinct = torch.unique(rows, dim=0)
    if len(distinct) < k:
        raise ValueError(f"only {len(distinct)} of the {len(rows)} rows are distinct: too few for {k} clusters")
    return distinct[torch.randperm(len(distinct), generator=generator)[:k].to(rows.device)]


def _settle(matrix: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Assign each row (N,) to its nearest centroid (k, D); centroids without a row move to rows far from theirs."""
    for _ in range(len(centroids) + 1):
        distances, clusters = (found.flatten() for found in nearest_neighbors(centroids, queries=matrix))
        repaired = _without_empty(clusters, distances, len(centroids))
        moved = (repaired != clusters).nonzero().flatten()
        if len(moved) == 0:
            return clusters, centroids
        centroids = centroids.clone()
        centroids[repaired[moved]] = matrix[moved].float()
    return repaired, centroids


def _sklearn_centroids(matrix: Tensor, k: int, n_init: int, max_iter: int, seed: int, tol: float) -> Tensor:
    """Centroids (k, D) by scikit-learn, on the CPU."""
    from sklearn.cluster import KMeans

    run = KMeans(k, n_init=n_init, max_iter=max_iter, random_state=seed, tol=tol).fit(matrix.float().cpu().numpy())
    return torch.from_numpy(run.cluster_centers_).float().to(matrix.device)


def _faiss_centroids(matrix: Tensor, k: int, n_init: int, max_iter: int, seed: int) -> Tensor:
    """Centroids (k, D) by faiss, on all rows, on the GPU where torch and faiss both have one."""
    import faiss

    clustering = faiss.Kmeans(
        matrix.shape[1],
        k,
        niter=max_iter,
        nredo=n_init,
        seed=seed % 2**31,  # a C int
        min_points_per_centroid=1,
        max_points_per_centroid=len(matrix),
        gpu=torch.cuda.is_available() and hasattr(faiss, "StandardGpuResources"),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clustering.train(np.ascontiguousarray(matrix.float().cpu().numpy()))
    return torch.from_numpy(clustering.centroids).to(matrix.device)
