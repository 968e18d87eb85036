"""Images that show the same, by their embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

BLOCK = 1024  # rows that are compared with all others at once


def duplicate_groups(
    rows: np.ndarray,
    contents: Sequence[str],
    similarity: float,
    progress: Callable[[Iterable, str], Iterable] | None = None,
) -> list[np.ndarray]:
    """Group rows that are duplicates of each other, directly or by way of others.

    Args:
        rows: (N, D) of unit length.
        contents: N hashes of the files, "" if unknown; equal ones make duplicates.
        similarity: the cosine from which on two rows are duplicates.
        progress: wraps the blocks of the comparison and a title.

    Returns the row numbers of each group of two or more, the largest group first.
    """
    first_of: dict[str, int] = {}
    pairs = [(row, first_of.setdefault(c, row)) for row, c in enumerate(contents) if c]
    starts = range(0, len(rows), BLOCK)
    for start in progress(starts, "comparing") if progress else starts:
        block = rows[start : start + BLOCK].astype(np.float32)
        for other in range(start, len(rows), 16 * BLOCK):
            cosines = block @ rows[other : other + 16 * BLOCK].astype(np.float32).T
            near = np.argwhere(cosines >= similarity) + np.array([start, other])
            pairs += near[near[:, 0] < near[:, 1]].tolist()
    links = np.array(pairs, np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(links), bool), links.T), shape=(len(rows), len(rows)))
    _, groups = connected_components(graph, directed=False)
    order = groups.argsort(kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    return sorted((group for group in members if len(group) > 1), key=len, reverse=True)
