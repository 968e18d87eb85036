"""Scores of an embedding against their literal formulas, and scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
from tensors import noise
from test_retrieval import MEMORY_MB, literal_neighbors
from torch import Tensor

from utils.clustering import kmeans
from utils.errors import UserError
from utils.evaluation import RECALL_AT, alone_remark, check_classes, score, why_no_nmi
from utils.metrics import clustering_nmi, clustering_scores, precision_at_r, recall_at_k

pytestmark = pytest.mark.usefixtures("one_thread")
KS = (1, 2, 4, 8, 1000)


def random_labels(count: int, n_classes: int, seed: int) -> Tensor:
    return torch.randint(n_classes, (count,), generator=torch.Generator().manual_seed(seed))


def literal_hits(rows: Tensor, labels: Tensor, gallery: tuple[Tensor, Tensor] | None) -> list:
    """List for each query, nearest first, whether the rows that it finds are of its class."""
    searched, searched_labels = gallery or (rows, labels)
    n_rows = len(searched) - (gallery is None)
    _, nearest = literal_neighbors(searched, n_rows, rows if gallery else None)
    return (searched_labels[nearest] == labels[:, None]).tolist()


def literal_recall(hits: list) -> dict[int, float]:
    return {k: sum(any(row[:k]) for row in hits) / len(hits) for k in KS}


def literal_precision_at_r(hits: list) -> dict[str, float]:
    precisions = []
    averages = []
    for row in hits:
        r = sum(row)
        if r:
            precisions.append(sum(row[:r]) / r)
            at_hits = [sum(row[: i + 1]) / (i + 1) for i in range(r) if row[i]]
            averages.append(sum(at_hits) / r)
    return {"r_precision": float(np.mean(precisions)), "map@r": float(np.mean(averages))}


@given(
    count=st.integers(3, 120),
    dim=st.integers(1, 5),
    n_classes=st.integers(1, 30),
    n_gallery=st.integers(0, 60),
    memory_mb=st.sampled_from(MEMORY_MB),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_scores_are_the_literal_ones(count, dim, n_classes, n_gallery, memory_mb, dtype, seed):
    rows = noise(count, dim, seed=seed).to(dtype)
    labels = random_labels(count, n_classes, seed)
    labels[1] = labels[0]  # at least a query finds its class
    gallery = None
    if n_gallery:
        gallery_labels = random_labels(n_gallery, n_classes, seed + 1)
        gallery_labels[0] = labels[0]
        gallery = (noise(n_gallery, dim, seed=seed + 1).to(dtype), gallery_labels)
    hits = literal_hits(rows, labels, gallery)
    options = {"gallery": gallery, "memory_mb": memory_mb}
    assert recall_at_k(rows, labels, KS, **options) == literal_recall(hits)
    expected = pytest.approx(literal_precision_at_r(hits), rel=1e-12)
    assert precision_at_r(rows, labels, **options) == expected


def test_scores_by_hand():
    rows = np.array([[0.0], [1.0], [3.0], [3.5], [10.0]])
    labels = ["a", "b", "a", "b", "c"]  # the last image is alone in its class and cannot hit
    assert recall_at_k(rows, labels, (1, 2, 3, 4)) == {1: 0.0, 2: 0.4, 3: 0.8, 4: 0.8}
    queries = torch.zeros(2, 2)  # they do not find each other
    gallery = (torch.tensor([[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]]), [6, 5, 5])
    assert recall_at_k(queries, [5, 5], (1, 2), gallery=gallery) == {1: 0.0, 2: 1.0}
    # class 7 is not there: R@K counts its query as missed, R-precision leaves it out
    assert recall_at_k(queries, [5, 7], (8,), gallery=gallery) == {8: 0.5}
    scores = precision_at_r(queries, [5, 7], gallery=gallery)
    assert scores == {"r_precision": 0.5, "map@r": 0.25}


@pytest.mark.parametrize("engine", ["faiss", "sklearn"])
def test_nmi_and_ami_are_scikit_learns_of_the_clusters(engine):
    rows = noise(200, 4).float().numpy()
    labels = np.arange(200) % 40
    scores = clustering_scores(rows, labels, seed=3, engine=engine, n_init=2)
    clusters, _, _ = kmeans(rows, 40, seed=3, engine=engine, n_init=2)
    assert scores["nmi"] == normalized_mutual_info_score(labels, clusters)
    assert scores["ami"] == adjusted_mutual_info_score(labels, clusters)
    assert scores["nmi"] > 0.4 and abs(scores["ami"]) < 0.15  # chance
    assert clustering_nmi(rows, labels, 3, 2, engine=engine) == scores["nmi"]


def test_nmi_of_separate_blobs_is_1_and_of_a_collapsed_embedding_near_0():
    labels = np.repeat(["cat", "dog", "owl", "rat", "yak"], 20)
    blobs = np.repeat(np.eye(5), 20, axis=0) * 9 + 0.01 * noise(100, 1).numpy()
    assert clustering_scores(blobs, labels) == {"nmi": 1.0, "ami": pytest.approx(1.0)}
    assert clustering_nmi(np.ones((100, 3)), labels) < 0.5


ONES = np.ones((3, 2))


@pytest.mark.parametrize(
    "rows, labels, options, message",
    [
        (ONES, [0, 1], {}, "expected 3 labels"),
        (ONES[:1], [0], {}, "at least 2 embeddings"),
        (np.full((3, 2), np.inf), [0, 1, 2], {}, "NaN or infinite"),
        (ONES, [0, 1, 2], {"gallery": (ONES, [0, 1])}, "expected 3 labels"),
        (ONES, [0, 1, 2], {"gallery": (ONES[:0], [])}, "nothing to search"),
    ],
)
def test_scores_of_what_does_not_fit_are_refused(rows, labels, options, message):
    for compute in (recall_at_k, precision_at_r):
        with pytest.raises(ValueError, match=message):
            compute(rows, labels, **options)


def test_scores_that_do_not_exist_are_refused():
    for ks in ((), (0, 1)):
        with pytest.raises(ValueError, match="whole numbers of at least 1"):
            recall_at_k(ONES, [0, 1, 1], ks)
    with pytest.raises(ValueError, match="no query has an image of its class"):
        precision_at_r(torch.eye(3), [0, 1, 2])


# ------------------------------------------------------------------------ the whole protocol


def test_the_scores_of_a_test_half_and_their_protocol():
    rows = noise(60, 4).float()
    labels = np.arange(60) % 6
    scores = score(rows, labels, seed=2, full=True)
    recall = recall_at_k(rows, labels, RECALL_AT)
    assert {k: scores[f"recall@{k}"] for k in RECALL_AT} == recall
    assert scores["nmi"] == clustering_nmi(rows, labels, seed=2)
    assert scores["map@r"] == precision_at_r(rows, labels)["map@r"]
    protocol = scores["nmi_protocol"]
    for words in ("6 clusters", "faiss", "best of 10 ", "<=300", "seed 2"):
        assert words in protocol


def test_queries_search_the_gallery_alone():
    rows = noise(60, 4).float()
    labels = np.arange(60) % 6
    is_query = np.arange(60) < 20
    scores = score(rows, labels, "inshop", is_query=is_query, no_nmi="not asked for")
    gallery = (rows[20:], labels[20:])
    expected = recall_at_k(rows[:20], labels[:20], (1, 10, 20, 30, 40, 50), gallery=gallery)
    expected = {f"recall@{k}": share for k, share in expected.items()}
    assert scores == expected | {"nmi_left_out": "not asked for"}


def test_images_that_are_alone_in_their_class():
    """R@K counts them as misses, MAP@R leaves them out; training and test judge alike."""
    rows = np.array([[0.0], [0.1], [5.0], [5.1], [9.0]])
    labels = np.array([1, 1, 2, 2, 3])
    assert check_classes(labels) == 1
    scores = score(torch.from_numpy(rows), labels, no_nmi="not asked for", full=True)
    assert scores["recall@1"] == pytest.approx(0.8) and scores["map@r"] == 1
    assert check_classes(labels, np.array([1, 0, 1, 0, 1], bool)) == 1
    assert check_classes(labels, np.array([1, 1, 1, 0, 0], bool)) == 2
    assert "1 test images have no other one" in alone_remark(1)
    for wrong in (np.arange(5), np.zeros(5)):
        with pytest.raises(UserError, match="nothing to score"):
            check_classes(wrong)


def test_what_cannot_be_scored():
    with pytest.raises(ValueError, match="one class only"):
        score(noise(5, 3), np.zeros(5))
    assert why_no_nmi("auto", 1000) == "" == why_no_nmi("on", 5000)
    assert "1001 classes" in why_no_nmi("auto", 1001)
    assert why_no_nmi("off", 5) == "not asked for"
