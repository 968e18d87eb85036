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
FACTORY_TRAINING_ROWS = 200_000
RECALL_QUERIES = 1000
CANDIDATES = 10  # times as many rows as are asked for, of an index whose codes round them
BLOCK = 1 << 16  # rows


def check_faiss() -> None:
    """Raise UserError if faiss is not installed."""
    if faiss is None:
        raise UserError("the search needs faiss; pip install faiss-cpu")


class Index:
    """Finds the rows that are nearest to queries, by Euclidean distance.

    Attributes:
        rows: float32 or float16 array (N, D), perhaps memory-mapped.
        faiss: faiss's index of a copy or of codes of the rows; None: exact search needs none.
        kind: one of `KINDS`, or a text of faiss's index factory.
        row_of: (M,) the row at each place of the faiss index, -1 for one that is gone; None: the
            places are those of the rows.
    """

    def __init__(
        self,
        rows: np.ndarray,
        kind: str = "exact",
        *,
        nprobe: int = 16,
        ef_search: int = 64,
        seed: int = 0,
        opened: faiss.Index | None = None,
        row_of: np.ndarray | None = None,
    ) -> None:
        """Build an index, or take one that was opened.

        Args:
            nprobe: number of cells that an ivf index looks into.
            ef_search: number of candidates that an hnsw index keeps.
            seed: of the rows that train an index, and of the queries that `recall` draws.

        Raises UserError if faiss is not installed, or does not know the kind.
        """
        check_faiss()
        self.rows = rows
        self.kind = kind
        self.seed = seed
        self.row_of = row_of
        self.faiss = opened or (None if kind == "exact" else self._built())
        self.cells = faiss.try_extract_index_ivf(self.faiss) if self.faiss else None
        if self.cells is not None:
            self.cells.nprobe = min(nprobe, self.cells.nlist)
        if hasattr(self.faiss, "hnsw"):
            self.faiss.hnsw.efSearch = ef_search

    @property
    def description(self) -> str:
        """The kind of the index, and how it searches, in words."""
        if self.kind == "exact":
            return "exact search"
        words = [self.kind]
        if self.cells is not None:
            words += [f"{self.cells.nlist} cells", f"{self.cells.nprobe} looked into"]
        if hasattr(self.faiss, "hnsw"):
            candidates = self.faiss.hnsw.efSearch
            words += [f"{HNSW_LINKS} links" * (self.kind == "hnsw"), f"{candidates} candidates"]
        return ", ".join(filter(None, words))

    def _built(self) -> faiss.Index:
        dimension = self.rows.shape[1]
        try:
            if self.kind == "ivf":
                index = self._train_ivf()
            elif self.kind == "hnsw":
                index = faiss.IndexHNSWFlat(dimension, HNSW_LINKS)
                index.hnsw.efConstruction = HNSW_BUILD_CANDIDATES
            else:
                index = self._by_factory()
            self.add(index, self.rows)
        except RuntimeError as error:
            reason = str(error).partition("Error: ")[2] or str(error)
            raise UserError(
                f"faiss cannot make an index {self.kind!r} of {len(self.rows)} rows of "
                f"{self.rows.shape[1]} numbers ({' '.join(reason.split())[:200]}); choose "
                f"{', '.join(KINDS)}, or another text of its index factory"
            ) from None
        return index

    def _by_factory(self) -> faiss.Index:
        index = faiss.index_factory(self.rows.shape[1], self.kind)
        if not index.is_trained:
            training = np.sort(self._draw(FACTORY_TRAINING_ROWS))
            index.train(self.rows[training].astype(np.float32))
        return index

    def _train_ivf(self) -> faiss.Index:
        n_rows, dimension = self.rows.shape
        n_cells = max(1, min(n_rows // IVF_LEAST_ROWS, round(4 * math.sqrt(n_rows))))
        index = faiss.IndexIVFFlat(faiss.IndexFlatL2(dimension), dimension, n_cells)
        index.cp.seed = self.seed + 1
        training = np.sort(self._draw(IVF_TRAINING_ROWS * n_cells))
        index.train(self.rows[training].astype(np.float32))
        return index

    @staticmethod
    def add(index: faiss.Index, rows: np.ndarray) -> None:
        """Add rows (n, D) to a faiss index, in blocks."""
        for start in range(0, len(rows), BLOCK):
            index.add(rows[start : start + BLOCK].astype(np.float32))

    def _draw(self, count: int) -> np.ndarray:
        return np.random.default_rng(self.seed).permutation(len(self.rows))[:count]

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the k nearest rows of each query, nearest first, by the distances to the rows.

        Args:
            queries: float32 (Q, D).
            k: at most N. An index of the factory, whose codes may round the rows, is asked for
                CANDIDATES times as many, of which the nearest are kept.

        Returns:
            Distances (Q, k) and row numbers (Q, k). An approximate index may find fewer than k;
            the remaining numbers are -1, at infinite distance.
        """
        is_rounded = self.kind not in KINDS  # codes of faiss's factory
        n_candidates = min(k * (CANDIDATES if is_rounded else 1), len(self.rows))
        numbers = self._nearest(queries, n_candidates)
        distances = np.empty(numbers.shape, np.float32)
        for query, query_distances, query_numbers in zip(queries, distances, numbers, strict=True):
            # faiss computes distances from products, in which those of twins drown
            differences = self.rows[query_numbers].astype(np.float32) - query
            query_distances[:] = np.linalg.norm(differences, axis=1)
        distances[numbers < 0] = np.inf
        order = distances.argsort(axis=1, kind="stable")[:, :k]
        return np.take_along_axis(distances, order, 1), np.take_along_axis(numbers, order, 1)

    def _nearest(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Return row numbers (Q, k), nearest first; -1 where the index finds no more."""
        if self.faiss is None:
            return nearest_exactly(self.rows, queries, k)
        if self.row_of is None:
            return self.faiss.search(queries, k)[1]
        n_gone = int((self.row_of < 0).sum())
        n_places = k + min(n_gone, k + 20)  # a tenth of the rows is gone, at most
        _, places = self.faiss.search(queries, min(n_places, len(self.row_of)))
        rows = np.where(places < 0, -1, self.row_of[places])
        order = (rows < 0).argsort(axis=1, kind="stable")  # those that are gone come last
        numbers = np.take_along_axis(rows, order, 1)[:, :k]
        return np.pad(numbers, ((0, 0), (0, k - numbers.shape[1])), constant_values=-1)

    def recall(self, k: int) -> tuple[float, int]:
        """Measure which share of the k exactly nearest rows the index finds.

        Rows drawn at random are the queries; that a row finds itself does not count.

        Returns:
            The share, in [0, 1], and the number of queries.
        """
        drawn = self._draw(RECALL_QUERIES)
        queries = self.rows[drawn].astype(np.float32)
        k = min(k + 1, len(self.rows))  # a row finds itself
        n_hits = 0
        n_nearest = 0
        expected = nearest_exactly(self.rows, queries, k)
        _, numbers = self.search(queries, k)
        for query, query_expected, query_numbers in zip(drawn, expected, numbers, strict=True):
            nearest = set(query_expected) - {query}
            n_hits += len(nearest & set(query_numbers))
            n_nearest += len(nearest)
        return n_hits / max(1, n_nearest), len(drawn)


def nearest_exactly(rows: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """Find the numbers (Q, k) of the rows (N, D) that are nearest to queries, without a copy."""
    heap = faiss.ResultHeap(len(queries), k)
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK].astype(np.float32)
        distances, numbers = faiss.knn(queries, block, min(k, len(block)))
        heap.add_result(distances, numbers + start)
    heap.finalize()
    return heap.I


def approximate_neighbors(rows: np.ndarray, k: int, nprobe: int = 16) -> np.ndarray:
    """Find about the k nearest other rows of each row, by an ivf index, in time N sqrt(N).

    Args:
        rows: float32 (N, D), N > k.
        nprobe: number of cells that are looked into for each row.

    Returns row numbers (N, k), nearest first; the row's own where the cells hold no more.
    """
    index = Index(rows, "ivf", nprobe=nprobe)
    cell_of = index.faiss.quantizer.search(rows, 1)[1][:, 0]
    order = cell_of.argsort(kind="stable")  # what a cell holds then stays in the cache
    numbers = np.empty((len(rows), k + 1), np.int64)
    numbers[order] = index.faiss.search(rows[order], k + 1)[1]
    itself = np.arange(len(rows))[:, None]
    comes_last = (numbers == itself) | (numbers < 0)
    places = comes_last.argsort(axis=1, kind="stable")
    numbers = np.take_along_axis(numbers, places, 1)[:, :k]
    return np.where(numbers < 0, itself, numbers)
