"""Recall@K beside faiss: the search of this project, and that of faiss's exact index alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, if run as a script

from benchmarks import paired
from utils.errors import run_script
from utils.metrics import recall_at_k

SIZES = {"cub200": (5924, 128, 100), "car196": (8131, 128, 98), "sop": (60502, 128, 11316)}
TINY = {"tiny": (400, 16, 20)}  # rows, columns, classes


def ways_of(embeddings: np.ndarray, labels: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Return the ways; faiss finds 9 neighbors, the query among them, and counts no hits."""

    def search() -> None:
        index = faiss.IndexFlatL2(embeddings.shape[1])
        index.add(embeddings)
        index.search(embeddings, 9)

    return {"ours": lambda: recall_at_k(embeddings, labels), "faiss IndexFlatL2, k=9": search}


def main(argv: Sequence[str] | None = None) -> None:
    """Time both on embeddings of the sizes of three test halves, and write the result."""
    parser = paired.make_parser("recall", "Seconds of Recall@K beside those of faiss's search.")
    options = parser.parse(argv)
    result: dict[str, Any] = {"data": "synthetic unit vectors"}
    for name, size in (TINY if options.tiny else SIZES).items():
        embeddings, labels = paired.clustered_vectors(*size)
        ways = paired.in_turn(ways_of(embeddings, labels), options.repeats)
        result[name] = {"shape": list(embeddings.shape), "ways": ways}
    paired.write(result, options)


if __name__ == "__main__":
    run_script(main)
