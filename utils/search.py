"""Exact nearest-neighbour search (Euclidean) by blocks: memory is bounded, no N x N matrix ever exists.

Distances are compared through a score that one matrix product gives: for a query q and a row x,
`score = q.x - |x|^2 / 2`, and `|q - x|^2 = |q|^2 - 2 score`, so the nearest row has the largest score.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

CPU_BLOCK = 1 << 20  # scores per block: 4 MiB of float32 stay in the cache of the cores
GPU_BLOCK = 1 << 26
TILE = 4096  # rows that a block of queries is compared with at once


def as_matrix(features: Tensor | np.ndarray, name: str = "features") -> Tensor:
    """`features` as a detached floating-point tensor (N, D) on its own device; ValueError if it is anything else."""
    matrix = torch.as_tensor(features).detach()
    if matrix.ndim != 2 or matrix.shape[1] == 0:
        raise ValueError(f"{name} must have the shape (N, D) with D >= 1, not {tuple(matrix.shape)}")
    if not matrix.is_floating_point():
        raise ValueError(f"{name} must be floating-point numbers, not {matrix.dtype}")
    if matrix.dtype not in (torch.float32, torch.float64):
        matrix = matrix.float()
    if not torch.isfinite(matrix).all():
        bad = int((~torch.isfinite(matrix)).any(1).sum())
        raise ValueError(f"{name} hold NaN or infinite values in {bad} of {len(matrix)} rows")
    return matrix


def conditioned(matrix: Tensor, like: Tensor | None = None) -> tuple[Tensor, float]:
    """Rows shifted to the mean of `like` and scaled by a power of two, as float32 (N, D), and that scale.

    Neither changes who is nearest to whom; both keep float32 accurate for rows far from the origin, huge or tiny.
    """
    like = matrix if like is None else like
    centre = like.mean(0, dtype=torch.float64)
    spread = max(float(like.amax()) - float(centre.min()), float(centre.max()) - float(like.amin()))
    scale = 2.0 ** -np.frexp(spread)[1] if spread > 0 else 1.0
    rows = torch.empty(matrix.shape, device=matrix.device)
    for part in torch.arange(len(matrix)).split(65536):  # float64 for a part at a time
        low, high = int(part[0]), int(part[-1]) + 1
        rows[low:high] = (matrix[low:high] - centre) * scale
    return rows, scale


def block_rows(columns: int, memory_mb: float, device: torch.device) -> int:
    """Queries per block of scores with so many columns; about six temporaries of the block's size fit memory_mb."""
    target = CPU_BLOCK if device.type == "cpu" else GPU_BLOCK
    return max(1, min(target, int(memory_mb * 2**20 / 24)) // columns)


def with_norms(rows: Tensor) -> Tensor:
    """Rows (N, D) -> (N, D + 1) with -|x|^2 / 2 beside them: times a query with a 1 beside it, that is the score."""
    return torch.cat([rows, rows.square().sum(1, keepdim=True).mul_(-0.5)], 1)


def with_ones(rows: Tensor) -> Tensor:
    """Queries (Q, D) -> (Q, D + 1), the counterpart of `with_norms`."""
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1)


def squared_distances(left: Tensor, right: Tensor, pairs: tuple[Tensor, Tensor], memory_mb: float = 512) -> Tensor:
    """float64 squared distances (P,) of left[pairs[0]] and right[pairs[1]], from the differences themselves."""
    step = max(1, int(memory_mb * 2**20 / (32 * left.shape[1])))
    out = torch.empty(len(pairs[0]), dtype=torch.float64, device=left.device)
    for start in range(0, len(out), step):
        rows, columns = (index[start : start + step] for index in pairs)
        out[start : start + step] = (left[rows].double() - right[columns]).square_().sum(1)
    return out


def nearest_neighbors(
    features: Tensor | np.ndarray, k: int = 1, *, queries: Tensor | np.ndarray | None = None, memory_mb: float = 512
) -> tuple[Tensor, Tensor]:
    """The k nearest rows of each query, nearest first.

    features: (N, D) floating point; queries: (Q, D), or None: each row searches the other rows, itself left out by
    index. Returns squared Euclidean distances (Q, k) float32 and row indices (Q, k) int64 on the features' device.
    Scores are float32, the distances of the rows found are computed from their differences; rows at equal distance
    come in the order of their indices (where more than k rows tie for the last places, any of them may be taken).
    Beside one or two float32 copies of the inputs it needs at most memory_mb MiB.
    Raises ValueError for a wrong shape, non-finite values, or k outside 1 .. number of candidates.
    """
    base = as_matrix(features)
    asked = base if queries is None else as_matrix(queries, "queries").to(base.device)
    candidates = len(base) - (queries is None)
    if asked.shape[1] != base.shape[1]:
        raise ValueError(f"queries have {asked.shape[1]} columns, features {base.shape[1]}")
    if not 1 <= k <= candidates:
        raise ValueError(f"k must lie in 1 .. {candidates} (the rows that a query can find), not {k}")
    rows = with_norms(conditioned(base)[0])
    left = with_ones(rows[:, :-1] if queries is None else conditioned(asked, base)[0])
    tile = max(TILE, k)
    step = block_rows(min(tile, len(rows)), memory_mb, base.device)
    indices = torch.empty((len(left), k), dtype=torch.int64, device=base.device)
    for start in range(0, len(left), step):
        own = start if queries is None else None
        indices[start : start + step] = _best_rows(left[start : start + step], rows, k, tile, own)
    distances = _distances_to(asked, base, indices, memory_mb)
    if k > 1:
        indices, order = indices.sort(1)
        distances, rank = distances.gather(1, order).sort(1, stable=True)
        indices = indices.gather(1, rank)
    return distances.float(), indices


def _best_rows(left: Tensor, rows: Tensor, k: int, tile: int, own: int | None) -> Tensor:
    """Indices (B, k) of the rows with the largest scores; `own`: the row that the block's first query is itself."""
    best, found = None, None
    for start in range(0, len(rows), tile):
        scores = left @ rows[start : start + tile].T  # (B, T)
        if own is not None:
            hide_own(scores, own - start)
        # max gives the first of equal scores, topk any of them
        if k == 1:
            top, index = (part[:, None] for part in scores.max(1))
        else:
            top, index = scores.topk(min(k, scores.shape[1]), dim=1)
        index = index + start
        if best is None:
            best, found = top, index
        elif k == 1:
            nearer = top > best
            best, found = torch.where(nearer, top, best), torch.where(nearer, index, found)
        else:
            best, pick = torch.cat([best, top], 1).topk(min(k, best.shape[1] + top.shape[1]), dim=1)
            found = torch.cat([found, index], 1).gather(1, pick)
    return found


def hide_own(scores: Tensor, offset: int) -> None:
    """Set scores[i, i + offset] to -inf where that column exists: a row never finds itself."""
    low, high = max(0, -offset), min(scores.shape[0], scores.shape[1] - offset)
    if low < high:
        part = torch.arange(low, high, device=scores.device)
        scores[part, part + offset] = -torch.inf


def _distances_to(asked: Tensor, base: Tensor, indices: Tensor, memory_mb: float) -> Tensor:
    """float64 squared distances (Q, k) of each query to the rows found for it."""
    queries = torch.arange(len(indices), device=indices.device).repeat_interleave(indices.shape[1])
    return squared_distances(asked, base, (queries, indices.flatten()), memory_mb / 4).view(indices.shape)


def first_hit_ranks(features: Tensor | np.ndarray, labels: Tensor, limit: int, *, memory_mb: float = 512) -> Tensor:
    """For each row the number of other rows nearer to it than the nearest one with its own label.

    features (N, D) floating point, labels (N,) integers on the same device. Returns ranks (N,) int64, `limit` where
    there are that many or more, or where no other row has the label. A lower index counts as nearer at equal
    distance. This needs no list of neighbours: the nearest row of the same label sets a threshold, and a block of
    scores is only asked whether anything in it passes.
    Exact: float32 scores decide where their error bound allows it, the other pairs are compared in float64.
    """
    matrix = as_matrix(features)
    order = torch.argsort(labels, stable=True)
    search = _HitSearch(matrix, labels, order, memory_mb)
    ranks = torch.empty_like(order)
    ranks[order] = search.ranks(limit)
    return ranks


class _HitSearch:
    """The rows in the order of their labels, so that a label's rows are neighbours; all (N,) here are in that order."""

    def __init__(self, matrix: Tensor, labels: Tensor, order: Tensor, memory_mb: float) -> None:
        self.matrix, self.order, self.memory_mb = matrix, order, memory_mb
        self.labels = labels[order]
        rows, self.scale = conditioned(matrix)
        self.rows = with_norms(rows[order])  # (N, D + 1)
        self.norms = self.rows[:, -1].double().mul(-2)  # |x|^2
        # Rounding the inputs, D + 1 products in any order and the comparison: at most (D + 16) units of 2^-24 times
        # (|q| + |x|)^2 (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), doubled for good measure.
        self.unit = (self.rows.shape[1] + 16) * 2.0**-23
        self.tile = min(TILE, len(rows))
        self.step = block_rows(self.tile, memory_mb, rows.device)
        _, self.group, self.sizes = torch.unique_consecutive(self.labels, return_inverse=True, return_counts=True)
        self.ends = self.sizes.cumsum(0)

    def error(self, rows: Tensor | slice, tile: slice) -> Tensor:
        """Bound (B, 1) on the error of the scores of these queries within a tile."""
        return self.unit * (self.norms[rows].sqrt() + self.norms[tile].max().sqrt()).square().float()[:, None]

    def distances(self, queries: Tensor, columns: Tensor) -> Tensor:
        """float64 squared distances (P,) of pairs."""
        return squared_distances(
            self.matrix, self.matrix, (self.order[queries], self.order[columns]), self.memory_mb / 4
        )

    def tiles(self, low: int, high: int) -> Iterator[slice]:
        for start in range(low, high, self.tile):
            yield slice(start, min(start + self.tile, high))

    def nearest_of_own(self) -> tuple[Tensor, Tensor]:
        """Squared distance (N,) float64 to the nearest other row of the same label, and that row's original index."""
        count = len(self.rows)
        best = torch.full((count,), torch.inf, dtype=torch.float64, device=self.rows.device)
        found = torch.full_like(self.order, count)
        for start in range(0, count, self.step):
            block = slice(start, min(start + self.step, count))
            first, last = self.group[block.start], self.group[block.stop - 1]
            low, high = int(self.ends[first] - self.sizes[first]), int(self.ends[last])
            top = self.rows.new_full((block.stop - start, 1), -torch.inf)
            for tile in self.tiles(low, high):
                scores = with_ones(self.rows[block, :-1]) @ self.rows[tile].T  # (B, T)
                scores.masked_fill_(self.labels[block, None] != self.labels[tile], -torch.inf)
                hide_own(scores, start - tile.start)
                top = torch.maximum(top, scores.amax(1, keepdim=True))
                close = (scores >= top - 2 * self.error(block, tile)) & (scores > -torch.inf)
                self._keep_nearest(
                    best, found, *(close.nonzero() + close.new_tensor([start, tile.start], dtype=torch.int64)).T
                )
        return best, found

    def _keep_nearest(self, best: Tensor, found: Tensor, queries: Tensor, columns: Tensor) -> None:
        """Fold pairs into the nearest row per query; at equal distance the lowest original index wins."""
        distance = self.distances(queries, columns)
        before = best[queries]
        best.scatter_reduce_(0, queries, distance, "amin")
        found[queries[best[queries] < before]] = len(best)
        equal = distance == best[queries]
        found.scatter_reduce_(0, queries[equal], self.order[columns[equal]], "amin")

    def ranks(self, limit: int) -> Tensor:
        """Ranks (N,), see `first_hit_ranks`."""
        best, found = self.nearest_of_own()
        threshold = (self.norms - best * self.scale**2).mul(0.5).float()[:, None]  # (N, 1) as a score
        counts = torch.where(best < torch.inf, 0, limit)
        alive = (counts < limit).nonzero().flatten()
        for tile in self.tiles(0, len(self.rows)):
            for rows in alive.split(self.step):
                self._count(counts, rows, tile, threshold, best, found)
            alive = alive[counts[alive] < limit]
        return counts.clamp_(max=limit)

    def _count(self, counts: Tensor, rows: Tensor, tile: slice, threshold: Tensor, best: Tensor, found: Tensor) -> None:
        """Add to the counts of the queries `rows` what is nearer than their threshold within a tile."""
        scores = with_ones(self.rows[rows, :-1]) @ self.rows[tile].T  # (B, T)
        labels = self.labels[tile]
        mine = self.labels[rows]
        if bool((mine[0] <= labels[-1]) & (labels[0] <= mine[-1])):
            scores.masked_fill_(mine[:, None] == labels, -torch.inf)
        error = self.error(rows, tile)
        passing = (scores.amax(1, keepdim=True) >= threshold[rows] - error).flatten().nonzero().flatten()
        if len(passing) == 0:
            return
        scores, rows, error = scores[passing], rows[passing], error[passing]
        nearer = scores > threshold[rows] + error
        unsure = (scores >= threshold[rows] - error) & ~nearer
        counts[rows] += nearer.sum(1)
        picked, columns = unsure.nonzero().T
        queries, columns = rows[picked], columns + tile.start
        distance = self.distances(queries, columns)
        first = (distance < best[queries]) | ((distance == best[queries]) & (self.order[columns] < found[queries]))
        counts.scatter_add_(0, queries, first.long())
