"""How seconds and memory of the stages grow with images N, dimension D, clusters K and batch m."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, if run as a script

from benchmarks import paired, train_step
from models import build_model
from utils.clustering import kmeans
from utils.errors import run_script
from utils.retrieval import nearest_neighbors

PER_CLASS = 50  # rows
MOST_QUERIES = 20_000  # of a search; of more rows, so many are queries
STARTS = 1  # of k-means
ITERATIONS = 20
# stage -> what grows -> its sizes; the rest is as in BASE
SIZES = {
    "training step": {"batch": (8, 16, 32)},
    "recall": {"rows": (10_000, 100_000, 1_000_000), "columns": (32, 128, 512)},
    "k-means": {"rows": (10_000, 100_000, 1_000_000), "clusters": (32, 256, 2048)},
}
BASE = {"rows": 20_000, "columns": 128, "clusters": 100, "batch": 32}
TINY = {"recall": {"rows": (400,)}, "k-means": {"clusters": (4,)}}
TINY_BASE = {"rows": 400, "columns": 16, "clusters": 8}


def task_of(stage: str, size: dict[str, int]) -> tuple[Callable[[], Any], str]:
    """Return the call of a stage, and what it does, in words."""
    if stage == "training step":
        m = size["batch"]
        images = np.random.default_rng(0).integers(0, 256, (2 * m, 256, 256, 3), np.uint8)
        step = train_step.our_step(build_model("resnet18"), images, m, "fp32")
        return step, f"2 x {m} views of 224 px"
    n_rows = size["rows"]
    vectors, _ = paired.clustered_vectors(n_rows, size["columns"], max(2, n_rows // PER_CLASS))
    if stage == "k-means":
        options = {"n_init": STARTS, "max_iter": ITERATIONS}
        words = f"{size['clusters']} clusters, one start, at most {ITERATIONS} iterations"
        return partial(kmeans, vectors, size["clusters"], **options), words
    rows = torch.from_numpy(vectors)
    n_queries = min(n_rows, MOST_QUERIES)
    words = f"{n_queries} of {n_rows} rows are queries, 9 neighbors"
    return partial(nearest_neighbors, rows, 9, queries=rows[:n_queries]), words


def measure(stage: str, size: dict[str, int]) -> dict[str, Any]:
    """Return seconds and peak memory of a stage at a size, in this process.

    A network counts with its second step: the first one finds its algorithms.
    """
    kmeans(np.random.default_rng(0).random((300, 8)), 2, n_init=1)  # loads the libraries
    run, words = task_of(stage, size)
    times: list[float] = []

    def repeat() -> None:
        for _ in range(1 + (stage == "training step")):
            times.append(paired.seconds(run))

    peak = paired.peak_extra_mb(repeat)
    return {"seconds": times[-1], "peak_mb_above_start": peak, "what": words}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each stage at each size in a fresh process, and write the result."""
    parser = paired.make_parser("growth", "How seconds and memory of the stages grow.")
    parser.add_argument("--measure", metavar="JSON", help="measure one [stage, sizes], and print")
    options = parser.parse(list(argv or sys.argv[1:]))
    if options.measure:
        print(json.dumps(measure(*json.loads(options.measure))))
        return
    sizes = SIZES
    base = BASE
    if options.tiny:
        sizes = TINY
        base = TINY_BASE
    result: dict[str, Any] = {"data": f"unit vectors in classes of {PER_CLASS}, random pixels"}
    for stage, growing in sizes.items():
        result[stage] = {name: [] for name in growing}
        for name, values in growing.items():
            for value in values:
                task = json.dumps([stage, base | {name: value}])
                command = [sys.executable, __file__, "--measure", task]
                output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
                result[stage][name].append({name: value, **json.loads(output)})
    paired.write(result, options)


if __name__ == "__main__":
    run_script(main)
