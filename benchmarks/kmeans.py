"""k-means as NMI is computed with it: faiss beside scikit-learn's, which the paper's scores used.

Takes the frozen features of the test halves of both data sets, pre-processed before:

    python benchmarks/kmeans.py --data_dir data --image_size 128
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import normalized_mutual_info_score
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, if run as a script

from benchmarks import paired
from datasets.arrays import load_split
from datasets.views import center_crops
from models import build_model
from utils.clustering import kmeans
from utils.errors import run_script
from utils.evaluation import NMI_ITERATIONS
from utils.features import pooled_features
from utils.options import path_name, whole

BATCH = 100  # images
ENGINES = ("faiss", "sklearn")
TINY = (500, 16, 10)  # rows, columns, classes


def frozen_features(dataset: str, options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Return pooled features (N, C) of unit length of a test half, and its labels (N,)."""
    split = load_split(options.data_dir, dataset, "validation", options.image_size)
    model = build_model(options.backbone, weights=options.weights)
    (pooled,) = pooled_features(model, center_crops(split, BATCH, workers=1))
    return F.normalize(pooled, dim=1).numpy(), split.labels


def compare(features: np.ndarray, labels: np.ndarray, n_seeds: int) -> dict[str, Any]:
    """Cluster by each engine with each seed: seconds, NMI and inertia, means and deviations."""
    k = len(np.unique(labels))
    values = {engine: {"seconds": [], "nmi": [], "inertia": []} for engine in ENGINES}
    for seed, engine in product(range(n_seeds), ENGINES):
        started = time.perf_counter()
        clusters, _, inertia = kmeans(
            features, k, max_iter=NMI_ITERATIONS, seed=seed, engine=engine
        )
        values[engine]["seconds"].append(time.perf_counter() - started)
        values[engine]["nmi"].append(float(normalized_mutual_info_score(labels, clusters)))
        values[engine]["inertia"].append(inertia)
    ways = {}
    for engine, lists in values.items():
        ways[f"{engine}, 10 starts"] = paired.summary(lists["seconds"]) | {
            "nmi_mean": statistics.fmean(lists["nmi"]),
            "nmi_std": statistics.stdev(lists["nmi"]) if n_seeds > 1 else 0.0,
            "nmi": lists["nmi"],
            "inertia_mean": statistics.fmean(lists["inertia"]),
        }
    return {"shape": list(features.shape), "k": k, "max_iter": NMI_ITERATIONS, "ways": ways}


def main(argv: Sequence[str] | None = None) -> None:
    """Compare on the features of each data set, and write the result."""
    parser = paired.make_parser("kmeans", "NMI and time of k-means by faiss and by scikit-learn.")
    add = parser.add_argument
    add("--datasets", nargs="+", default=["cub200", "car196"], help="pre-processed data sets")
    add("--data_dir", type=path_name, default="data", help="the folder that holds them")
    add("--image_size", type=whole(8), help="which pre-processed size, if there are several")
    add("--backbone", default="resnet18", help="that is frozen")
    add("--weights", type=path_name, default="auto", help="auto (ImageNet), none (random), or FILE")
    options = parser.parse(argv)
    if options.tiny:
        result = {"data": "synthetic unit vectors"}
        result["tiny"] = compare(*paired.clustered_vectors(*TINY), options.repeats)
    else:
        result = {"data": f"frozen {options.backbone}, image_size {options.image_size}"}
        for dataset in options.datasets:
            result[dataset] = compare(*frozen_features(dataset, options), options.repeats)
    paired.write(result, options)


if __name__ == "__main__":
    run_script(main)
