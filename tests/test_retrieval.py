"""Exact nearest neighbors in blocks, against distances in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensors import noise
from torch import Tensor

from utils.retrieval import nearest_neighbors

pytestmark = pytest.mark.usefixtures("one_thread")
MEMORY_MB = (0.001, 0.02, 512)  # a query a block, several, all


def literal_neighbors(rows: Tensor, k: int, queries: Tensor | None = None) -> tuple:
    """Sort all squared distances; without queries a row leaves itself out."""
    asking = rows if queries is None else queries
    squares = (asking.double()[:, None] - rows.double()[None]).square().sum(2)
    if queries is None:
        squares.fill_diagonal_(torch.inf)
    order = squares.sort(dim=1)
    return order.values[:, :k], order.indices[:, :k]


@pytest.mark.parametrize("memory_mb", MEMORY_MB)
@pytest.mark.parametrize("with_queries", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neighbors_are_the_literal_ones(memory_mb, with_queries, dtype):
    rows = noise(200, 6).to(dtype)
    queries = noise(70, 6, seed=1).to(dtype) if with_queries else None
    distances, indices = nearest_neighbors(rows, 9, queries=queries, memory_mb=memory_mb)
    expected, nearest = literal_neighbors(rows, 9, queries)
    assert torch.equal(indices, nearest)
    torch.testing.assert_close(distances.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_row_leaves_itself_out_by_its_index():
    rows = torch.ones(6, 3)
    distances, indices = nearest_neighbors(rows, 5, memory_mb=0.0001)
    assert distances.tolist() == [[0.0] * 5] * 6
    for row, neighbors in enumerate(indices.tolist()):
        assert sorted(neighbors) == [n for n in range(6) if n != row]
    _, indices = nearest_neighbors(rows, 6, queries=rows[:1])
    assert sorted(indices[0].tolist()) == list(range(6))


@pytest.mark.parametrize("rows", [(noise(100, 4) + 1000).float(), noise(20, 4).half()])
def test_rows_far_from_the_origin_halves_and_arrays(rows):
    expected = literal_neighbors(rows, 3)[1]
    assert torch.equal(nearest_neighbors(rows, 3)[1], expected)
    assert torch.equal(nearest_neighbors(rows.numpy(), 3)[1], expected)


@pytest.mark.parametrize(
    "rows, k, queries, message",
    [
        (np.ones(3), 1, None, "got the shape"),
        (np.ones((3, 0)), 1, None, "got the shape"),
        (np.ones((3, 2), np.int64), 1, None, "floating-point"),
        (np.full((3, 2), np.nan), 1, None, "NaN or infinite"),
        (np.ones((3, 2)), 0, None, r"1 \.\. 2, not 0"),
        (np.ones((3, 2)), 3, None, r"1 \.\. 2, not 3"),
        (np.ones((3, 2)), 4, torch.ones(1, 2), r"1 \.\. 3, not 4"),
    ],
)
def test_refused(rows, k, queries, message):
    with pytest.raises(ValueError, match=message):
        nearest_neighbors(rows, k, queries=queries)
