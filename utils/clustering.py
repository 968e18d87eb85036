"""k-means: good starts, Lloyd iterations by blocks, no empty cluster, the same result for the same seed."""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from utils.search import as_matrix, frame_of, framed, full_float32, nearest_neighbors, squared_distances

ENGINES = ("auto", "torch", "faiss", "sklearn")
CPU_BLOCK = 1 << 20  # scores per block of rows: they stay in the cache of the cores
GPU_BLOCK = 1 << 26
GREEDY_UP_TO = 512  # clusters; more are seeded in rounds, as a pass over the data per centroid would cost too much
SEEDING_ROUNDS = 64
SEEDING_SCORES = 1 << 25  # distances of greedy seeding at a time: starts times rows times draws
POWER_ITERATIONS = 3
ROUND = 4  # iterations before the less promising of the starts are given up
SURVIVORS = (4, 2)  # starts that are left after each round


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
    starts = f"best of {n_init} starts by successive halving" if n_init > 1 else "one start"
    return f"k-means++, {starts}, <={max_iter} iterations, torch engine"


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

    features (N, D) floating point. The torch engine draws n_init k-means++ starts and gives up the less promising of
    them after a few Lloyd iterations (see `_best_run`); the iterations of the last ones run until no row changes its
    cluster, max_iter in all, or until the squared movement of all centroids together is at most tol times the mean
    variance of the columns, as in scikit-learn. The faiss engine makes n_init random starts of max_iter iterations.
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
            found = _best_run(framed(matrix, (centre, scale)), k, n_init, max_iter, seed, tol)
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

    def means(self, clusters: Tensor, k: int) -> Tensor:
        """Mean rows (S, k, D) of each of k clusters in S clusterings (S, N), none of the clusters empty."""
        sizes = _sizes(clusters, k)[:, :, None]
        return _sums(self.plain, clusters, k).div_(sizes)

    def nearest(self, centroids: Tensor) -> Tensor:
        """Squared distances (N,) float32 to the nearest of the centroids (k, D)."""
        bias = centroids.square().sum(1).mul(-0.5)
        blocks = self.plain.split(max(1, self.block // len(centroids)))
        best = torch.cat([torch.addmm(bias, block, centroids.T).amax(1) for block in blocks])
        return (self.norms - 2 * best).clamp_(min=0)


def _sizes(clusters: Tensor, k: int) -> Tensor:
    """Rows in each of k clusters (S, k) of S clusterings (S, N)."""
    runs = len(clusters)
    offset = torch.arange(runs, device=clusters.device)[:, None] * k
    return torch.bincount((clusters + offset).flatten(), minlength=runs * k).view(runs, k)


def _sums(rows: Tensor, clusters: Tensor, k: int) -> Tensor:
    """Sums (S, k, D) of the rows (N, D) in each cluster of S clusterings (S, N), in a fixed order on every device."""
    runs, count = clusters.shape
    if rows.device.type == "cpu":  # scipy's product of a sparse 0/1 matrix is several times faster than index_add_
        columns = (clusters + torch.arange(runs)[:, None] * k).T.flatten().numpy()
        ends = np.arange(0, count * runs + 1, runs)
        member = csr_array((np.ones(len(columns), np.float32), columns, ends), shape=(count, runs * k))
        return torch.from_numpy(member.T @ rows.numpy()).view(runs, k, -1)
    order = torch.argsort(clusters, dim=1, stable=True)
    sizes = _sizes(clusters, k)
    firsts = sizes.cumsum(1) - sizes
    bag = torch.nn.functional.embedding_bag
    return torch.stack([bag(order[run], rows, firsts[run], mode="sum") for run in range(runs)])


class _Runs:
    """S runs of Lloyd's iterations on the same rows (N, D), side by side: one matrix product serves all of them.

    `centroids` (S, k, D), `clusters` (S, N) int64 and squared `distances` (S, N) under them, `inertia` (S,) float64.
    """

    def __init__(self, rows: _Rows, centroids: Tensor) -> None:
        self.rows, self.centroids = rows, centroids
        self.clusters: Tensor | None = None
        self._assign()

    def _assign(self) -> None:
        runs, k, columns = self.centroids.shape
        right = self.centroids.reshape(runs * k, columns)
        bias = right.square().sum(1).mul(-0.5)
        before = self.clusters
        self.clusters = torch.empty(runs, len(self.rows.plain), dtype=torch.int64, device=right.device)
        best = torch.empty(runs, len(self.rows.plain), device=right.device)
        step = max(1, self.rows.block // (runs * k))
        buffer = right.new_empty(step, runs * k)  # one for all blocks: fresh memory would cost more than the product
        for start in range(0, len(self.rows.plain), step):
            part = slice(start, start + step)
            block = self.rows.plain[part]
            scores = torch.addmm(bias, block, right.T, out=buffer[: len(block)]).view(-1, runs, k)  # x.c - |c|^2 / 2
            best[:, part] = scores.amax(2).T
            self.clusters[:, part] = _largest(scores, best[:, part], None if before is None else before[:, part])
        self.distances = (self.rows.norms - 2 * best).clamp_(min=0)
        self.inertia = self.distances.sum(1, dtype=torch.float64)

    def iterate(self, limit: float) -> Tensor:
        """One iteration of all; (S,) whether a run has settled: no row moved, or its centroids by at most `limit`."""
        before, clusters = self.centroids, self.clusters
        self.centroids = self.means_of(self.rows)
        moved = (self.centroids - before).square().sum((1, 2), dtype=torch.float64)
        self._assign()
        return (moved <= limit) | (self.clusters == clusters).all(1)

    def means_of(self, rows: _Rows) -> Tensor:
        """Centroids (S, k, D') of the runs' clusters, none empty, in any form of the rows."""
        k = self.centroids.shape[1]
        for run in (_sizes(self.clusters, k) == 0).any(1).nonzero().flatten().tolist():
            self.clusters[run] = _without_empty(self.clusters[run], self.distances[run], k)
        return rows.means(self.clusters, k)

    def keep(self, runs: Tensor) -> None:
        """Go on with some of the runs (their numbers) alone."""
        for name in ("centroids", "clusters", "distances", "inertia"):
            setattr(self, name, getattr(self, name)[runs])


def _largest(scores: Tensor, best: Tensor, before: Tensor | None) -> Tensor:
    """Column (S, B) of the largest score in scores (B, S, k), where best (S, B) is that score.

    From the second iteration on nearly all rows stay in their cluster `before` (S, B): they are told by one comparison.
    """
    if before is None:
        return scores.argmax(2).T
    own = scores.gather(2, before.T[:, :, None])[:, :, 0].T  # (S, B)
    run, row = (own < best).nonzero(as_tuple=True)
    clusters = before.clone()
    clusters[run, row] = scores[row, run].argmax(1)
    return clusters


def _best_run(matrix: Tensor, k: int, n_init: int, max_iter: int, seed: int, tol: float) -> Tensor:
    """Centroids (k, D) of the best of n_init k-means++ starts; the less promising ones are given up on the way.

    All starts are drawn and iterated in the leading principal directions, where k-means clusters hardly differ (Ding
    and He, "K-means clustering via principal component analysis", 2004); after every ROUND iterations only the best
    few go on (successive halving), and the last of them run to the end on the rows as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = sketch = _Rows(matrix)
    if k <= GREEDY_UP_TO and matrix.shape[1] > _sketch_columns(k):
        sketch = _Rows(_principal_part(matrix, _sketch_columns(k), generator))
    starts = _starts(sketch, k, n_init, generator)
    if starts is None:
        sketch, centroids = rows, _distinct(matrix, k, generator)[None]
    else:
        centroids = sketch.plain[starts]
    runs = _Runs(sketch, centroids)
    for kept in SURVIVORS:
        if len(runs.inertia) > kept:
            max_iter -= _lloyd(runs, min(ROUND, max_iter), 0.0)
            runs.keep(runs.inertia.argsort(stable=True)[:kept])
    if sketch is not rows:
        runs = _Runs(rows, runs.means_of(rows))
    _lloyd(runs, max_iter, tol * float(matrix.var(0, correction=0).mean()))
    return runs.centroids[runs.inertia.argmin()]


def _lloyd(runs: _Runs, iterations: int, limit: float) -> int:
    """Lloyd iterations of all runs until each has settled (`_Runs.iterate`), at most `iterations`; returns how many."""
    settled = torch.zeros(len(runs.inertia), dtype=torch.bool, device=runs.inertia.device)
    for done in range(iterations):
        if settled.all():
            return done
        settled |= runs.iterate(limit)
    return iterations


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


def _sketch_columns(k: int) -> int:
    """Principal directions that the starts are tried in."""
    return 32 + k // 4


def _principal_part(matrix: Tensor, columns: int, generator: torch.Generator) -> Tensor:
    """Rows (N, D), whose mean is 0, in about their `columns` leading principal directions.

    By power iterations from a random start (Halko, Martinsson and Tropp, "Finding structure with randomness", 2011).
    """
    directions = torch.randn(matrix.shape[1], columns, generator=generator).to(matrix.device)
    for _ in range(POWER_ITERATIONS):
        directions = torch.linalg.qr(matrix.T @ (matrix @ directions)).Q
    return matrix @ directions


def _starts(rows: _Rows, k: int, count: int, generator: torch.Generator) -> Tensor | None:
    """Indices (count, k) of k-means++ starts, or None where float32 distances cannot tell k rows apart.

    Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding" (2007): rows drawn with probability
    proportional to the squared distance to those drawn before. Up to GREEDY_UP_TO clusters it is their greedy variant,
    as in scikit-learn: of 2 + log k rows drawn, the one that lowers the inertia most is kept.
    """
    if k > GREEDY_UP_TO:
        starts = [_seeded_in_rounds(rows, k, generator) for _ in range(count)]
    else:
        side_by_side = max(1, SEEDING_SCORES // (len(rows.plain) * (2 + int(math.log(k)))))
        parts = [min(side_by_side, count - done) for done in range(0, count, side_by_side)]
        starts = [_greedy_starts(rows, k, part, generator) for part in parts]
    if any(start is None for start in starts):
        return None
    return torch.cat(starts) if k <= GREEDY_UP_TO else torch.stack(starts)


def _greedy_starts(rows: _Rows, k: int, count: int, generator: torch.Generator) -> Tensor | None:
    """Greedy k-means++ for `count` starts side by side: indices (count, k), or None (see `_starts`)."""
    device, number = rows.plain.device, len(rows.plain)
    tries = 2 + int(math.log(k))
    ones = torch.ones(number, 1, device=device)
    left = torch.cat([rows.plain * -2, ones, rows.norms[:, None]], 1)
    right = torch.cat([rows.plain, rows.norms[:, None], ones], 1).T  # left @ right: squared distances
    every = torch.arange(count, device=device)
    chosen = torch.empty(count, k, dtype=torch.int64, device=device)
    chosen[:, 0] = torch.randint(number, (count,), generator=generator).to(device)
    distances = left[chosen[:, 0]] @ right  # (count, N)
    left_over = distances.new_empty(count * tries, number)
    for place in range(1, k):
        distances.masked_fill_(distances <= rows.noise, 0)
        total = distances.cumsum(1, dtype=torch.float64)
        if not (total[:, -1] > 0).all():
            return None
        drawn = torch.rand(count, tries, generator=generator, dtype=torch.float64).to(device) * total[:, -1:]
        drawn = torch.searchsorted(total, drawn, right=True).clamp_(max=number - 1)  # (count, tries)
        torch.mm(left.index_select(0, drawn.flatten()), right, out=left_over)
        each = left_over.view(count, tries, number)
        torch.minimum(each, distances[:, None], out=each)
        best = every * tries + each.sum(2).argmin(1)
        chosen[:, place] = drawn.flatten()[best]
        distances = left_over.index_select(0, best)
    return chosen


def _seeded_in_rounds(rows: _Rows, k: int, generator: torch.Generator) -> Tensor | None:
    """k-means++ with many rows drawn at once, in SEEDING_ROUNDS passes: indices (k,), or None (see `_starts`)."""
    device = rows.plain.device
    chosen = torch.randint(len(rows.plain), (1,), generator=generator).to(device)
    fresh, distances = chosen, torch.full_like(rows.norms, torch.inf)
    while len(chosen) < k:
        distances = torch.minimum(distances, rows.nearest(rows.plain[fresh]))
        distances[distances <= rows.noise] = 0
        wanted = min(-(-k // SEEDING_ROUNDS), k - len(chosen))
        fresh = _draw(distances, wanted, generator).to(device)
        if len(fresh) < wanted:
            return None
        chosen = torch.cat([chosen, fresh])
    return chosen


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
