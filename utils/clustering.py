"""k-means by faiss, on the GPU for rows that lie there, or by scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.sparse import csr_array
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.metrics import adjusted_mutual_info_score, pairwise_distances_argmin
from torch import Tensor

from utils.errors import UserError
from utils.progress import progress
from utils.retrieval import as_matrix

try:
    import faiss
except ImportError:  # a machine on which it cannot be installed
    faiss = None

ENGINES = ("auto", "faiss", "sklearn")
EARLY_STOP = 1e-6  # relative gain of an iteration below which faiss stops
EARLY_STOP_APPROXIMATE = 1e-3
FEWEST_CLUSTERS = 4  # that choose_k chooses; fewer are stable whatever the images
STABLE = 0.9  # see choose_k
STABILITY_REPEATS = 3
STABILITY_ROWS = 5000
GREEDY_UP_TO = 512  # clusters; for more, a greedy start would take longer than the clustering
MOST_DISTANCES = 10**8  # rows * clusters of an iteration from which on k-means is approximate
BLOCK = 1 << 14  # rows
NPROBE = 8  # cells whose centroids `approximate_kmeans` compares a row with


def pick_engine(engine: str = "auto") -> str:
    """Return the engine that is used: faiss if it is installed, else sklearn. Raises UserError if
    it is missing.
    """
    if engine == "faiss" and faiss is None:
        raise UserError("the k-means engine faiss is not installed here; use sklearn")
    if engine not in ENGINES:
        raise UserError(f"the k-means engine is one of {', '.join(ENGINES)}, not {engine!r}")
    if engine == "auto":
        return "sklearn" if faiss is None else "faiss"
    return engine


def kmeans(
    features: Tensor | np.ndarray,
    k: int,
    *,
    n_init: int = 10,
    max_iter: int = 300,
    seed: int = 0,
    engine: str = "auto",
) -> tuple[Tensor, Tensor, float] | tuple[np.ndarray, np.ndarray, float]:
    """Divide rows into k clusters: the best of `n_init` k-means++ starts.

    With faiss, the starts of up to GREEDY_UP_TO clusters are scikit-learn's, which take the best of
    several draws for each center, as in the protocol of the released code; faiss iterates.

    Args:
        features: (N, D) floating point, a tensor on any device or an array.
        max_iter: iterations of each start, at most.
        engine: faiss, sklearn, or auto (see `pick_engine`).

    Returns:
        Assignments (N,) int64 to the nearest centroid, centroids (k, D) float32, and the inertia,
        the sum of squared distances to them: tensors on the device of the features, arrays for an
        array.

    Raises ValueError for features that are no finite matrix, and if k is not between 1 and N.
    """
    matrix = _checked(features, k)
    seed = seed % 2**31  # the range of faiss
    if pick_engine(engine) == "faiss":
        rows, center = _centered(matrix)
        gpu = matrix.device.index if _uses_gpu(matrix) else None
        assignments, centroids, inertia = _by_faiss(rows, k, n_init, max_iter, seed, gpu)
        return _results(features, assignments, centroids + center, inertia)
    rows = np.ascontiguousarray(matrix.cpu().numpy(), dtype=np.float32)
    return _results(features, *_by_sklearn(rows, k, n_init, max_iter, seed))


def _by_faiss(
    rows: np.ndarray, k: int, n_init: int, max_iter: int, seed: int, gpu: int | None
) -> tuple:
    width = rows.shape[1]
    index = faiss.IndexFlatL2(width)
    if gpu is not None:  # faiss.Kmeans would take all of them
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), gpu, index)
    parameters = faiss.ClusteringParameters()
    parameters.niter = max_iter
    parameters.init_method = faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS
    parameters.early_stop_threshold = EARLY_STOP
    parameters.min_points_per_centroid = 1
    parameters.max_points_per_centroid = len(rows)
    random = np.random.RandomState(seed)
    best = None
    for _ in range(n_init):
        parameters.seed = int(random.randint(2**31))
        clustering = faiss.Clustering(width, k, parameters)
        if k <= GREEDY_UP_TO:
            start = kmeans_plusplus(rows, k, random_state=random)[0]
            faiss.copy_array_to_vector(start.ravel(), clustering.centroids)
        clustering.train(rows, index)
        distances, assignments = index.search(rows, 1)
        inertia = float(distances.sum(dtype=np.float64))
        if best is None or inertia < best[2]:
            centroids = faiss.vector_float_to_array(clustering.centroids).reshape(k, width)
            best = (assignments[:, 0], centroids, inertia)
    return best


def _by_sklearn(rows: np.ndarray, k: int, n_init: int, max_iter: int, seed: int) -> tuple:
    clustering = KMeans(k, n_init=n_init, max_iter=max_iter, random_state=seed)
    clustering.fit(rows)
    return clustering.labels_, clustering.cluster_centers_, float(clustering.inertia_)


def kmeans_of_any_size(
    features: Tensor | np.ndarray, k: int, *, n_init: int, max_iter: int, seed: int
) -> tuple[Tensor, Tensor, float] | tuple[np.ndarray, np.ndarray, float]:
    """Divide rows by `kmeans`; many rows into many clusters by `approximate_kmeans`.

    Approximate are more than MOST_DISTANCES an iteration, unless a GPU computes them or faiss is
    absent. Args and results are those of `kmeans`.
    """
    is_large = faiss is not None and len(features) * k > MOST_DISTANCES
    if is_large and not (isinstance(features, Tensor) and _uses_gpu(features)):
        return approximate_kmeans(features, k, max_iter=max_iter, seed=seed)
    return kmeans(features, k, n_init=n_init, max_iter=max_iter, seed=seed)


def approximate_kmeans(
    features: Tensor | np.ndarray, k: int, *, max_iter: int = 300, seed: int = 0
) -> tuple[Tensor, Tensor, float] | tuple[np.ndarray, np.ndarray, float]:
    """Divide N rows into k clusters in time N sqrt(k) instead of N k, by faiss.

    k-means from one random start, where a row is assigned to the nearest of those centroids that
    lie in the NPROBE nearest of about sqrt(NPROBE * k) cells.

    Args and results are those of `kmeans`, but for n_init and engine. Raises as it does, and
    UserError without faiss.
    """
    pick_engine("faiss")
    rows, center = _centered(_checked(features, k))
    n_cells = max(1, min(round(math.sqrt(NPROBE * k)), k))
    cells = faiss.IndexIVFFlat(faiss.IndexFlatL2(rows.shape[1]), rows.shape[1], n_cells)
    cells.cp.seed = seed % 2**31
    cells.cp.min_points_per_centroid = 1
    cells.cp.max_points_per_centroid = 64
    cells.train(rows)
    order = cells.quantizer.search(rows, 1)[1][:, 0].argsort(kind="stable")
    rows = rows[order]  # the rows of a cell one after the other: its centroids stay in the cache
    centroids = rows[np.random.default_rng(seed).permutation(len(rows))[:k]]
    distances, nearest = _nearest_in_cells(cells, rows, centroids)
    for _ in range(max_iter):
        before = distances.sum(dtype=np.float64)
        centroids = _means(rows, nearest, distances, centroids)
        distances, nearest = _nearest_in_cells(cells, rows, centroids)
        if before - distances.sum(dtype=np.float64) <= EARLY_STOP_APPROXIMATE * before:
            break
    assignments = np.empty(len(rows), np.int64)
    assignments[order] = nearest
    inertia = float(distances.sum(dtype=np.float64))
    return _results(features, assignments, centroids + center, inertia)


def _nearest_in_cells(
    cells: faiss.IndexIVFFlat, rows: np.ndarray, centroids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return squared distance and number of the nearest centroid (N,) in the nearest cells."""
    cells.reset()
    cells.add(centroids)
    cells.nprobe = NPROBE
    distances, nearest = cells.search(rows, 1)
    missed = np.flatnonzero(nearest[:, 0] < 0)  # their nearest cells hold no centroid
    if len(missed):
        cells.nprobe = cells.nlist
        distances[missed], nearest[missed] = cells.search(rows[missed], 1)
    return distances[:, 0], nearest[:, 0]


def _means(
    rows: np.ndarray, assignments: np.ndarray, distances: np.ndarray, centroids: np.ndarray
) -> np.ndarray:
    """Return the mean of each cluster (K, D); one without rows gets a row that lies far out."""
    members = csr_array((np.ones(len(rows), np.float32), assignments, np.arange(len(rows) + 1)))
    members.resize(len(rows), len(centroids))
    counts = np.bincount(assignments, minlength=len(centroids))
    means = (members.T @ rows) / np.maximum(counts, 1)[:, None].astype(np.float32)
    empty = np.flatnonzero(counts == 0)
    means[empty] = rows[np.argsort(-distances, kind="stable")[: len(empty)]]
    return means


def _uses_gpu(matrix: Tensor) -> bool:
    """Return whether faiss clusters these rows on a GPU."""
    is_free = matrix.is_cuda and not torch.are_deterministic_algorithms_enabled()
    return is_free and faiss.get_num_gpus() > 0


def _checked(features: Tensor | np.ndarray, k: int) -> Tensor:
    """Return features as a matrix of which k clusters can be made."""
    matrix = as_matrix(features)
    if not 1 <= k <= len(matrix):
        raise UserError(f"cannot make {k} clusters of {len(matrix)} images; give fewer clusters")
    return matrix


def _centered(matrix: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 rows around their mean, near which alone faiss is exact, and the mean."""
    rows = np.ascontiguousarray(matrix.cpu().numpy(), dtype=np.float32)
    center = rows.mean(0)
    return rows - center, center


def _results(
    features: Tensor | np.ndarray, assignments: np.ndarray, centroids: np.ndarray, inertia: float
) -> tuple:
    """Return results in the kind of the features: arrays, or tensors on their device."""
    results = assignments.astype(np.int64), centroids
    if isinstance(features, Tensor):
        results = (torch.from_numpy(result).to(features.device) for result in results)
    return *results, inertia


def choose_k(features: np.ndarray, seed: int = 0) -> tuple[int, dict[int, float]]:
    """Choose a number of clusters by their stability.

    Halves of the rows are clustered apart, and both results divide all rows. The stability of k is
    the AMI of the two divisions, a mean over STABILITY_REPEATS random halves. The k that is chosen
    is the largest whose stability is STABLE of the best one's. At most STABILITY_ROWS random rows
    are looked at, so that more than a third of their half is never chosen.

    features: (N, D), at least 2 * FEWEST_CLUSTERS rows.

    Returns k and the stability of each candidate.
    """
    generator = np.random.default_rng(seed)
    rows = features[np.sort(generator.permutation(len(features))[:STABILITY_ROWS])]
    largest = max(FEWEST_CLUSTERS, len(rows) // 6)
    grid = np.geomspace(FEWEST_CLUSTERS, largest, 12).round().astype(int)
    candidates = np.unique(grid).tolist()
    stability = {}
    for k in progress(candidates, "number of clusters"):
        agreements = []
        for _ in range(STABILITY_REPEATS):
            order = generator.permutation(len(rows))
            divisions = []
            for half in np.array_split(order, 2):
                result = kmeans(rows[half], k, n_init=1, max_iter=30, seed=seed)
                divisions.append(pairwise_distances_argmin(rows, result[1]))
            agreements.append(adjusted_mutual_info_score(*divisions))
        stability[k] = float(np.mean(agreements))
    best = max(stability.values())
    enough = best - (1 - STABLE) * abs(best)
    return max(k for k, value in stability.items() if value >= enough), stability


def distances_to(rows: np.ndarray, centroids: np.ndarray, assignments: np.ndarray) -> np.ndarray:
    """Return the distance (N,) of each row (N, D) to its own of the centroids (K, D)."""
    distances = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), BLOCK):
        block = slice(start, start + BLOCK)
        distances[block] = np.linalg.norm(rows[block] - centroids[assignments[block]], axis=1)
    return distances
