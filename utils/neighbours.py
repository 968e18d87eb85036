"""The nearest of many embeddings to queries: exact, or by an approximate index of faiss with its recall measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from utils.clustering import has_faiss
from utils.errors import UserError
from utils.search import in_order, nearest_neighbors

INDEXES = ("exact", "ivf", "hnsw")
HNSW_LINKS = 32
HNSW_BUILD = 80  # candidates looked at for every row that is linked
TRAINING_ROWS = 100  # for each cell of ivf
SAMPLE = 1000  # rows that the recall is measured on


@dataclass(frozen=True)
class Settings:
    """How to search. nprobe: cells that ivf looks into; ef_search: candidates that hnsw keeps."""

    index: str = "exact"
    nprobe: int = 16
    ef_search: int = 64
    seed: int = 0
    memory_mb: float = 512


class Neighbours:
    """Answers which rows (N, D) are nearest to queries, by Euclidean distance."""

    def __init__(self, rows: np.ndarray, settings: Settings) -> None:
        """rows: float32 or float16, perhaps memory-mapped; held once as float32.

        Raises UserError for an approximate index where faiss is not installed.
        """
        self.settings = settings
        self.rows = np.array(rows, dtype=np.float32, order="C")
        self.faiss = has_faiss()
        if settings.index != "exact" and not self.faiss:
            raise UserError(f"--index {settings.index}: needs faiss, which is not installed; use --index exact")
        self._approximate = None if settings.index == "exact" else self._build()

    @property
    def description(self) -> str:
        """The index in words."""
        if self._approximate is None:
            return f"exact search ({'faiss' if self.faiss else 'torch'})"
        if self.settings.index == "ivf":
            return f"ivf, {self._approximate.nlist} cells, {self._approximate.nprobe} looked into"
        return f"hnsw, {HNSW_LINKS} links, {self.settings.ef_search} candidates"

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Distances (Q, k) float32 and rows (Q, k) of the k nearest to each query (Q, D), nearest first.

        The distances are computed from the differences in float64. An approximate index that finds fewer than k gives
        -1 and infinity for the rest. k is at most N.
        """
        if self._approximate is not None:
            return self._in_order(queries, self._approximate.search(queries, k)[1])
        return self._exact(queries, k)

    def recall(self, k: int) -> tuple[float, int]:
        """The share of the k exactly nearest that the index finds, on how many rows drawn as queries.

        A row of the sample finds itself; that hit is not counted on either side.
        """
        sample = np.random.default_rng(self.settings.seed).permutation(len(self.rows))[:SAMPLE]
        k = min(k + 1, len(self.rows))
        exact, found = (search(self.rows[sample], k)[1] for search in (self._exact, self.search))
        hits = total = 0
        for own, right, rows in zip(sample, exact, found, strict=True):
            wanted = set(right.tolist()) - {own}
            hits += len(wanted & set(rows.tolist()))
            total += len(wanted)
        return hits / max(1, total), len(sample)

    def _exact(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if not self.faiss:
            squares, found = nearest_neighbors(
                torch.from_numpy(self.rows), k, queries=torch.from_numpy(queries), memory_mb=self.settings.memory_mb
            )
            return squares.sqrt().numpy(), found.numpy()
        import faiss

        return self._in_order(queries, faiss.knn(queries, self.rows, k)[1])

    def _in_order(self, queries: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        arrays = (torch.from_numpy(array) for array in (queries, self.rows, found))
        squares, rows = in_order(*arrays, self.settings.memory_mb)
        return squares.sqrt().numpy(), rows.numpy()

    def _build(self):
        import faiss

        count, dimension = self.rows.shape
        if self.settings.index == "hnsw":
            index = faiss.IndexHNSWFlat(dimension, HNSW_LINKS)
            index.hnsw.efConstruction, index.hnsw.efSearch = HNSW_BUILD, self.settings.ef_search
        else:
            cells = max(1, min(count // 39, round(4 * math.sqrt(count))))  # faiss wants 39 rows for each
            index = faiss.IndexIVFFlat(faiss.IndexFlatL2(dimension), dimension, cells)
            index.nprobe, index.cp.seed = min(self.settings.nprobe, cells), self.settings.seed + 1
            drawn = np.random.default_rng(self.settings.seed).permutation(count)[: TRAINING_ROWS * cells]
            index.train(self.rows[np.sort(drawn)])
        index.add(self.rows)
        return index
