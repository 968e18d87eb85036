"""k-means: its promises on any data, and its quality beside scikit-learn."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from utils import clustering
from utils.clustering import cluster_sizes, kmeans, pick_engine, protocol


def gaussians(count: int, columns: int, groups: int, spread: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((groups, columns))
    rows = centres[rng.integers(0, groups, count)] + spread * rng.standard_normal((count, columns))
    return rows.astype(np.float32)


def check_promises(features: Tensor, k: int, result: tuple[Tensor, Tensor, float]) -> None:
    """The literal definitions, in float64: nearest centroid (lower index first), inertia, no empty cluster."""
    assignments, centroids, inertia = result
    distances = (features.double()[:, None] - centroids.double()[None]).square().sum(2)  # (N, k)
    assert torch.equal(assignments, distances.argmin(1))
    assert inertia == pytest.approx(float(distances.min(1).values.sum()), rel=1e-9, abs=1e-30)
    assert cluster_sizes(assignments, k).min() >= 1
    assert (assignments.dtype, centroids.dtype, centroids.shape) == (torch.int64, torch.float32, (k, features.shape[1]))


@given(st.integers(2, 60), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_promises(count: int, columns: int, n_init: int, few_values: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, columns, generator=generator)
    if few_values:
        features = features.round() + 0.0  # no -0
    k = int(torch.randint(1, count + 1, (1,), generator=generator))
    distinct = len(torch.unique(features, dim=0))
    if distinct < k:
        with pytest.raises(ValueError, match="rows are distinct"):
            kmeans(features, k, n_init=n_init, seed=seed)
    else:
        check_promises(features, k, kmeans(features, k, n_init=n_init, seed=seed))


def test_as_many_clusters_as_rows() -> None:
    features = torch.randn(70, 3, generator=torch.Generator().manual_seed(0))
    result = kmeans(features, 70)
    check_promises(features, 70, result)
    assert result[2] == pytest.approx(0, abs=1e-9)


def test_heavy_duplicates_leave_no_cluster_empty() -> None:
    features = torch.cat([torch.zeros(500, 4), torch.eye(4), 2 * torch.eye(4), torch.full((1, 4), 1e4)])
    check_promises(features, 10, kmeans(features, 10, n_init=2))


def test_rows_that_float32_distances_cannot_tell_apart() -> None:
    features = torch.ones(6, 2)
    features[:, 0] += torch.arange(6) * 1e-6
    features[0, 1] = 1e6
    assert cluster_sizes(kmeans(features, 6)[0], 6).tolist() == [1] * 6


def test_empty_clusters_get_the_farthest_rows_but_no_only_row() -> None:
    clusters, distances = torch.tensor([0, 0, 0, 2]), torch.tensor([0.0, 3.0, 2.0, 9.0])
    assert clustering._without_empty(clusters, distances, 4).tolist() == [0, 3, 1, 2]
    assert clusters.tolist() == [0, 0, 0, 2]


def test_same_seed_same_result_and_arrays_come_back_as_arrays() -> None:
    features = gaussians(600, 8, 10, 0.5)
    first, second = kmeans(features, 10, n_init=4, seed=3), kmeans(features, 10, n_init=4, seed=3)
    assert all(isinstance(part, np.ndarray) for part in first[:2])
    assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1]) and first[2] == second[2]
    tensors = kmeans(torch.from_numpy(features), 10, n_init=4, seed=3)
    assert np.array_equal(tensors[0].numpy(), first[0])
    state = torch.get_rng_state()
    kmeans(features, 10, n_init=4, seed=4)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's generator is used


@pytest.mark.parametrize("block", [1, 1000])
def test_block_size_does_not_change_the_promises(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.from_numpy(gaussians(300, 6, 8, 0.4))
    inertia = kmeans(features, 8)[2]
    monkeypatch.setattr(clustering, "CPU_BLOCK", block)
    result = kmeans(features, 8)
    check_promises(features, 8, result)
    assert result[2] == pytest.approx(inertia, rel=1e-3)


@pytest.mark.parametrize("spread", [0.1, 1.0])  # blobs, and gaussians that overlap
def test_inertia_is_that_of_scikit_learn(spread: float) -> None:
    from sklearn.cluster import KMeans

    features = gaussians(1500, 16, 30, spread)
    expected = np.mean([KMeans(30, n_init=10, random_state=seed).fit(features).inertia_ for seed in range(2)])
    found = np.mean([kmeans(features, 30, n_init=10, seed=seed)[2] for seed in range(2)])
    assert found <= 1.005 * expected


def test_more_starts_than_clusters_fit_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.from_numpy(gaussians(400, 6, 12, 0.4))
    monkeypatch.setattr(clustering, "SEEDING_SCORES", 1)  # one start at a time
    check_promises(features, 12, kmeans(features, 12, n_init=5))


def test_starts_are_tried_in_the_principal_directions_of_wide_rows() -> None:
    wide = gaussians(500, 300, 20, 0.3)
    part = clustering._principal_part(torch.from_numpy(wide - wide.mean(0)), 40, torch.Generator().manual_seed(0))
    kept = float(part.square().sum()) / float(np.square(wide - wide.mean(0)).sum())
    best = np.linalg.svd(wide - wide.mean(0), compute_uv=False) ** 2
    assert 0.97 * best[:40].sum() / best.sum() <= kept <= 1.0001 * best[:40].sum() / best.sum()
    check_promises(torch.from_numpy(wide), 20, kmeans(wide_tensor := torch.from_numpy(wide), 20, n_init=10))
    assert kmeans(wide_tensor, 20, n_init=10)[2] <= 1.001 * kmeans(wide_tensor, 20, n_init=10, engine="sklearn")[2]


def test_rounds_of_seeding_for_many_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.from_numpy(gaussians(900, 6, 60, 0.2))
    monkeypatch.setattr(clustering, "GREEDY_UP_TO", 10)
    check_promises(features, 60, kmeans(features, 60, n_init=5))
    few = torch.cat([torch.zeros(100, 3), torch.eye(3)])
    monkeypatch.setattr(clustering, "GREEDY_UP_TO", 2)
    assert cluster_sizes(kmeans(few, 4)[0], 4).tolist().count(1) == 3


def test_far_and_huge_rows() -> None:
    features = torch.from_numpy(gaussians(200, 4, 5, 0.1)).double() * 1e8 + 1e9
    check_promises(features, 5, kmeans(features, 5, n_init=2))


def test_faiss_engine() -> None:
    pytest.importorskip("faiss")
    features = torch.from_numpy(gaussians(400, 8, 10, 0.3))
    first, second = (kmeans(features, 10, n_init=2, max_iter=20, engine="faiss", seed=5) for _ in range(2))
    check_promises(features, 10, first)
    assert torch.equal(first[0], second[0])


def test_without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    features = gaussians(100, 4, 3, 0.1)
    assert kmeans(features, 3)[0].shape == (100,)
    with pytest.raises(ImportError):
        kmeans(features, 3, engine="faiss")


def test_protocol_says_what_is_done() -> None:
    assert pick_engine(5924, 128, 100) == "torch"
    halving = "k-means++, best of 10 starts by successive halving, <=300 iterations, torch engine"
    assert protocol(10, 300, "torch") == halving
    assert "one start" in protocol(1, 50, "torch")
    assert "best of 10" in protocol(10, 20, "faiss")
    with pytest.raises(ValueError, match="engine"):
        protocol(10, 20, "auto")


@pytest.mark.parametrize(
    ("features", "k", "options", "message"),
    [
        (np.ones((4, 2), np.float32), 5, {}, r"1 \.\. 4"),
        (np.ones((4, 2), np.float32), 0, {}, r"1 \.\. 4"),
        (np.full((4, 2), np.nan), 2, {}, "NaN"),
        (np.ones(4), 2, {}, "shape"),
        (np.eye(4), 2, {"engine": "cuml"}, "engine"),
        (np.eye(4), 2, {"n_init": 0}, "n_init"),
        (np.eye(4), 2, {"max_iter": 0}, "max_iter"),
    ],
)
def test_errors(features: np.ndarray, k: int, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kmeans(features, k, **options)


def test_cluster_sizes() -> None:
    assert cluster_sizes(np.array([0, 2, 2]), 4).tolist() == [1, 0, 2, 0]
    with pytest.raises(ValueError, match=r"0 \.\. 1"):
        cluster_sizes(torch.tensor([0, 2]), 2)


def test_sklearn_engine_is_scikit_learns() -> None:
    from sklearn.cluster import KMeans

    features = np.random.default_rng(3).standard_normal((200, 6)).astype(np.float32)
    reference = KMeans(5, n_init=3, max_iter=300, random_state=7).fit(features)
    assignments, centroids, inertia = kmeans(features, 5, n_init=3, seed=7, engine="sklearn")
    assert inertia == pytest.approx(reference.inertia_, rel=1e-4)
    assert (assignments == reference.labels_).mean() > 0.98
    assert centroids.shape == (5, 6)
    assert "scikit-learn" in protocol(10, 300, "sklearn")
