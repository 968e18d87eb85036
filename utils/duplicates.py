"""Images that show the same, by their embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from utils.progress import progress

BLOCK = 1024  # rows that are compared with all others at once
MOST_PAIRS = 10_000_000  # that are held, beside a link for each row
ROUNDING = 1e-6  # of a cosine in float32


def duplicate_groups(
    rows: np.ndarray, contents: Sequence[str], similarity: float
) -> list[np.ndarray]:
    """Group rows that are duplicates of each other, directly or by way of others.

    Args:
        rows: (N, D) of unit length.
        contents: N hashes of the files, "" if unknown; equal ones make duplicates.
        similarity: the cosine from which on two rows are duplicates.

    Returns the row numbers of each group of two or more, the largest group first.
    """
    first_of: dict[str, int] = {}
    equal = [(row, first_of.setdefault(c, row)) for row, c in enumerate(contents) if c]
    links = _Links(len(rows))
    links.add(np.array(equal, np.int64).reshape(-1, 2))
    for start in progress(range(0, len(rows), BLOCK), "comparing"):
        block = rows[start : start + BLOCK].astype(np.float32)
        for other in range(start, len(rows), 16 * BLOCK):
            cosines = block @ rows[other : other + 16 * BLOCK].astype(np.float32).T
            near = np.argwhere(cosines >= similarity - ROUNDING) + np.array([start, other])
            links.add(near[near[:, 0] < near[:, 1]])
    groups = links.components()
    order = groups.argsort(kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    return sorted((group for group in members if len(group) > 1), key=len, reverse=True)


class _Links:
    """Pairs of rows, of which no more are kept than tell what hangs together."""

    def __init__(self, n_rows: int) -> None:
        self._n_rows = n_rows
        self._pairs: list[np.ndarray] = []
        self._count = 0

    def add(self, pairs: np.ndarray) -> None:
        """Add pairs of row numbers (n, 2)."""
        self._pairs.append(pairs)
        self._count += len(pairs)
        if self._count > MOST_PAIRS:
            groups = self.components()
            first = np.unique(groups, return_index=True)[1]  # of each component
            self._pairs = [np.stack([np.arange(self._n_rows), first[groups]], 1)]
            self._count = self._n_rows

    def components(self) -> np.ndarray:
        """Return the number of the component of each row."""
        pairs = np.concatenate(self._pairs)
        shape = (self._n_rows, self._n_rows)
        graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=shape)
        return connected_components(graph, directed=False)[1]
