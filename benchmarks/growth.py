"""How seconds and memory of every stage grow with the number of images N, columns D, clusters K and the batch m."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import paired
import torch
import train_step

from benchmarks.pre_process import make_raw, script_command
from models import build_model
from utils.clustering import kmeans
from utils.metrics import recall_at_k
from utils.process import keep_freed_memory
from utils.search import nearest_neighbors

PER_CLASS = 50  # rows
MOST_QUERIES = 20_000  # of a search; more rows than that are searched by a share of them
ITERATIONS = 20  # of k-means, at most

# stage -> what grows -> its three sizes; the rest stays as in BASE
SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "pre-processing": {"images": (500, 1000, 2000)},
    "training step": {"batch": (8, 16, 32)},
    "features": {"batch": (16, 64, 256)},
    "recall": {"rows": (10_000, 100_000, 1_000_000), "columns": (32, 128, 512)},
    "mining": {"rows": (10_000, 100_000, 1_000_000), "columns": (32, 128, 512)},
    "k-means": {"rows": (10_000, 100_000, 1_000_000), "columns": (32, 128, 512), "clusters": (32, 256, 2048)},
}
TINY = {
    "pre-processing": {"images": (20,)},
    "training step": {"batch": (2,)},
    "features": {"batch": (2,)},
    "recall": {"rows": (400,), "columns": (8,)},
    "mining": {"rows": (400,)},
    "k-means": {"rows": (400,), "clusters": (4,)},
}
BASE = {"rows": 20_000, "columns": 128, "clusters": 100, "batch": 32, "images": 500}
TINY_BASE = {"rows": 400, "columns": 16, "clusters": 8, "batch": 2, "images": 20}


def vectors_task(stage: str, size: dict[str, int]) -> tuple[Callable[[], Any], str]:
    """The call of a stage that works on embeddings, and what it does, in words."""
    rows, columns = size["rows"], size["columns"]
    embeddings, labels = paired.clustered_unit_vectors(rows, columns, max(2, rows // PER_CLASS))
    nearest_neighbors(torch.rand(300, 8))  # loads the libraries before memory is watched
    if stage == "k-means":
        run = partial(kmeans, embeddings, size["clusters"], max_iter=ITERATIONS)
        return run, f"{size['clusters']} clusters, one start, at most {ITERATIONS} iterations"
    if rows <= MOST_QUERIES or (stage == "recall" and rows <= 5 * MOST_QUERIES):
        run = partial(recall_at_k, embeddings, labels) if stage == "recall" else partial(nearest_neighbors, embeddings)
        return run, "every row is a query"
    queries = np.sort(np.random.default_rng(1).choice(rows, MOST_QUERIES, replace=False))
    k = 9 if stage == "recall" else 2  # a query finds itself as well
    return (
        partial(nearest_neighbors, embeddings, k, queries=embeddings[queries]),
        f"{MOST_QUERIES} of {rows} rows are queries, {k} neighbours",
    )


def network_task(stage: str, size: dict[str, int], tiny: bool) -> tuple[Callable[[], Any], str]:
    """A training step, or the features of a batch, of ResNet-18 in float32 on random pixels."""
    keep_freed_memory()
    stored, batch = (64, size["batch"]) if tiny else (256, size["batch"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = np.random.default_rng(0).integers(0, 256, (max(4, 2 * batch), stored, stored, 3), np.uint8)
    model = build_model("resnet_small" if tiny else "resnet18")
    if stage == "training step":
        step = train_step.ours(model, images, batch, "fp32", device, "tensor")
        return step, f"2 x {batch} views of {stored * 7 // 8} px"
    model = model.to(device, memory_format=torch.channels_last).eval()
    inputs = model.normalization(torch.from_numpy(images[:batch, : stored * 7 // 8, : stored * 7 // 8]).to(device))

    def features() -> None:
        with torch.inference_mode():
            model.features(inputs)

    return features, f"{batch} images of {stored * 7 // 8} px"


# a small process, as a child's largest memory counts that of the process it was forked from
LARGEST_CHILD = """import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"""


def pre_processing(count: int) -> dict[str, Any]:
    """Two workers on random JPEGs: seconds, and the resident memory of the largest process."""
    with tempfile.TemporaryDirectory() as folder:
        raw = make_raw(Path(folder) / "cub200", count)
        outputs: list[str] = []
        command = [sys.executable, "-c", LARGEST_CHILD, *script_command(raw, 2)]
        spent = paired.seconds(lambda: outputs.append(subprocess.check_output(command, text=True)))
    return {"seconds": spent, "largest_process_mb": int(outputs[0]) / 1024, "what": "two workers, JPEGs of 500 x 375"}


def measured(stage: str, size: dict[str, int], tiny: bool) -> dict[str, Any]:
    """Seconds and peak memory of one stage at one size, in this process; the second of two calls of a network."""
    if stage == "pre-processing":
        return pre_processing(size["images"])
    network = stage in ("training step", "features")
    run, what = network_task(stage, size, tiny) if network else vectors_task(stage, size)
    spent: list[float] = []

    def timed() -> None:
        for _ in range(2 if network else 1):
            spent.append(paired.seconds(run))

    peak = paired.peak_extra_mb(timed)
    return {"seconds": spent[-1], "peak_mb_above_start": peak, "what": what}


def main() -> None:
    parser = paired.arguments("growth", " ".join(__doc__.split()))
    parser.add_argument("--one", help="one measurement (JSON: stage, size), printed as JSON")
    parser.add_argument("--stages", nargs="+", choices=list(SIZES), default=list(SIZES), help="which to measure")
    options = parser.parse_args()
    if options.one:
        asked = json.loads(options.one)
        print(json.dumps(measured(asked["stage"], asked["size"], options.tiny)))
        return
    sizes, base = (TINY, TINY_BASE) if options.tiny else (SIZES, BASE)
    result: dict[str, Any] = {"data": f"synthetic unit vectors in classes of {PER_CLASS}; random pixels", "base": base}
    for stage in options.stages:
        result[stage] = {}
        for what, values in sizes[stage].items():
            result[stage][what] = []
            for value in values:
                asked = json.dumps({"stage": stage, "size": base | {what: value}})
                command = [sys.executable, str(Path(__file__)), "--one", asked, *(["--tiny"] if options.tiny else [])]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                result[stage][what].append({what: value, **json.loads(done.stdout)})
                print(stage, result[stage][what][-1], file=sys.stderr)
    paired.write(result, options)


if __name__ == "__main__":
    main()
