"""Search for the nearest embeddings by faiss: exact, or approximate with a measured recall."""

from __future__ import annotations

import math

import numpy as np

from utils.errors import UserError

try:
    import faiss
except ImportError:  # a machine on which it cannot be installed
    faiss = None

KINDS = ("exact", "ivf", "hnsw")
HNSW_LINKS = 32
HNSW_BUILD_CANDIDATES = 80  # that are looked at for each row that is linked
IVF_TRAINING_ROWS = 100  # for each cell
IVF_LEAST_ROWS = 39  # for each cell; faiss warns of fewer
RECALL_QUERIES = 1000
BLOCK = 1 << 16  # rows


class Index:
    """Finds the rows that are nearest to queries, by Euclidean distance.

    Attributes:
        rows: float32 or float16 array (N, D), perhaps memory-mapped; faiss holds a float32 copy.
        description: the kind of the index in words.
    """

    def __init__(
        self,
        rows: np.ndarray,
        kind: str = "exact",
        *,
        nprobe: int = 16,
        ef_search: int = 64,
        seed: int = 0,
    ) -> None:
        """Build an index of one of `KINDS`.

        Args:
            nprobe: number of cells that an ivf index looks into.
            ef_search: number of candidates that an hnsw index keeps.
            seed: of the rows that train an ivf index, and of the queries that `recall` draws.

        Raises UserError if faiss is not installed.
        """
        if faiss is None:
            raise UserError("the search needs faiss; pip install faiss-cpu")
        self.rows = rows
        self.seed = seed
        self.description = "exact search"
        if kind == "exact":
            self._faiss = faiss.IndexFlatL2(rows.shape[1])
        elif kind == "ivf":
            self._faiss = self._train_ivf(nprobe)
        else:
            self._faiss = faiss.IndexHNSWFlat(rows.shape[1], HNSW_LINKS)
            self._faiss.hnsw.efConstruction = HNSW_BUILD_CANDIDATES
            self._faiss.hnsw.efSearch = ef_search
            self.description = f"hnsw, {HNSW_LINKS} links, {ef_search} candidates"
        self._fill(self._faiss)

    def _train_ivf(self, nprobe: int) -> faiss.IndexIVFFlat:
        n_rows, dimension = self.rows.shape
        n_cells = max(1, min(n_rows // IVF_LEAST_ROWS, round(4 * math.sqrt(n_rows))))
        index = faiss.IndexIVFFlat(faiss.IndexFlatL2(dimension), dimension, n_cells)
        index.nprobe = min(nprobe, n_cells)
        index.cp.seed = self.seed + 1
        training = np.sort(self._draw(IVF_TRAINING_ROWS * n_cells))
        index.train(self.rows[training].astype(np.float32))
        self.description = f"ivf, {n_cells} cells, {index.nprobe} looked into"
        return index

    def _fill(self, index: faiss.Index) -> None:
        for start in range(0, len(self.rows), BLOCK):
            index.add(self.rows[start : start + BLOCK].astype(np.float32))

    def _draw(self, count: int) -> np.ndarray:
        return np.random.default_rng(self.seed).permutation(len(self.rows))[:count]

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the k nearest rows of each query, nearest first.

        Args:
            queries: float32 (Q, D).
            k: at most N.

        Returns:
            Distances (Q, k) and row numbers (Q, k). An approximate index may find fewer than k;
            the remaining numbers are -1, at infinite distance.
        """
        _, numbers = self._faiss.search(queries, k)
        distances = np.empty(numbers.shape, np.float32)
        for query, query_distances, query_numbers in zip(queries, distances, numbers, strict=True):
            # faiss computes distances from products, in which those of twins drown
            differences = self.rows[query_numbers].astype(np.float32) - query
            query_distances[:] = np.linalg.norm(differences, axis=1)
        distances[numbers < 0] = np.inf
        order = distances.argsort(axis=1, kind="stable")
        return np.take_along_axis(distances, order, 1), np.take_along_axis(numbers, order, 1)

    def recall(self, k: int) -> tuple[float, int]:
        """Measure which share of the k exactly nearest rows the index finds.

        Rows drawn at random are the queries; that a row finds itself does not count.

        Returns:
            The share, in [0, 1], and the number of queries.
        """
        drawn = self._draw(RECALL_QUERIES)
        queries = self.rows[drawn].astype(np.float32)
        exact = faiss.IndexFlatL2(self.rows.shape[1])
        self._fill(exact)
        k = min(k + 1, len(self.rows))  # a row finds itself
        n_hits = 0
        n_nearest = 0
        _, expected = exact.search(queries, k)
        _, numbers = self._faiss.search(queries, k)
        for query, query_expected, query_numbers in zip(drawn, expected, numbers, strict=True):
            nearest = set(query_expected) - {query}
            n_hits += len(nearest & set(query_numbers))
            n_nearest += len(nearest)
        return n_hits / max(1, n_nearest), len(drawn)
