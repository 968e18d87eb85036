"""k-means under the paper's protocol (10 starts, 300 iterations) beside scikit-learn and faiss: time, inertia, NMI."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paired

from utils.clustering import kmeans, pick_engine, protocol
from utils.metrics import nmi

SIZES = {"cub200": (5924, 128, 100), "car196": (8131, 128, 98)}
TINY = {"tiny": (500, 16, 10)}
LARGE = (60502, 128, 11316)
N_INIT, MAX_ITER, FAISS_ITER = 10, 300, 50


def ways(embeddings: np.ndarray, labels: np.ndarray, found: dict[str, list]) -> dict[str, Callable[[], Any]]:
    """The ways, ours first, with as many clusters as labels; every call takes the next seed and notes what it found."""
    k = len(np.unique(labels))

    def ours(seed: int) -> tuple[np.ndarray, float]:
        return kmeans(embeddings, k, n_init=N_INIT, max_iter=MAX_ITER, seed=seed)[::2]

    def scikit(seed: int) -> tuple[np.ndarray, float]:
        from sklearn.cluster import KMeans

        fitted = KMeans(k, n_init=N_INIT, max_iter=MAX_ITER, random_state=seed).fit(embeddings)
        return fitted.labels_, fitted.inertia_

    def faiss_engine(seed: int) -> tuple[np.ndarray, float]:
        return kmeans(embeddings, k, n_init=N_INIT, max_iter=FAISS_ITER, seed=seed, engine="faiss")[::2]

    runs = {f"ours: {protocol(N_INIT, MAX_ITER, pick_engine(*embeddings.shape, k))}": ours}
    if paired.installed("sklearn"):
        runs[f"scikit-learn KMeans, n_init={N_INIT}, max_iter={MAX_ITER}"] = scikit
    if paired.installed("faiss"):
        runs[f"faiss.Kmeans on all rows, nredo={N_INIT}, niter={FAISS_ITER}"] = faiss_engine

    def noted(name: str) -> Callable[[], None]:
        found[name] = []
        return lambda: found[name].append(runs[name](len(found[name])))

    return {name: noted(name) for name in runs}


def compare(embeddings: np.ndarray, labels: np.ndarray, repeats: int) -> dict[str, Any]:
    """Seconds, mean inertia and mean NMI per way, one seed per repeat."""
    found: dict[str, list] = {}
    timed = paired.in_turn(ways(embeddings, labels, found), repeats, warm_up=False)
    inertia = {name: float(np.mean([float(run[1]) for run in runs])) for name, runs in found.items()}
    ours = next(iter(inertia.values()))
    for name, way in timed.items():
        scores = [nmi(labels, run[0]) for run in found[name]]
        way |= {"mean_inertia": inertia[name], "inertia_of_ours": inertia[name] / ours,
                "mean_nmi": float(np.mean(scores)), "std_nmi": float(np.std(scores))}  # fmt: skip
    return {"shape": [*embeddings.shape], "k": len(np.unique(labels)), "seeds": repeats, "ways": timed}


def main() -> None:
    parser = paired.arguments("kmeans", __doc__)
    parser.add_argument("--embeddings", type=Path, nargs="+", help="real embeddings (N, D) .npy, not synthetic ones")
    parser.add_argument("--labels", type=Path, nargs="+", help="their labels (N,) .npy, a file for each")
    parser.add_argument("--large", action="store_true", help=f"also ours once at {LARGE} (about a minute)")
    options = parser.parse_args()
    if len(options.embeddings or []) != len(options.labels or []):
        parser.error("--embeddings and --labels take a file of labels for each of embeddings")
    warnings.filterwarnings("ignore", module="sklearn")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    result: dict[str, Any] = {"data": "synthetic clustered unit vectors"}
    if options.embeddings:
        result["data"] = "real embeddings: " + ", ".join(path.name for path in options.embeddings)
        for path, labels in zip(options.embeddings, options.labels, strict=True):
            result[path.stem] = compare(np.load(path).astype(np.float32), np.load(labels), options.repeats)
    else:
        for name, (count, columns, k) in (TINY if options.tiny else SIZES).items():
            result[name] = compare(*paired.clustered_unit_vectors(count, columns, k), options.repeats)
    if options.large:
        embeddings, _ = paired.clustered_unit_vectors(*LARGE)
        spent = paired.seconds(lambda: kmeans(embeddings, LARGE[2]))
        result["large"] = {"shape_and_k": LARGE, "protocol": protocol(1, 300, "torch"), "seconds": spent}
    paired.write(result, options)


if __name__ == "__main__":
    main()
