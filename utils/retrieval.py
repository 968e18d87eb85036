"""Exact nearest neighbors by Euclidean distance, in blocks: no N x N matrix is ever held."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

BYTES_OF_NEIGHBOR = 32  # of distance and index, and of what is made of them


def as_matrix(features: Tensor | np.ndarray) -> Tensor:
    """Return `features` as a detached float32 or float64 tensor (N, D) on its own device.

    Raises ValueError for another shape, for whole numbers and for values that are not finite.
    """
    matrix = torch.as_tensor(features).detach()
    if matrix.ndim != 2 or matrix.shape[1] == 0:
        raise ValueError(f"expected features (N, D), got the shape {tuple(matrix.shape)}")
    if not matrix.is_floating_point():
        raise ValueError(f"expected floating-point features, got {matrix.dtype}")
    if not matrix.isfinite().all():
        raise ValueError("the features hold NaN or infinite values")
    return matrix if matrix.dtype == torch.float64 else matrix.float()


@torch.no_grad()
def nearest_neighbors(
    rows: Tensor, k: int, *, queries: Tensor | None = None, memory_mb: float = 512
) -> tuple[Tensor, Tensor]:
    """Find the k nearest rows of each query.

    Args:
        rows: (N, D) floating point, on any device.
        queries: (Q, D); None: every row searches all other rows, itself left out by its index.
        memory_mb: bound on the memory beside features and results, in MiB.

    Returns:
        Squared distances (Q, k) and indices (Q, k), nearest first. Rows at equal distance come in
        any order.

    Raises ValueError if k is not between 1 and the number of rows that a query can find.
    """
    blocks = neighbor_blocks(rows, k, queries=queries, memory_mb=memory_mb)
    distances, indices = zip(*blocks, strict=True)
    return torch.cat(distances), torch.cat(indices)


@torch.no_grad()
def neighbor_blocks(
    rows: Tensor, k: int, *, queries: Tensor | None = None, memory_mb: float = 512
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what `nearest_neighbors` returns for some queries after the others, in their order."""
    rows = as_matrix(rows)
    most = len(rows) - (queries is None)
    if not 1 <= k <= most:
        raise ValueError(f"k must lie in 1 .. {most}, not {k}")
    center = rows.mean(0)  # distances are computed from products, exact near the origin only
    searched = rows - center
    asking = searched if queries is None else as_matrix(queries).to(rows) - center
    half_norms = searched.square().sum(1) / 2
    bytes_of_query = 3 * rows.element_size() * len(rows) + BYTES_OF_NEIGHBOR * k
    block_size = max(1, int(memory_mb * 2**20 / bytes_of_query))
    for start in range(0, len(asking), block_size):
        block = asking[start : start + block_size]
        scores = torch.addmm(
            half_norms, block, searched.T, beta=-1
        )  # (B, N): (|q|^2 - |q - x|^2) / 2
        if queries is None:
            scores.diagonal(start).fill_(-torch.inf)
        top = scores.topk(k)
        squares = block.square().sum(1, keepdim=True) - 2 * top.values
        yield squares.clamp_(min=0), top.indices
