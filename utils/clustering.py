"""k-means: many starts, Lloyd iterations by blocks, no empty cluster, the same result for the same seed."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from utils.search import as_matrix, block_rows, conditioned, nearest_neighbors, squared_distances, with_norms, with_ones

ENGINES = ("auto", "torch", "faiss")
MEMORY_MB = 512
SHORT_ITERATIONS = 6  # of every start, before the best ones go on
FINALISTS = 2  # starts that go on to convergence
ROUNDS = 256  # k-means++ draws its k centres in at most so many rounds


def pick_engine(n: int, d: int, k: int, device: torch.device | str = "cpu") -> str:
    """The engine that "auto" stands for, for n rows of d columns and k clusters on a device: "torch" or "faiss"."""
    return "torch"


def protocol(n_init: int, max_iter: int, engine: str) -> str:
    """One line that says what `kmeans` does with these settings, to be printed beside every NMI."""
    if engine == "faiss":
        return f"k-means, {n_init} random start(s) of {max_iter} iterations each, faiss engine"
    if n_init <= FINALISTS:
        return f"k-means++ x{n_init}, each to convergence, <={max_iter} iterations, {engine} engine"
    return (
        f"k-means++ x{n_init} restarts ({SHORT_ITERATIONS} iterations each, best {FINALISTS} to convergence), "
        f"<={max_iter} iterations, {engine} engine"
    )


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

    features (N, D) floating point; n_init starts, of which the best counts (`protocol` says how far each is run);
    a run ends when no row changes its cluster, after max_iter iterations, or (torch engine) when the squared
    movement of all centroids together is at most tol times the mean variance of the columns, as in scikit-learn.
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
    else:
        rows, scale = conditioned(matrix)
        found = _best_run(_Rows(rows), k, n_init, max_iter, seed, tol)
        centroids = (found.double() / scale + matrix.mean(0, dtype=torch.float64)).float()
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
        self.left = with_ones(rows)
        self.norms = rows.square().sum(1)

    def nearest(self, centroids: Tensor) -> tuple[Tensor, Tensor]:
        """Cluster (N,) int64 of the nearest centroid and squared distance (N,) float32, in float32 arithmetic."""
        right = with_norms(centroids)
        step = block_rows(len(centroids), MEMORY_MB, right.device)
        parts = [(block @ right.T).max(1) for block in self.left.split(step)]
        best, clusters = (torch.cat(column) for column in zip(*parts, strict=True))
        return clusters, (self.norms - 2 * best).clamp_(min=0)


@dataclass
class _Run:
    """One start and how far it has come."""

    centroids: Tensor  # (k, D)
    clusters: Tensor | None = None  # (N,)
    inertia: float = float("inf")  # of the clusters above and the centroids that they were found with
    iterations: int = 0
    done: bool = False


def _best_run(rows: _Rows, k: int, n_init: int, max_iter: int, seed: int, tol: float) -> Tensor:
    """Centroids (k, D) of the best of n_init starts; with many starts only the most promising go all the way."""
    generator = torch.Generator().manual_seed(seed)
    limit = tol * float(rows.plain.var(0, correction=0).mean())
    runs = [_Run(_plus_plus(rows, k, generator)) for _ in range(n_init)]
    if n_init > FINALISTS:
        for run in runs:
            _lloyd(rows, run, min(max_iter, SHORT_ITERATIONS), limit)
        runs = sorted(runs, key=lambda run: run.inertia)[:FINALISTS]
    for run in runs:
        _lloyd(rows, run, max_iter, limit)
    return min(runs, key=lambda run: run.inertia).centroids


def _lloyd(rows: _Rows, run: _Run, max_iter: int, limit: float) -> None:
    """Continue a run until nothing changes, its centroids move by at most `limit`, or max_iter iterations in all."""
    while not run.done and run.iterations < max_iter:
        clusters, distances = rows.nearest(run.centroids)
        run.inertia = float(distances.sum(dtype=torch.float64))
        run.iterations += 1
        if run.clusters is not None and torch.equal(clusters, run.clusters):
            run.done = True
            return
        run.clusters = clusters
        centroids = _means(rows.plain, _without_empty(clusters, distances, len(run.centroids)), len(run.centroids))
        run.done = float((centroids - run.centroids).square().sum(dtype=torch.float64)) <= limit
        run.centroids = centroids


def _means(rows: Tensor, clusters: Tensor, k: int) -> Tensor:
    """Mean row (k, D) of each cluster, none of them empty; the order of summation is fixed on every device."""
    order = torch.argsort(clusters, stable=True)
    sizes = torch.bincount(clusters, minlength=k)
    return torch.nn.functional.embedding_bag(order, rows, sizes.cumsum(0) - sizes, mode="mean")


def _without_empty(clusters: Tensor, distances: Tensor, k: int) -> Tensor:
    """The clusters (N,) with every empty one given the row farthest from its centroid, but no cluster's only row."""
    sizes = torch.bincount(clusters, minlength=k)
    empty = (sizes == 0).nonzero().flatten().tolist()
    if not empty:
        return clusters
    clusters = clusters.clone()
    sizes = sizes.tolist()
    for row in torch.argsort(distances, descending=True, stable=True).tolist():
        if not empty:
            break
        if sizes[int(clusters[row])] > 1:
            sizes[int(clusters[row])] -= 1
            clusters[row] = empty.pop()
    return clusters


def _plus_plus(rows: _Rows, k: int, generator: torch.Generator) -> Tensor:
    """k rows (k, D), drawn with probability proportional to the squared distance to those drawn before.

    Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding" (2007); a large k is drawn in ROUNDS
    rounds of several rows each, as one row at a time would cost a pass over the data per centre.
    """
    count = len(rows.plain)
    per_round = -(-k // ROUNDS)
    chosen = torch.randint(count, (1,), generator=generator)
    distances = None
    while len(chosen) < k:
        fresh = chosen[-per_round:]
        new = rows.nearest(rows.plain[fresh.to(rows.plain.device)])[1]
        distances = new if distances is None else torch.minimum(distances, new)
        distances[chosen.to(distances.device)] = 0
        wanted = min(per_round, k - len(chosen))
        weights = distances.double().cpu()
        if int((weights > 0).sum()) < wanted:
            return _distinct(rows.plain, k, chosen, generator)
        keys = weights / torch.empty_like(weights).exponential_(
            generator=generator
        )  # the largest: drawn without return
        chosen = torch.cat([chosen, keys.topk(wanted).indices])
    return rows.plain[chosen.to(rows.plain.device)]


def _distinct(rows: Tensor, k: int, chosen: Tensor, generator: torch.Generator) -> Tensor:
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


def _faiss_centroids(matrix: Tensor, k: int, n_init: int, max_iter: int, seed: int) -> Tensor:
    """Centroids (k, D) by faiss, on all rows, on the GPU where torch and faiss both have one."""
    import warnings

    import faiss

    clustering = faiss.Kmeans(
        matrix.shape[1],
        k,
        niter=max_iter,
        nredo=n_init,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=len(matrix),
        gpu=torch.cuda.is_available() and hasattr(faiss, "StandardGpuResources"),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clustering.train(np.ascontiguousarray(matrix.float().cpu().numpy()))
    return torch.from_numpy(clustering.centroids).to(matrix.device)


def faiss_is_installed() -> bool:
    return importlib.util.find_spec("faiss") is not None
