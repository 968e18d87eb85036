"""k-means by both engines: what it promises, and its quality."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensors import noise

from utils import clustering
from utils.clustering import approximate_kmeans, kmeans, pick_engine
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
ENGINES = ("faiss", "sklearn")


def gaussians(count: int, dim: int, n_groups: int, spread: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((n_groups, dim))
    rows = centers[rng.integers(0, n_groups, count)] + spread * rng.standard_normal((count, dim))
    return rows.astype(np.float32)


def assert_promises(features: np.ndarray, k: int, result: tuple) -> None:
    """Compare with the definitions in float64: nearest centroids, and the sum of squares."""
    assignments, centroids, inertia = result
    assert assignments.dtype == np.int64 and centroids.dtype == np.float32
    assert centroids.shape == (k, features.shape[1])
    rows = features.astype(np.float64)
    squares = ((rows[:, None] - centroids.astype(np.float64)) ** 2).sum(2)  # (N, k)
    literal = np.take_along_axis(squares, assignments[:, None], 1).sum()
    assert literal == pytest.approx(squares.min(1).sum(), rel=1e-6)
    assert inertia == pytest.approx(literal, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("k", [1, 7, 60])
def test_promises(engine, k):
    features = gaussians(60, 5, 7, 0.4)
    result = kmeans(features, k, n_init=3, seed=1, engine=engine)
    assert_promises(features, k, result)
    if k == 60:  # as many clusters as rows
        assert sorted(result[0]) == list(range(60))
        assert result[2] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_seed_makes_the_clusters(engine):
    features = gaussians(300, 8, 10, 1.0)
    state = torch.get_rng_state()
    results = [kmeans(features, 10, n_init=1, seed=seed, engine=engine) for seed in (3, 3, 4)]
    assert np.array_equal(results[0][0], results[1][0])
    assert np.array_equal(results[0][1], results[1][1])
    assert not np.array_equal(results[0][1], results[2][1])
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's generator is used
    tensors = kmeans(torch.from_numpy(features), 10, n_init=1, seed=3, engine=engine)
    assert isinstance(tensors[0], torch.Tensor)
    assert np.array_equal(tensors[0].numpy(), results[0][0])
    kmeans(features, 10, n_init=1, seed=2**32 - 1, engine=engine)  # the largest seed
    by_default = kmeans(features, 10, engine=engine)
    assert by_default[2] == kmeans(features, 10, n_init=10, engine=engine)[2]


@pytest.mark.parametrize(
    "features",
    [
        gaussians(1500, 16, 30, 0.1),  # blobs
        gaussians(1500, 16, 30, 1.0),  # gaussians that overlap
        1 + 1e-4 * gaussians(1500, 16, 30, 1.0),  # nearly equal, as a collapsed embedding
    ],
)
def test_the_engines_are_as_good_as_each_other(features):
    inertia = {}
    for engine in ENGINES:
        runs = [kmeans(features, 30, seed=seed, engine=engine)[2] for seed in range(2)]
        inertia[engine] = np.mean(runs)
    assert inertia["faiss"] == pytest.approx(inertia["sklearn"], rel=0.01)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_equal_rows_are_clustered_too(engine):
    assignments, _, inertia = kmeans(np.ones((20, 3), np.float32), 4, n_init=2, engine=engine)
    assert set(assignments) <= set(range(4))
    assert inertia == pytest.approx(0, abs=1e-3)  # faiss moves the centers of empty clusters apart


def test_engines(monkeypatch):
    assert pick_engine() == pick_engine("faiss") == "faiss"
    monkeypatch.setattr(clustering, "faiss", None)
    assert pick_engine() == "sklearn"
    features = gaussians(50, 4, 3, 0.1)
    auto = kmeans(features, 3, seed=5)
    assert np.array_equal(auto[0], kmeans(features, 3, seed=5, engine="sklearn")[0])
    with pytest.raises(UserError, match="faiss is not installed"):
        pick_engine("faiss")


@pytest.mark.parametrize(
    "features, k, engine, message",
    [
        (np.eye(4), 5, "auto", "cannot make 5 clusters of 4 images"),
        (np.eye(4), 0, "auto", "cannot make 0 clusters"),
        (np.full((4, 2), np.nan), 2, "auto", "NaN"),
        (np.ones(4), 2, "auto", "got the shape"),
        (noise(4, 2).long(), 2, "auto", "floating-point"),
        (np.eye(4), 2, "cuml", "one of auto, faiss, sklearn, not 'cuml'"),
    ],
)
def test_refused(features, k, engine, message):
    with pytest.raises(ValueError, match=message):
        kmeans(features, k, engine=engine)


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy])
def test_approximate_clusters_are_nearly_as_good(make):
    features = gaussians(3000, 16, 40, 1.0)
    assignments, centroids, inertia = approximate_kmeans(make(features), 500, max_iter=50, seed=2)
    again = approximate_kmeans(make(features), 500, max_iter=50, seed=2)
    assert type(assignments) is type(centroids) is type(make(features))
    assert np.array_equal(assignments, again[0]) and np.array_equal(centroids, again[1])
    literal = np.square(features - np.asarray(centroids)[np.asarray(assignments)]).sum()
    assert inertia == pytest.approx(literal, rel=1e-4)
    exact = kmeans(features, 500, n_init=1, max_iter=50, seed=2)[2]
    assert exact < inertia < 1.05 * exact


@pytest.mark.parametrize("share", [0.7, 0.9, 0.98])
def test_approximate_clusters_of_many_equal_rows(share):
    features = gaussians(6000, 16, 40, 1.0)
    features[: int(share * 6000)] = features[0]
    features *= np.random.default_rng(1).pareto(0.5, (6000, 1)).astype(np.float32).clip(1, 1e3)
    assignments, centroids, inertia = approximate_kmeans(features, 1000, max_iter=50, seed=1)
    assert assignments.min() >= 0 and np.isfinite(centroids).all()
    literal = np.square((features - centroids[assignments]).astype(np.float64)).sum()
    assert inertia == pytest.approx(literal, rel=1e-2)


@pytest.mark.parametrize("k", [1, 2, 39, 40])
def test_approximate_clusters_at_the_limits(k):
    features = np.repeat(gaussians(4, 3, 4, 1.0), 10, 0)  # ten of each
    assignments, centroids, _ = approximate_kmeans(features, k, seed=1)
    assert assignments.shape == (40,) and centroids.shape == (k, 3)
    assert assignments.min() >= 0 and assignments.max() < k and np.isfinite(centroids).all()
    with pytest.raises(UserError, match="cannot make 41 clusters of 40 images"):
        approximate_kmeans(features, 41)
