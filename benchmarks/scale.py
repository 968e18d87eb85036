"""Clusters and neighbors of a training at growing numbers of images: time, memory and quality.

    python benchmarks/scale.py --embeddings photos.npy --sizes 10000 100000 1000000

Between the rows of the file and their neighbors as many are drawn as asked. Each way runs in a
process of its own. As in `--recipe best`, there is a cluster for each six images, and four
neighbors for each image.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, if run as a script

from benchmarks import paired
from methods.base import EXACT_UP_TO, KMEANS_ITERATIONS
from utils.clustering import approximate_kmeans, kmeans
from utils.errors import run_script
from utils.index import approximate_neighbors, nearest_exactly
from utils.options import path_name, whole
from utils.retrieval import nearest_neighbors

CLUSTER_SIZE = 6  # images
N_NEIGHBORS = 4
N_AROUND = 10  # neighbors of a row towards which rows are drawn
NOISE = 0.1  # length of what is added to a row of unit length
DIRECT_UP_TO = 20_000  # images that are clustered directly, too
N_QUERIES = 1000  # of the recall
WAYS = ("clusters, direct", "clusters, approximate", "neighbors, exact", "neighbors, approximate")
TINY = (600, 16, 50)  # rows, columns, classes


def many_rows(source: str | None, rows: np.ndarray) -> None:
    """Fill an array (N, D) with unit vectors, between the rows of a file and their neighbors.

    Without a file they are drawn around random centers.
    """
    if source is None:
        rows[:] = paired.clustered_vectors(len(rows), rows.shape[1], TINY[2])[0]
        return
    stored = np.load(source).astype(np.float32)
    around = nearest_neighbors(torch.from_numpy(stored), N_AROUND)[1].numpy()
    rng = np.random.default_rng(0)
    for start in range(0, len(rows), len(stored)):
        part = stored[: len(rows) - start]
        neighbors = stored[around[np.arange(len(part)), rng.integers(N_AROUND, size=len(part))]]
        part = part + rng.random((len(part), 1), dtype=np.float32) * (neighbors - part)
        noise = rng.standard_normal(part.shape, dtype=np.float32)
        part += NOISE / np.sqrt(part.shape[1]) * noise
        rows[start : start + len(part)] = part / np.linalg.norm(part, axis=1, keepdims=True)


def width_of(source: str | None) -> int:
    """Return the number of columns of a file, or of drawn rows."""
    return np.load(source, mmap_mode="r").shape[1] if source else TINY[1]


def peak_memory(restart: bool = False) -> float:
    """Return this process's peak of memory in MiB; perhaps forget it first (of Linux alone)."""
    if restart:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def measure(way: str, source: str | None, count: int) -> dict[str, float]:
    """Go one way: seconds, the memory in MiB beside the rows, and the quality of the result."""
    rows = np.empty((count, width_of(source)), np.float32)
    many_rows(source, rows)
    memory = peak_memory(restart=True)
    started = time.perf_counter()
    k = count // CLUSTER_SIZE
    result: np.ndarray
    if way == "clusters, direct":
        labels, centroids, _ = kmeans(rows, k, n_init=1, max_iter=KMEANS_ITERATIONS)
    elif way == "clusters, approximate":
        labels, centroids, _ = approximate_kmeans(rows, k, max_iter=KMEANS_ITERATIONS)
    elif way == "neighbors, exact":
        result = nearest_neighbors(torch.from_numpy(rows), N_NEIGHBORS)[1].numpy()
    else:
        result = approximate_neighbors(rows, N_NEIGHBORS)
    seconds = time.perf_counter() - started
    measured = {"seconds": seconds, "memory_mb": peak_memory() - memory}
    if way.startswith("clusters"):
        blocks = np.array_split(np.arange(count), 1 + count // 10_000)
        squares = (np.square(rows[b] - centroids[labels[b]]).sum(dtype=np.float64) for b in blocks)
        return measured | {"inertia": sum(squares) / count}
    drawn = np.random.default_rng(1).permutation(count)[:N_QUERIES]
    expected = nearest_exactly(rows, rows[drawn], N_NEIGHBORS + 1)
    n_hits = 0
    for query, numbers in zip(drawn, expected, strict=True):
        n_hits += len((set(numbers) - {query}) & set(result[query]))
    return measured | {"recall": n_hits / (N_NEIGHBORS * len(drawn))}


def compare(options: argparse.Namespace, count: int) -> dict[str, Any]:
    """Go each way several times, each time in a new process."""
    ways = {}
    for way in options.ways:
        if count > {WAYS[0]: DIRECT_UP_TO, WAYS[2]: EXACT_UP_TO}.get(way, count):
            continue
        turns = []
        for _ in range(options.repeats):
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, context) as alone:
                turns.append(alone.submit(measure, way, options.embeddings, count).result())
        figures = {name: turns[0][name] for name in turns[0] if name != "seconds"}
        ways[way] = paired.summary([turn["seconds"] for turn in turns]) | figures
    return {"ways": ways}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure at each size, and write the result."""
    parser = paired.make_parser("scale", "Clusters and neighbors at growing numbers of images.")
    add = parser.add_argument
    add("--embeddings", type=path_name, metavar="FILE.npy", help="of embed.py (default: drawn)")
    add("--sizes", type=whole(100), nargs="+", default=[10_000, 100_000], help="images")
    add("--ways", choices=WAYS, nargs="+", default=WAYS, help="which to go")
    options = parser.parse(argv)
    sizes = [TINY[0]] if options.tiny else options.sizes
    result: dict[str, Any] = {"data": "rows of a file" if options.embeddings else "drawn rows"}
    for count in sizes:
        result[f"{count:,} images"] = compare(options, count)
    paired.write(result, options)


if __name__ == "__main__":
    run_script(main)
