"""Nearest neighbours: against the literal search in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from utils import search
from utils.search import first_hit_ranks, nearest_neighbors


def rows(count: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed))


def literal_distances(queries: Tensor, features: Tensor) -> Tensor:
    """(Q, N) float64: sum over the columns of (q - x)^2."""
    return (queries.double()[:, None] - features.double()[None]).square().sum(2)


def literal_order(features: Tensor) -> Tensor:
    """(N, N - 1) the other rows of each row, nearest first, lower index first at equal distance."""
    distances = literal_distances(features, features).fill_diagonal_(torch.inf)
    return distances.argsort(dim=1, stable=True)[:, :-1]


def literal_ranks(features: Tensor, labels: Tensor, limit: int) -> Tensor:
    same = labels[literal_order(features)] == labels[:, None]
    first = torch.where(same.any(1), same.int().argmax(1), limit)
    return first.clamp(max=limit)


def test_nearest_other_row() -> None:
    features = rows(300, 7)
    distances, indices = nearest_neighbors(features)
    assert torch.equal(indices[:, 0], literal_order(features)[:, 0])
    expected = literal_distances(features, features)[torch.arange(300), indices[:, 0]]
    torch.testing.assert_close(distances[:, 0], expected.float())
    assert (distances.dtype, indices.dtype) == (torch.float32, torch.int64)


def test_more_neighbours_and_arrays() -> None:
    features = rows(150, 5)
    _, indices = nearest_neighbors(features.numpy(), 6)
    assert torch.equal(indices, literal_order(features)[:, :6])
    assert nearest_neighbors(features, 149)[1].shape == (150, 149)


@pytest.mark.parametrize("k", [1, 4])
def test_queries_search_all_rows(k: int) -> None:
    features, queries = rows(90, 6), rows(40, 6, seed=1)
    distances, indices = nearest_neighbors(features, k, queries=queries)
    assert torch.equal(indices, literal_distances(queries, features).argsort(dim=1)[:, :k])
    assert nearest_neighbors(features, queries=features)[0].max() == 0  # here a row may find itself
    assert (distances.diff(dim=1) >= 0).all()


def test_duplicates_take_the_lower_index_and_never_themselves() -> None:
    features = rows(50, 4).repeat(3, 1)
    distances, indices = nearest_neighbors(features)
    expected = torch.cat([torch.arange(50) + 50, torch.arange(50), torch.arange(50)])
    assert torch.equal(indices[:, 0], expected)
    assert distances.max() == 0


@pytest.mark.parametrize(("shift", "scale"), [(1e4, 1.0), (0.0, 1e25), (0.0, 1e-25), (-3e5, 1e3)])
def test_far_huge_and_tiny_rows_stay_exact(shift: float, scale: float) -> None:
    features = ((rows(200, 8) + shift) * scale).float()
    assert torch.equal(nearest_neighbors(features)[1][:, 0], literal_order(features)[:, 0])


def test_differences_that_float32_scores_cannot_see() -> None:
    features = 1 + 1e-9 * rows(120, 8).double()
    features[0] += 1e3
    assert torch.equal(nearest_neighbors(features)[1][:, 0], literal_order(features)[:, 0])


@pytest.mark.parametrize("side", [64, 128])
def test_block_size_does_not_change_results(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = rows(400, 6), torch.arange(400) % 37
    before = nearest_neighbors(features), nearest_neighbors(features, 5), first_hit_ranks(features, labels, 8)
    monkeypatch.setattr(search, "CPU_SIDE", side)
    after = nearest_neighbors(features), nearest_neighbors(features, 5), first_hit_ranks(features, labels, 8)
    for a, b in zip((*before[0], *before[1], before[2]), (*after[0], *after[1], after[2]), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(before[2], first_hit_ranks(features, labels, 8, memory_mb=0.1))


def test_lowered_matmul_precision_does_not_matter() -> None:
    features = rows(300, 64)
    expected = nearest_neighbors(features)[1]
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(nearest_neighbors(features)[1], expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@given(
    st.integers(2, 90),
    st.integers(1, 4),
    st.integers(1, 12),
    st.integers(1, 9),
    st.booleans(),
    st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_first_hit_ranks(count: int, columns: int, classes: int, limit: int, ties: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, columns, generator=generator)
    if ties:  # few distinct values: duplicates and equal distances everywhere
        features = features.round().clamp(-1, 1)
    labels = torch.randint(classes, (count,), generator=generator)
    assert torch.equal(first_hit_ranks(features, labels, limit), literal_ranks(features, labels, limit))


def gallery_ranks(queries: Tensor, asked: Tensor, features: Tensor, labels: Tensor, limit: int) -> Tensor:
    """From the definition: how many rows come before the first one with the query's label."""
    order = literal_distances(queries, features).argsort(dim=1, stable=True)
    same = labels[order] == asked[:, None]
    return torch.where(same.any(1), same.int().argmax(1), limit).clamp(max=limit)


@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(1, 4),
    st.integers(1, 12),
    st.integers(1, 100),
    st.booleans(),
    st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_first_hit_ranks_in_a_gallery(
    asked: int, count: int, columns: int, classes: int, limit: int, ties: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    features, queries = (torch.randn(size, columns, generator=generator) for size in (count, asked))
    if ties:
        features, queries = features.round().clamp(-1, 1), queries.round().clamp(-1, 1)
    labels, own = (torch.randint(classes, (size,), generator=generator) for size in (count, asked))  # some lack any
    expected = gallery_ranks(queries, own, features, labels, limit)
    assert torch.equal(first_hit_ranks(features, labels, limit, queries=queries, query_labels=own), expected)


@pytest.mark.parametrize("memory_mb", [1, 512])
def test_first_hit_ranks_in_a_gallery_of_several_blocks(memory_mb: float) -> None:
    features, queries = rows(2300, 8), rows(1200, 8, seed=1) * 3 + 5  # queries far from the gallery
    labels, own = torch.arange(2300) % 700, torch.arange(1200) % 701
    expected = gallery_ranks(queries, own, features, labels, 1000)
    assert 0 < int((expected == 1000).sum()) < 1200
    found = first_hit_ranks(features, labels, 1000, queries=queries, query_labels=own, memory_mb=memory_mb)
    assert torch.equal(found, expected)


def test_collapsed_rows_rank_by_index() -> None:
    labels = torch.arange(1500) % 3
    ranks = first_hit_ranks(torch.ones(1500, 16), labels, 8)
    assert torch.equal(ranks, literal_ranks(torch.ones(1500, 1), labels, 8))


@pytest.mark.parametrize(
    ("features", "k", "message"),
    [
        (torch.ones(4), 1, "shape"),
        (torch.ones(4, 0), 1, "shape"),
        (torch.ones(4, 2, dtype=torch.int64), 1, "floating-point"),
        (torch.tensor([[1.0], [float("nan")]]), 1, "1 of 2 rows"),
        (torch.ones(4, 2), 4, r"1 \.\. 3"),
        (torch.ones(4, 2), 0, r"1 \.\. 3"),
    ],
)
def test_errors(features: Tensor, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nearest_neighbors(features, k)


def test_queries_of_another_width() -> None:
    with pytest.raises(ValueError, match="3 columns, features 2"):
        nearest_neighbors(np.ones((4, 2)), queries=np.ones((4, 3)))
