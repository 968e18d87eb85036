"""Two or more ways timed in turn, with the facts of the machine, written as JSON."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.devices import machine
from utils.files import write_json
from utils.options import Parser, path_name, whole

RESULTS = Path(__file__).resolve().parents[1] / "misc" / "benchmarks"


def make_parser(name: str, description: str) -> Parser:
    """Make a parser with the options of all benchmarks; `name` is that of the result."""
    parser = Parser(description)
    add = parser.add_argument
    add("--out", type=path_name, help=f"JSON file to write (default: misc/benchmarks/{name}.json)")
    add("--tiny", action="store_true", help="small sizes, in seconds; written to --out only")
    add("--repeats", type=whole(1), default=5, help="turns of each way")
    parser.set_defaults(default_out=RESULTS / f"{name}.json")
    return parser


def seconds(run: Callable[[], Any]) -> float:
    """Measure one call, until all work that it gave a GPU is done."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else int
    wait()
    started = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - started


def in_turn(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, Any]]:
    """Time each way in turn (A, B, A, B ...), so that other work of the machine hits all of them.

    The first turn warms up and does not count. Returns median and all seconds of each way.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + repeats):
        for name, run in ways.items():
            taken[name].append(seconds(run))
    return {name: summary(times[1:]) for name, times in taken.items()}


def summary(times: list[float]) -> dict[str, Any]:
    """Return the median of seconds, and all of them."""
    return {"median_s": statistics.median(times), "all_s": [round(time, 5) for time in times]}


def clustered_vectors(n_rows: int, n_columns: int, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw unit vectors (N, D) float32 around random class centers, and their labels (N,)."""
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((n_classes, n_columns), dtype=np.float32)
    labels = rng.integers(0, n_classes, n_rows)
    vectors = centers[labels] + 1.5 * rng.standard_normal((n_rows, n_columns), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), labels


def write(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Print a result with the machine's facts, and write it to --out or to its usual place."""
    result = {"machine": machine(), "repeats": options.repeats, **result}
    print(json.dumps(result, indent=1))
    if options.out or not options.tiny:
        path = Path(options.out or options.default_out)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
