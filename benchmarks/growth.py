"""How seconds and memory of search (Recall@K), mining (1-NN) and k-means grow with the number of rows."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import paired
import torch

from utils.clustering import kmeans
from utils.metrics import recall_at_k
from utils.search import nearest_neighbors

COLUMNS = 128
SIZES = (10_000, 100_000, 1_000_000)
TINY = (400,)
MOST_QUERIES = 20_000  # of a search; more rows than that are searched by a share of them


def measured(task: str, count: int) -> dict[str, Any]:
    """Seconds and peak memory of one task at one size, on synthetic embeddings, in this process."""
    embeddings, labels = paired.clustered_unit_vectors(count, COLUMNS, max(2, count // 50))
    rng = np.random.default_rng(1)
    queries = np.sort(rng.choice(count, min(count, MOST_QUERIES), replace=False))
    note = f"{len(queries)} of {count} rows are queries"
    if task == "recall" and len(queries) < count:
        # hits of a share of the queries: their 8 nearest rows besides themselves
        def run() -> None:
            found = nearest_neighbors(embeddings, 9, queries=embeddings[queries])[1].numpy()
            hit = (labels[found] == labels[queries, None]) & (found != queries[:, None])
            hit.any(1).mean()
    elif task == "recall":
        run, note = partial(recall_at_k, embeddings, labels), "every row is a query"
    elif task == "mining" and len(queries) < count:
        run = partial(nearest_neighbors, embeddings, 2, queries=embeddings[queries])
    elif task == "mining":
        run, note = partial(nearest_neighbors, embeddings), "every row is a query"
    else:
        run, note = partial(kmeans, embeddings, 100, max_iter=20), "100 clusters, one start, at most 20 iterations"
    spent: list[float] = []
    peak = paired.peak_extra_mb(lambda: spent.append(paired.seconds(run)))
    return {"rows": count, "seconds": spent[0], "peak_mb_above_embeddings": peak, "what": note}


def main() -> None:
    parser = paired.arguments("growth", __doc__)
    parser.add_argument("--one", nargs=2, metavar=("TASK", "ROWS"), help="one measurement, printed as JSON")
    options = parser.parse_args()
    if options.one:
        nearest_neighbors(torch.rand(300, 8))  # loads the libraries before memory is watched
        print(json.dumps(measured(options.one[0], int(options.one[1]))))
        return
    result: dict[str, Any] = {"data": f"synthetic clustered unit vectors, {COLUMNS} columns, 50 rows a class"}
    for task in ("recall", "mining", "k-means"):
        result[task] = []
        for count in TINY if options.tiny else SIZES:
            command = [sys.executable, str(Path(__file__)), "--one", task, str(count)]  # fresh: nothing left over
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            result[task].append(json.loads(done.stdout))
    paired.write(result, options)


if __name__ == "__main__":
    main()
