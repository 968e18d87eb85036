"""k-means under the paper's protocol (10 tries, 300 iterations) beside scikit-learn and faiss: seconds and inertia."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paired

from utils.clustering import kmeans, pick_engine, protocol

SIZES = {"cub200": (5924, 128, 100), "car196": (8131, 128, 98)}
TINY = {"tiny": (500, 16, 10)}
LARGE = (60502, 128, 11316)
N_INIT, MAX_ITER = 10, 300


def ways(embeddings: np.ndarray, k: int, inertias: dict[str, list[float]]) -> dict[str, Callable[[], Any]]:
    """The ways, ours first; every call takes the next seed and notes its inertia."""

    def ours(seed: int) -> float:
        return kmeans(embeddings, k, n_init=N_INIT, max_iter=MAX_ITER, seed=seed)[2]

    def scikit(seed: int) -> float:
        from sklearn.cluster import KMeans

        return KMeans(k, n_init=N_INIT, max_iter=MAX_ITER, random_state=seed).fit(embeddings).inertia_

    def faiss_engine(seed: int) -> float:
        return kmeans(embeddings, k, n_init=N_INIT, max_iter=20, seed=seed, engine="faiss")[2]

    runs = {f"ours: {protocol(N_INIT, MAX_ITER, pick_engine(*embeddings.shape, k))}": ours}
    if paired.installed("sklearn"):
        runs[f"scikit-learn KMeans, n_init={N_INIT}, max_iter={MAX_ITER}"] = scikit
    if paired.installed("faiss"):
        runs[f"faiss.Kmeans on all rows, nredo={N_INIT}, niter=20"] = faiss_engine

    def noted(name: str) -> Callable[[], None]:
        inertias[name] = []
        return lambda: inertias[name].append(float(runs[name](len(inertias[name]))))

    return {name: noted(name) for name in runs}


def compare(embeddings: np.ndarray, k: int, repeats: int) -> dict[str, Any]:
    """Seconds and mean inertia per way, one seed per repeat."""
    inertias: dict[str, list[float]] = {}
    timed = paired.in_turn(ways(embeddings, k, inertias), repeats, warm_up=False)
    means = {name: float(np.mean(values)) for name, values in inertias.items()}
    ours = next(iter(means.values()))
    for name, way in timed.items():
        way |= {"mean_inertia": means[name], "inertia_of_ours": means[name] / ours}
    return {"shape": [*embeddings.shape], "k": k, "seeds": repeats, "ways": timed}


def main() -> None:
    parser = paired.arguments("kmeans", __doc__)
    parser.add_argument("--embeddings", type=Path, nargs="+", help="real embeddings (N, D) .npy, not synthetic ones")
    parser.add_argument("--k", type=int, default=100, help="clusters for --embeddings (default 100)")
    parser.add_argument("--large", action="store_true", help=f"also ours once at {LARGE} (about a minute)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="sklearn")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    result: dict[str, Any] = {"data": "synthetic clustered unit vectors"}
    if options.embeddings:
        result["data"] = "real embeddings: " + ", ".join(path.name for path in options.embeddings)
        for path in options.embeddings:
            result[path.stem] = compare(np.load(path).astype(np.float32), options.k, options.repeats)
    else:
        for name, (count, columns, k) in (TINY if options.tiny else SIZES).items():
            embeddings, _ = paired.clustered_unit_vectors(count, columns, k)
            result[name] = compare(embeddings, k, options.repeats)
    if options.large:
        embeddings, _ = paired.clustered_unit_vectors(*LARGE)
        spent = paired.seconds(lambda: kmeans(embeddings, LARGE[2]))
        result["large"] = {"shape_and_k": LARGE, "protocol": protocol(1, 300, "torch"), "seconds": spent}
    paired.write(result, options)


if __name__ == "__main__":
    main()
