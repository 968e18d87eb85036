"""Recall@K beside faiss IndexFlat and pytorch-metric-learning: seconds, and memory above the embeddings."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paired
import torch

from utils.metrics import recall_at_k

SIZES = {"cub200": (5924, 128, 100), "car196": (8131, 128, 98), "sop": (60502, 128, 11316)}
TINY = {"tiny": (400, 16, 20)}


def ways(embeddings: np.ndarray, labels: np.ndarray, with_pml: bool) -> dict[str, Callable[[], Any]]:
    """The ways to R@1, 2, 4, 8, ours first; the faiss ones search alone (9 neighbours), without counting hits."""
    found: dict[str, Callable[[], Any]] = {"ours": lambda: recall_at_k(embeddings, labels)}
    if paired.installed("faiss"):
        import faiss

        def flat(kind: str) -> None:
            index = getattr(faiss, kind)(embeddings.shape[1])
            index.add(embeddings)
            index.search(embeddings, 9)

        found["faiss IndexFlatL2, k=9"] = lambda: flat("IndexFlatL2")
        found["faiss IndexFlatIP, k=9"] = lambda: flat("IndexFlatIP")
    if with_pml and paired.installed("faiss") and paired.installed("pytorch_metric_learning"):
        from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

        tensors = torch.from_numpy(embeddings), torch.from_numpy(labels)
        for name, options in (("default k", {}), ("k=8", {"k": 8})):
            calculator = AccuracyCalculator(include=("precision_at_1",), device=torch.device("cpu"), **options)
            key = f"pytorch-metric-learning precision_at_1, {name}"
            found[key] = lambda calculator=calculator: calculator.get_accuracy(*tensors)
    return found


def peak_in_fresh_process(size: tuple[int, int, int]) -> float:
    """MiB above the embeddings at most, measured where nothing else has run."""
    command = [sys.executable, str(Path(__file__)), "--peak", *map(str, size)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def report_peak(size: list[int]) -> None:
    """Print the peak of one call; a small call before it loads the libraries."""
    embeddings, labels = paired.clustered_unit_vectors(*size)
    recall_at_k(embeddings[:200], labels[:200])
    print(json.dumps(paired.peak_extra_mb(lambda: recall_at_k(embeddings, labels))))


def main() -> None:
    parser = paired.arguments("recall", __doc__)
    parser.add_argument("--embeddings", type=Path, help="real embeddings (N, D) .npy instead of synthetic ones")
    parser.add_argument("--labels", type=Path, help="their labels (N,) .npy")
    parser.add_argument("--peak", type=int, nargs=3, metavar=("N", "D", "CLASSES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if (options.embeddings is None) != (options.labels is None):
        parser.error("--embeddings and --labels belong together")
    if options.peak:
        report_peak(options.peak)
        return
    result: dict[str, Any] = {"data": "synthetic clustered unit vectors"}
    if options.embeddings:
        embeddings, labels = np.load(options.embeddings).astype(np.float32), np.load(options.labels)
        result["data"] = options.embeddings.name
        sets = {options.embeddings.stem: (embeddings, labels)}
    else:
        sizes = TINY if options.tiny else SIZES
        sets = {name: paired.clustered_unit_vectors(*size) for name, size in sizes.items()}
        result["peak_mb_above_embeddings"] = {name: peak_in_fresh_process(size) for name, size in sizes.items()}
    for name, (embeddings, labels) in sets.items():
        small = len(embeddings) < 20000
        result[name] = {
            "shape": [*embeddings.shape],
            "classes": len(np.unique(labels)),
            "recall": recall_at_k(embeddings, labels),
            "ways": paired.in_turn(ways(embeddings, labels, with_pml=small), options.repeats if small else 3),
        }
    paired.write(result, options)


if __name__ == "__main__":
    main()
