"""Recall@K and NMI: against their literal formulas and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from utils.metrics import clustering_nmi, nmi, recall_at_k


def literal_recall(embeddings: Tensor, labels: Tensor, ks: tuple[int, ...]) -> dict[int, float]:
    """Sort all others by (float64 distance, index); a query is a hit if one of the first K has its label."""
    distances = (embeddings.double()[:, None] - embeddings.double()[None]).square().sum(2).fill_diagonal_(torch.inf)
    order = distances.argsort(dim=1, stable=True)[:, :-1]
    same = labels[order] == labels[:, None]
    return {k: int(same[:, :k].any(1).sum()) / len(labels) for k in ks}


@given(st.integers(2, 120), st.integers(1, 5), st.integers(1, 20), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_recall_is_the_literal_one(count: int, columns: int, classes: int, ties: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(count, columns, generator=generator)
    if ties:
        embeddings = embeddings.round().clamp(-1, 1)
    labels = torch.randint(classes, (count,), generator=generator)
    ks = (1, 2, 4, 8, 1000)
    assert recall_at_k(embeddings, labels, ks) == literal_recall(embeddings, labels, ks)


def test_recall_across_several_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(2500, 16, generator=generator))
    labels = torch.randint(60, (2500,), generator=generator)
    distances = torch.cdist(embeddings.double(), embeddings.double()).fill_diagonal_(torch.inf)
    same = labels[distances.argsort(dim=1)] == labels[:, None]
    expected = {k: int(same[:, :k].any(1).sum()) / 2500 for k in (1, 2, 4, 8)}
    assert recall_at_k(embeddings, labels) == expected
    assert recall_at_k(embeddings, labels, memory_mb=1) == expected


def test_known_case() -> None:
    embeddings = np.array([[0.0], [1.0], [3.0], [3.5], [10.0]])
    labels = [5, -2, 5, -2, 9]  # the last image is alone in its class: a query without a hit
    assert recall_at_k(embeddings, labels, (1, 2, 3, 4)) == {1: 0.0, 2: 0.4, 3: 0.8, 4: 0.8}


def test_lower_index_is_nearer_among_duplicates() -> None:
    embeddings = torch.zeros(4, 3)
    assert recall_at_k(embeddings, [0, 1, 0, 1], (1, 2, 3)) == {1: 0.25, 2: 0.75, 3: 1.0}
    assert recall_at_k(embeddings, [0, 0, 1, 1], (1, 2, 3)) == {1: 0.5, 2: 0.5, 3: 1.0}


def test_near_ties_are_those_of_float64() -> None:
    embeddings = torch.zeros(3, 2, dtype=torch.float64)
    embeddings[1, 0], embeddings[2, 0] = 1.0, -1.0 - 1e-12
    assert recall_at_k(embeddings, [0, 1, 0], (1,)) == {1: 1 / 3}
    assert recall_at_k(-embeddings.flip(0), [1, 0, 0], (1,)) == literal_recall(
        -embeddings.flip(0), torch.tensor([1, 0, 0]), (1,)
    )


@pytest.mark.parametrize(
    ("embeddings", "labels", "ks", "message"),
    [
        (np.ones(3), [0, 1, 2], (1,), "shape"),
        (np.ones((3, 2)), [0, 1], (1,), "3 embeddings but 2 labels"),
        (np.ones((3, 2)), [0.5, 1.0, 2.0], (1,), "integers"),
        (np.ones((3, 2)), [[0, 1, 2]], (1,), "shape"),
        (np.ones((1, 2)), [0], (1,), "at least 2"),
        (np.full((3, 2), np.inf), [0, 1, 2], (1,), "NaN or infinite"),
        (np.ones((3, 2)), [0, 1, 2], (0, 1), "from 1"),
        (np.ones((3, 2)), [0, 1, 2], (), "from 1"),
    ],
)
def test_recall_errors(embeddings: np.ndarray, labels: list, ks: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recall_at_k(embeddings, labels, ks)


@given(st.integers(1, 200), st.integers(1, 15), st.integers(1, 15), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_nmi_is_that_of_scikit_learn(count: int, classes_a: int, classes_b: int, seed: int) -> None:
    from sklearn.metrics import normalized_mutual_info_score

    rng = np.random.default_rng(seed)
    a, b = rng.integers(-3, classes_a, count), rng.integers(0, classes_b, count) * 7
    assert nmi(a, b) == pytest.approx(normalized_mutual_info_score(a, b), abs=1e-12)


def test_nmi_of_degenerate_labellings() -> None:
    assert nmi([1, 1, 1], [2, 2, 2]) == 1.0
    assert nmi([0, 1, 2, 0, 1, 2, 3], [5, 6, 7, 5, 6, 7, 8]) <= 1.0  # rounding may not lift it above
    assert nmi([1, 1, 1], [0, 1, 2]) == 0.0
    assert nmi([], torch.empty(0, dtype=torch.int64)) == 1.0
    assert nmi([0, 0, 1, 1], [5, 5, 3, 3]) == pytest.approx(1.0)
    assert nmi([0, 0, 1, 1], [0, 1, 0, 1]) == 0.0
    with pytest.raises(ValueError, match="4 labels against 3"):
        nmi([0, 0, 1, 1], [0, 1, 2])


def test_clustering_nmi_of_separate_blobs_is_one() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(10, 18, 400)
    embeddings = rng.standard_normal((18, 6))[labels] * 20 + rng.standard_normal((400, 6)) * 0.01
    assert clustering_nmi(embeddings, labels) == pytest.approx(1.0)
    assert clustering_nmi(embeddings, labels, seed=1, n_init=3) == clustering_nmi(embeddings, labels, 1, 3)


def test_clustering_nmi_needs_as_many_distinct_rows_as_classes() -> None:
    with pytest.raises(ValueError, match="only 1 of the 6 rows are distinct"):
        clustering_nmi(np.ones((6, 2)), [0, 0, 1, 1, 2, 2])
