"""Exact nearest-neighbour search (Euclidean) by blocks: memory is bounded, no N x N matrix ever exists.

Distances are compared through a score that one matrix product gives, `score(q, x) = q.x - |q|^2/2 - |x|^2/2`, which is
`-|q - x|^2 / 2`: the nearest row has the largest score. Scores are float32 with a known error bound; pairs that the
bound leaves open are compared by their differences in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

GROUP = 64  # columns whose largest score is looked at before the scores themselves
CPU_SIDE = 1024  # rows and columns of a block of scores: 4 MiB stay in the cache of the cores
GPU_SIDE = 8192
FAR = 1e30  # |x|^2 / 2 of the rows that fill the last group: never near anything


def as_matrix(features: Tensor | np.ndarray, name: str = "features") -> Tensor:
    """`features` as a detached float32 or float64 tensor (N, D) on its own device.

    Raises ValueError for another shape, for whole numbers and for NaN or infinite values.
    """
    matrix = torch.as_tensor(features).detach()
    if matrix.ndim != 2 or matrix.shape[1] == 0:
        raise ValueError(f"{name} must have the shape (N, D) with D >= 1, not {tuple(matrix.shape)}")
    if not matrix.is_floating_point():
        raise ValueError(f"{name} must be floating-point numbers, not {matrix.dtype}")
    if matrix.dtype not in (torch.float32, torch.float64):
        matrix = matrix.float()
    finite = torch.isfinite(matrix.sum(dtype=torch.float64))  # one cheap pass; only an odd sum asks for a closer look
    bad = 0 if finite else int((~torch.isfinite(matrix)).any(1).sum())
    if bad:
        raise ValueError(f"{name} hold NaN or infinite values in {bad} of {len(matrix)} rows")
    return matrix


@contextmanager
def full_float32() -> Iterator[None]:
    """Matrix products in true float32, whatever precision training asked for (TF32, bfloat16, autocast); no grad."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def frame_of(matrix: Tensor) -> tuple[Tensor, float]:
    """The shift (D,) float64 and the power of two that bring rows (N, D) near the origin and to a size near 1.

    Neither changes who is nearest to whom; both keep float32 accurate for rows that are far out, huge or tiny.
    """
    centre = matrix.mean(0, dtype=torch.float64)
    spread = max(float(matrix.amax() - centre.min()), float(centre.max() - matrix.amin()))
    return centre, 2.0 ** -math.frexp(spread)[1] if spread > 0 else 1.0


def framed(matrix: Tensor, frame: tuple[Tensor, float], out: Tensor | None = None) -> Tensor:
    """Rows (N, D) in a frame, float32, a part at a time (the float64 in between stays small)."""
    out = torch.empty(matrix.shape, device=matrix.device) if out is None else out
    for start in range(0, len(matrix), 8192):
        part = slice(start, start + 8192)
        out[part] = (matrix[part] - frame[0]).mul_(frame[1])
    return out


class _Rows:
    """Rows (M, D + 2) ready for scores, M being N filled up to a whole number of groups."""

    def __init__(self, matrix: Tensor, frame: tuple[Tensor, float], order: Tensor | None = None) -> None:
        count, columns = matrix.shape
        padded = -(-max(count, 1) // GROUP) * GROUP
        self.right = torch.zeros(padded, columns + 2, device=matrix.device)
        plain = framed(matrix, frame, self.right[:count, :columns])
        if order is not None:
            plain.copy_(plain[order])
        self.lengths = plain.square().sum(1).sqrt()
        self.lengths = torch.nn.functional.pad(self.lengths, (0, padded - count))
        self.right[:, -2] = self.lengths.square().mul(-0.5)
        self.right[count:, -2] = -FAR
        self.right[:, -1] = 1
        self.unit = (columns + 16) * 2.0**-23

    def left(self, part: slice | Tensor) -> Tensor:
        """These rows as queries (B, D + 2): their product with `right` is the score."""
        rows = self.right[part]
        return torch.cat([rows[:, :-2], rows[:, -1:], rows[:, -2:-1]], 1)

    def blocks(self, side: int, low: int = 0, high: int | None = None) -> list[slice]:
        high = len(self.right) if high is None else high
        return [slice(start, min(start + side, high)) for start in range(low, high, side)]


def _error(queries: _Rows, part: slice | Tensor, rows: _Rows, tile: slice) -> Tensor:
    """Bound (B, 1) on the error of the scores of some queries with a tile of rows.

    Rounding the inputs and the norms and D + 2 products summed in any order err by less than (D + 16) units of 2^-24
    times (|q| + |x|)^2 (Higham, Accuracy and Stability of Numerical Algorithms, 3.1); `unit` is twice that.
    """
    return (queries.lengths[part] + rows.lengths[tile].max()).square().mul(rows.unit)[:, None]


def _side(memory_mb: float, device: torch.device) -> int:
    """Rows of a square block of scores, a multiple of GROUP; about eight float32 blocks of that size fit memory_mb."""
    fits = math.isqrt(max(0, int(memory_mb * 2**20 / 32))) // GROUP * GROUP
    return max(GROUP, min(fits, CPU_SIDE if device.type == "cpu" else GPU_SIDE))


def _group_tops(scores: Tensor) -> Tensor:
    """Largest score (B, T / GROUP) of each group of columns of scores (B, T)."""
    return scores.unflatten(1, (-1, GROUP)).amax(2)


def _passing(scores: Tensor, tops: Tensor, bar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and value (P,) of the scores (B, T) that reach their row's bar (B, 1).

    Few do, so only the groups of columns whose largest score reaches it are read again.
    """
    rows, groups = (tops >= bar).nonzero(as_tuple=True)
    values = scores.unflatten(1, (-1, GROUP))[rows, groups]  # (groups that pass, GROUP)
    place, lane = (values >= bar[rows]).nonzero(as_tuple=True)
    return rows[place], groups[place] * GROUP + lane, values[place, lane]


def squared_distances(left: Tensor, right: Tensor, pairs: tuple[Tensor, Tensor], memory_mb: float = 128) -> Tensor:
    """float64 squared distances (P,) of left[pairs[0]] and right[pairs[1]], from the differences themselves."""
    step = max(1, min(65536, int(memory_mb * 2**20 / (32 * left.shape[1]))))
    out = torch.empty(len(pairs[0]), dtype=torch.float64, device=left.device)
    for start in range(0, len(out), step):
        rows, columns = (index[start : start + step] for index in pairs)
        out[start : start + step] = (left[rows].double() - right[columns]).square_().sum(1)
    return out


class _Nearest:
    """The nearest row of each query so far, from pairs that are handed over in any order."""

    def __init__(self, left: Tensor, right: Tensor, memory_mb: float) -> None:
        self.left, self.right, self.memory_mb = left, right, memory_mb / 4
        self.distances = torch.full((len(left),), torch.inf, dtype=torch.float64, device=left.device)
        self.indices = torch.full((len(left),), len(right), device=left.device)
        self.waiting: list[tuple[Tensor, Tensor]] = []
        self.count = 0

    def add(self, queries: Tensor, rows: Tensor) -> None:
        """Consider pairs (P,); they wait until it is worth a pass."""
        self.waiting.append((queries, rows))
        self.count += len(queries)
        if self.count > self.memory_mb * 2**20 / 64:
            self.settle()

    def settle(self) -> None:
        """Compare what waits in float64; at equal distance the row of lower index is nearer."""
        if not self.waiting:
            return
        queries, rows = (torch.cat(column) for column in zip(*self.waiting, strict=True))
        self.waiting, self.count = [], 0
        distances = squared_distances(self.left, self.right, (queries, rows), self.memory_mb)
        before = self.distances[queries]
        self.distances.scatter_reduce_(0, queries, distances, "amin")
        self.indices[queries[self.distances[queries] < before]] = len(self.right)
        equal = distances == self.distances[queries]
        self.indices.scatter_reduce_(0, queries[equal], rows[equal], "amin")


def nearest_neighbors(
    features: Tensor | np.ndarray, k: int = 1, *, queries: Tensor | np.ndarray | None = None, memory_mb: float = 512
) -> tuple[Tensor, Tensor]:
    """The k nearest rows of each query, nearest first.

    features: (N, D) floating point; queries: (Q, D), or None: each row searches the other rows, itself left out by
    index. Returns squared Euclidean distances (Q, k) float32 and row indices (Q, k) int64 on the features' device.
    k = 1 is exact: the result of a search in float64, the lower index at equal distance. For k > 1 the rows are
    chosen by float32 scores; their distances come from the differences and decide the order, then the index.
    Memory: two float32 copies of the inputs and at most memory_mb MiB beside them.
    Raises ValueError for a wrong shape, non-finite values, or k outside 1 .. number of candidates.
    """
    base = as_matrix(features)
    asked = base if queries is None else as_matrix(queries, "queries").to(base.device)
    candidates = len(base) - (queries is None)
    if asked.shape[1] != base.shape[1]:
        raise ValueError(f"queries have {asked.shape[1]} columns, features {base.shape[1]}")
    if not 1 <= k <= candidates:
        raise ValueError(f"k must lie in 1 .. {candidates} (the rows that a query can find), not {k}")
    with full_float32():
        frame = frame_of(base)
        rows = _Rows(base, frame)
        left = rows if queries is None else _Rows(asked, frame)
        if k == 1:
            nearest = _nearest(left, rows, _Nearest(asked, base, memory_mb), queries is None)
            return nearest.distances.float()[:, None], nearest.indices[:, None]
        indices = _top_rows(left, rows, k, (len(asked), len(base)), queries is None, memory_mb)
        return in_order(asked, base, indices, memory_mb)


def _nearest(left: _Rows, rows: _Rows, nearest: _Nearest, own: bool) -> _Nearest:
    """Find the nearest row of every query; `own`: the queries are the rows, none finds itself."""
    side = _side(nearest.memory_mb * 4, rows.right.device)
    for block in left.blocks(side):
        queries = left.left(block)
        best = torch.full((len(queries), 1), -FAR / 2, device=queries.device)
        for tile in rows.blocks(side):
            scores = queries @ rows.right[tile].T  # (B, T)
            if own:
                _hide_own(scores, block.start - tile.start)
            tops = _group_tops(scores)
            best = torch.maximum(best, tops.amax(1, keepdim=True))
            error = _error(left, block, rows, tile)
            found, columns, _ = _passing(scores, tops, best - 2 * error)
            real = found + block.start < len(nearest.left)
            nearest.add(found[real] + block.start, columns[real] + tile.start)
    nearest.settle()
    return nearest


def _top_rows(left: _Rows, rows: _Rows, k: int, counts: tuple[int, int], own: bool, memory_mb: float) -> Tensor:
    """Indices (Q, k) of the k rows with the largest scores, in no order; `counts` are the true numbers of both."""
    side = _side(memory_mb / 4, rows.right.device)
    parts = []
    for block in left.blocks(side, high=counts[0]):
        queries = left.left(block)
        best = queries.new_empty(len(queries), 0)
        found = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
        for tile in rows.blocks(side, high=counts[1]):
            scores = queries @ rows.right[tile].T  # (B, T)
            if own:
                _hide_own(scores, block.start - tile.start)
            top, index = scores.topk(min(k, scores.shape[1]), dim=1)
            best, found = torch.cat([best, top], 1), torch.cat([found, index + tile.start], 1)
            best, pick = best.topk(min(k, best.shape[1]), dim=1)
            found = found.gather(1, pick)
        parts.append(found)
    return torch.cat(parts)


def in_order(asked: Tensor, base: Tensor, indices: Tensor, memory_mb: float) -> tuple[Tensor, Tensor]:
    """True squared distances (Q, k) float32 of the rows found, and the rows, by distance and then by index.

    A row of -1 stands for none: it comes last, at an infinite distance.
    """
    indices = torch.where(indices < 0, len(base), indices).sort(1).values
    queries = torch.arange(len(indices), device=indices.device).repeat_interleave(indices.shape[1])
    pairs = (queries, indices.flatten().clamp(max=len(base) - 1))
    distances = squared_distances(asked, base, pairs, memory_mb / 4).view(indices.shape)
    distances, order = distances.masked_fill_(indices == len(base), torch.inf).sort(dim=1, stable=True)
    indices = indices.gather(1, order)
    return distances.float(), indices.masked_fill(indices == len(base), -1)


def _hide_own(scores: Tensor, offset: int) -> None:
    """Push scores[i, i + offset] out of reach where that column exists: a row never finds itself."""
    low, high = max(0, -offset), min(scores.shape[0], scores.shape[1] - offset)
    if low < high:
        part = torch.arange(low, high, device=scores.device)
        scores[part, part + offset] = -FAR


def first_hit_ranks(
    features: Tensor | np.ndarray,
    labels: Tensor,
    limit: int,
    *,
    queries: Tensor | np.ndarray | None = None,
    query_labels: Tensor | None = None,
    memory_mb: float = 512,
) -> Tensor:
    """For each query the number of rows nearer to it than the nearest row with its label.

    features (N, D) floating point, labels (N,) integers on the same device; queries (Q, D) with query_labels (Q,), or
    None: each row searches the other rows. Returns ranks (Q,) int64, `limit` where there are that many or more, or
    where no row that it can find has the label. A lower index counts as nearer at equal distance. Exact, as a search
    in float64 would have it. This needs no list of neighbours: the nearest row of the same label sets a threshold, and
    each block of scores (of rows among themselves computed once for both of its sides) is only asked what in it passes.
    Memory as for `nearest_neighbors`.
    """
    matrix = as_matrix(features)
    asked = matrix if queries is None else as_matrix(queries, "queries").to(matrix.device)
    with full_float32():
        frame = frame_of(matrix if queries is None else torch.cat([matrix, asked]))
        rows = _ByLabel(matrix, labels, frame)
        left = rows if queries is None else _ByLabel(asked, query_labels.to(matrix.device), frame)
        ranks = _HitSearch(left, rows, frame[1], limit, memory_mb).ranks()
    return torch.empty_like(left.order).scatter_(0, left.order, ranks)


class _ByLabel:
    """Rows sorted by label, so that a label's rows are neighbours; places are in that order, indices as given."""

    def __init__(self, matrix: Tensor, labels: Tensor, frame: tuple[Tensor, float]) -> None:
        self.matrix, self.order = matrix, torch.argsort(labels, stable=True)
        self.rows = _Rows(matrix, frame, self.order)
        pad = len(self.rows.right) - len(matrix)
        self.labels = torch.nn.functional.pad(labels[self.order], (0, pad), value=int(labels.max()) + 1)

    def __len__(self) -> int:
        return len(self.matrix)


class _HitSearch:
    """Queries `left` search `right`, which may be the same rows: then none finds itself. `scale` is their frame's."""

    def __init__(self, left: _ByLabel, right: _ByLabel, scale: float, limit: int, memory_mb: float) -> None:
        self.left, self.right, self.own = left, right, left is right
        self.scale, self.limit, self.memory_mb = scale, limit, memory_mb
        self.side = _side(memory_mb, right.matrix.device)
        # the places on the right between which the label of each place on the left lies
        self.starts = torch.searchsorted(right.labels, left.labels).tolist()
        self.ends = torch.searchsorted(right.labels, left.labels, right=True).tolist()

    def ranks(self) -> Tensor:
        """Ranks (Q,) by place."""
        left, right = self.left, self.right
        nearest = self._nearest_of_label()
        count = len(left)
        self.best, self.found = nearest.distances[left.order], nearest.indices[left.order]
        self.counts = torch.zeros(len(left.labels), dtype=torch.int64, device=left.order.device)
        self.counts[:count][self.best == torch.inf] = self.limit
        self.counts[count:] = self.limit
        self.threshold = torch.zeros(len(self.counts), 1, device=left.order.device)  # as a score
        self.threshold[:count, 0] = self.best.mul(-0.5 * self.scale**2).float()
        self.threshold[self.counts >= self.limit] = torch.inf
        tiles = right.rows.blocks(self.side)
        for i, block in enumerate(left.rows.blocks(self.side)):
            queries = left.rows.left(block)
            for tile in tiles[i:] if self.own else tiles:
                scores = queries @ right.rows.right[tile].T  # (B, T)
                self._hide_same(scores, block, tile)
                self._count(scores, _group_tops(scores), block, tile)
                if self.own and tile != block:  # the same scores with the sides exchanged
                    tops = scores.unflatten(0, (-1, GROUP)).amax(1).T  # a transposed block is slow to reduce
                    self._count(scores.T, tops, tile, block)
        return self.counts[:count].clamp_(max=self.limit)

    def _nearest_of_label(self) -> _Nearest:
        """The nearest row of the same label, by index."""
        left, right = self.left, self.right
        nearest = _Nearest(left.matrix, right.matrix, self.memory_mb)
        side = min(self.side, 4 * GROUP)
        for block in left.rows.blocks(side, high=len(left)):
            queries, labels = left.rows.left(block), left.labels[block, None]
            low, high = self.starts[block.start] // GROUP * GROUP, -(-self.ends[block.stop - 1] // GROUP) * GROUP
            best = torch.full((len(queries), 1), -FAR / 2, device=queries.device)
            for tile in right.rows.blocks(4 * side, low, high):
                scores = queries @ right.rows.right[tile].T  # (B, T)
                scores.masked_fill_(labels != right.labels[tile], -FAR)
                if self.own:
                    _hide_own(scores, block.start - tile.start)
                tops = _group_tops(scores)
                best = torch.maximum(best, tops.amax(1, keepdim=True))
                bar = best - 2 * _error(left.rows, block, right.rows, tile)
                found, columns, _ = _passing(scores, tops, bar)
                nearest.add(left.order[found + block.start], right.order[columns + tile.start])
        nearest.settle()
        return nearest

    def _hide_same(self, scores: Tensor, block: slice, tile: slice) -> None:
        """Push the scores of rows of the same label out of reach; only a few tiles of a block hold any."""
        for start in range(block.start, block.stop, 2 * GROUP):
            stop = min(start + 2 * GROUP, block.stop)
            low, high = max(self.starts[start], tile.start), min(self.ends[stop - 1], tile.stop)
            if low < high:
                part = scores[start - block.start : stop - block.start, low - tile.start : high - tile.start]
                part.masked_fill_(self.left.labels[start:stop, None] == self.right.labels[low:high], -FAR)

    def _count(self, scores: Tensor, tops: Tensor, block: slice, tile: slice) -> None:
        """Add to the counts of the queries of a block the rows of a tile that are nearer than their threshold."""
        error = _error(self.left.rows, block, self.right.rows, tile)
        threshold = self.threshold[block]
        found, columns, values = _passing(scores, tops, threshold - error)
        if len(found) == 0:
            return
        counts = self.counts[block]
        nearer = values > (threshold + error)[found, 0]
        queries, columns = found[~nearer] + block.start, self.right.order[columns[~nearer] + tile.start]
        pairs = (self.left.order[queries], columns)
        distances = squared_distances(self.left.matrix, self.right.matrix, pairs, self.memory_mb / 4)
        best = self.best[queries]
        first = (distances < best) | ((distances == best) & (columns < self.found[queries]))
        counts += torch.bincount(found[nearer], minlength=len(counts))
        counts += torch.bincount(queries[first] - block.start, minlength=len(counts))
        threshold[counts >= self.limit] = torch.inf  # nothing more to find out about these
