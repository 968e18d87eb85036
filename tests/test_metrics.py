"""Recall@K and NMI: against their literal formulas and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from utils.metrics import clustering_nmi, clustering_scores, nmi, precision_at_r, recall_at_k


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


def literal_gallery_recall(queries: Tensor, own: list, gallery: Tensor, labels: list, ks: tuple) -> dict[int, float]:
    """Query by query: sort the gallery by (float64 distance, index)."""
    first = []
    for query, label in zip(queries.double(), own, strict=True):
        order = sorted(range(len(gallery)), key=lambda i: (float((query - gallery[i].double()).square().sum()), i))
        first.append(next((rank for rank, i in enumerate(order) if labels[i] == label), len(gallery)))
    return {k: sum(rank < k for rank in first if rank < len(gallery)) / len(first) for k in ks}


@given(st.integers(1, 40), st.integers(1, 60), st.integers(1, 4), st.integers(1, 9), st.booleans(), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_recall_in_a_gallery_is_the_literal_one(asked, count, columns, classes, ties, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    queries, gallery = (torch.randn(size, columns, generator=generator) for size in (asked, count))
    if ties:
        queries, gallery = queries.round().clamp(-1, 1), gallery.round().clamp(-1, 1)
    own, labels = (torch.randint(-3, classes, (size,), generator=generator).tolist() for size in (asked, count))
    ks = (1, 10, 20, 1000)
    expected = literal_gallery_recall(queries, own, gallery, labels, ks)
    assert recall_at_k(queries, own, ks, gallery=(gallery, labels)) == expected
    assert recall_at_k(queries.numpy(), np.array(own), ks, gallery=(gallery.numpy(), np.array(labels))) == expected


def test_queries_do_not_find_each_other() -> None:
    queries, gallery = torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]])
    assert recall_at_k(queries, [5, 5], (1, 2, 3), gallery=(gallery, [6, 5, 5])) == {1: 0.0, 2: 1.0, 3: 1.0}
    assert recall_at_k(queries, [5, 7], (1, 8), gallery=(gallery, [5, 6, 6])) == {1: 0.5, 8: 0.5}  # none of class 7
    scores = precision_at_r(queries, [5, 7], gallery=(gallery, [6, 5, 5]))  # class 7 is left out, as nothing is there
    assert scores == {"r_precision": 0.5, "map@r": 0.25}


@pytest.mark.parametrize(
    ("queries", "own", "gallery", "message"),
    [
        (np.ones((2, 2)), [0, 1], (np.ones((3, 3)), [0, 1, 1]), "2 columns, those of the gallery 3"),
        (np.ones((2, 2)), [0], (np.ones((3, 2)), [0, 1, 1]), "2 embeddings but 1 labels"),
        (np.ones((2, 2)), [0, 1], (np.ones((3, 2)), [0, 1]), "3 gallery embeddings but 2 gallery labels"),
        (np.ones((2, 2)), [0, 1], (np.ones((0, 2)), np.ones(0, int)), "at least 1 gallery"),
        (np.ones((0, 2)), np.ones(0, int), (np.ones((1, 2)), [1]), "at least 1 query"),
        (np.ones((2, 2)), [0, 1], (np.full((1, 2), np.nan), [1]), "gallery embeddings hold NaN"),
        (np.ones((2, 2)), [0, 1], (np.ones((1, 2)), [0.5]), "integers"),
    ],
)
def test_gallery_errors(queries: np.ndarray, own: list, gallery: tuple, message: str) -> None:
    for score in (recall_at_k, precision_at_r):
        with pytest.raises(ValueError, match=message):
            score(queries, own, gallery=gallery)


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


def literal_precision_at_r(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    """Query by query, from the definitions."""
    distances = (embeddings.double()[:, None] - embeddings.double()[None]).square().sum(2).fill_diagonal_(torch.inf)
    precisions, averages = [], []
    for query, row in enumerate(distances):
        wanted = int((labels == labels[query]).sum()) - 1
        if wanted:
            hits = (labels[row.argsort(stable=True)[:wanted]] == labels[query]).tolist()
            precisions.append(sum(hits) / wanted)
            averages.append(sum(sum(hits[: i + 1]) / (i + 1) for i in range(wanted) if hits[i]) / wanted)
    return {"r_precision": float(np.mean(precisions)), "map@r": float(np.mean(averages))}


@given(st.integers(3, 90), st.integers(2, 5), st.integers(1, 30), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_precision_at_r_is_the_literal_one(count: int, columns: int, classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(count, columns, generator=generator)
    labels = torch.randint(classes, (count,), generator=generator)
    labels[1] = labels[0]  # at least one query
    assert precision_at_r(embeddings, labels) == pytest.approx(literal_precision_at_r(embeddings, labels))


def test_scores_are_those_of_pytorch_metric_learning() -> None:
    pytest.importorskip("faiss")
    accuracy_calculator = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    generator = torch.Generator().manual_seed(1)
    labels = torch.cat([torch.randint(12, (300,), generator=generator), torch.tensor([50, 51])])  # two are alone
    embeddings = torch.randn(302, 8, generator=generator) + 0.3 * labels[:, None]
    names = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
    calculator = accuracy_calculator.AccuracyCalculator(include=names, device=torch.device("cpu"))
    theirs = calculator.get_accuracy(embeddings, labels)
    ours = precision_at_r(embeddings, labels)
    assert ours["r_precision"] == pytest.approx(theirs["r_precision"])
    assert ours["map@r"] == pytest.approx(theirs["mean_average_precision_at_r"])
    # theirs leaves images that are alone in their class out of R@1, the field's definition counts them as missed
    assert recall_at_k(embeddings, labels, [1])[1] == pytest.approx(theirs["precision_at_1"] * 300 / 302)


@pytest.mark.parametrize("seed", range(4))
def test_gallery_scores_are_those_of_pytorch_metric_learning(seed: int) -> None:
    pytest.importorskip("faiss")
    accuracy_calculator = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    generator = torch.Generator().manual_seed(seed)
    own, labels = torch.randint(15, (120,), generator=generator), torch.randint(1, 16, (260,), generator=generator)
    queries = torch.randn(120, 8, generator=generator) + 0.3 * own[:, None]
    rows = torch.randn(260, 8, generator=generator) + 0.3 * labels[:, None]
    names = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
    calculator = accuracy_calculator.AccuracyCalculator(include=names, device=torch.device("cpu"))
    theirs = calculator.get_accuracy(queries, own, reference=rows, reference_labels=labels, ref_includes_query=False)
    ours = precision_at_r(queries, own, gallery=(rows, labels))
    assert ours["r_precision"] == pytest.approx(theirs["r_precision"])
    assert ours["map@r"] == pytest.approx(theirs["mean_average_precision_at_r"])
    present = float((own > 0).float().mean())  # class 0 is not in the gallery: theirs leaves such queries out of R@1
    assert 0 < present < 1
    recall = recall_at_k(queries, own, [1], gallery=(rows, labels))[1]
    assert recall == pytest.approx(theirs["precision_at_1"] * present)


def test_precision_at_r_needs_a_pair() -> None:
    with pytest.raises(ValueError, match="alone"):
        precision_at_r(torch.eye(3), [0, 1, 2])
    with pytest.raises(ValueError, match="class that the gallery lacks"):
        precision_at_r(torch.eye(3), [0, 1, 2], gallery=(torch.eye(3), [3, 4, 5]))


def test_ami() -> None:
    rows = np.random.default_rng(0).standard_normal((200, 4))
    chance = clustering_scores(rows, np.arange(200) % 40, adjusted=True)
    assert chance["nmi"] > 0.4 and abs(chance["ami"]) < 0.15
    blobs = np.repeat(np.eye(5), 20, axis=0) * 9 + 0.01 * rows[:100, :1]
    assert clustering_scores(blobs, np.repeat(range(5), 20), adjusted=True) == {"nmi": 1.0, "ami": pytest.approx(1.0)}
