"""The losses against the literal formulas of their papers, slow and term by term."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from tensors import DOUBLE, assert_same_gradients, noise, unit
from torch import Tensor

from losses import (
    center_softmax_loss,
    cluster_means,
    contextual_similarity,
    instance_softmax_loss,
    reconstruction_loss,
    relaxed_contrastive_loss,
    rim_loss,
    self_distillation_loss,
    soft_center_loss,
    total_loss,
)

pytestmark = pytest.mark.usefixtures("one_thread")
# temperature, alpha, neg_m
SOFTMAX = [(0.1, 1.0, 1), (0.1, 1.0, 3), (0.07, 0.5, 1), (1.0, 0.0, 2), (0.5, 2.0, 7)]


def two_view_labels(n_images: int, n_clusters: int) -> Tensor:
    """Make labels (2m,) with gaps between their values and out of order, equal in both views."""
    return torch.tensor([(7 * (i % n_clusters) + 3) % 23 for i in range(n_images)]).repeat(2)


def literal_softmax(row: Tensor, centers: Tensor, temperature: float) -> Tensor:
    exponentials = torch.stack([torch.exp(row @ center / temperature) for center in centers])
    return exponentials / exponentials.sum()


# -------------------------------------------------------------------------- precision of all


def soft_center_of(x: Tensor, wide: torch.dtype) -> Tensor:
    members = unit(16, 3, 32, seed=6).to(wide)
    return soft_center_loss(x, members, [unit(5, 32, seed=7).to(wide)], 0.1, 0.05)


CENTERS = unit(4, 32, seed=2)
SIMILARITY = torch.rand(16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
OF_EMBEDDINGS = {  # of x (16, 32), of unit length
    "rim": rim_loss,
    "center": lambda x: center_softmax_loss(x, CENTERS.to(x.dtype), two_view_labels(8, 4)),
    "instance": instance_softmax_loss,
    "contextual": lambda x: contextual_similarity(x, torch.arange(8).repeat(2)),
    "contrastive": lambda x: relaxed_contrastive_loss(x, SIMILARITY.to(x.dtype)),
    "distillation": lambda x: self_distillation_loss(x, unit(16, 64, seed=4).to(x.dtype)),
    "soft centers": lambda x: soft_center_of(x, torch.promote_types(x.dtype, torch.float32)),
    "reconstruction": lambda x: reconstruction_loss(x, unit(16, 32, seed=5).to(x.dtype)),
}


@pytest.mark.parametrize("name", OF_EMBEDDINGS)
def test_losses_in_every_precision(name):
    loss = OF_EMBEDDINGS[name]
    x = unit(16, 32)
    exact = loss(x)
    assert exact.dtype == torch.float64
    single = loss(x.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(x.float()), single)
        half = loss(x.bfloat16())
    assert half.dtype == torch.float32
    if name != "contextual":  # its neighborhoods jump
        torch.testing.assert_close(half, single, rtol=0.05, atol=0.05)


# ------------------------------------------------------------------------------------- rim


def literal_rim(logits: Tensor, mu: float) -> Tensor:
    """Compute H(Y|X) + 1 - mu H(Y) by plain logarithms of plain softmax probabilities."""
    batch, n_cluster = logits.shape
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    conditional = torch.zeros((), dtype=logits.dtype)
    marginal = torch.zeros((), dtype=logits.dtype)
    for i in range(batch):
        for k in range(n_cluster):
            conditional = conditional - p[i, k] * p[i, k].log() / (batch * math.log(batch))
    for k in range(n_cluster):
        mean = sum(p[i, k] for i in range(batch)) / batch
        marginal = marginal - mean * mean.log() / math.log(n_cluster)
    return conditional + 1 - mu * marginal


@pytest.mark.parametrize("batch, n_cluster", [(2, 2), (6, 3), (16, 32), (33, 5)])
@pytest.mark.parametrize("mu", [0.0, 1.0, 2.5])
def test_rim_is_the_formula(batch, n_cluster, mu):
    logits = unit(batch, n_cluster).requires_grad_()
    values = [rim_loss(logits, mu), literal_rim(logits, mu)]
    torch.testing.assert_close(*values, **DOUBLE)
    assert_same_gradients(values, logits)


EXTREME_LOGITS = torch.tensor([[1e4, 0.0, -1e4], [0.0, 1e4, 0.0], [-1e4, -1e4, 0.0]])


@pytest.mark.parametrize("logits", [unit(1, 4), unit(4, 1), unit(1, 1), EXTREME_LOGITS])
def test_rim_in_its_corners(logits):
    logits = logits.clone().requires_grad_()
    loss = rim_loss(logits)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    if len(logits) == 3:  # sure of each row, and balanced
        assert loss.item() == pytest.approx(0.0, abs=1e-6)


# -------------------------------------------------------------------------- center softmax


def literal_center(
    x: Tensor, centers: Tensor, labels: Tensor, t: float, alpha: float, neg_m: int
) -> Tensor:
    """Compute -1/2m sum_i (pos_i + alpha neg_i) with every exponential as it is written."""
    n_rows = len(x)
    present = sorted(set(labels.tolist()))
    total = torch.zeros((), dtype=x.dtype)
    for i in range(n_rows):
        cluster = present.index(int(labels[i]))
        e = [torch.exp(torch.dot(x[i], c.detach()) / t) for c in centers]
        other = [j for j in range(len(present)) if j != cluster]
        over_other = neg_m * sum(e[j] for j in other)
        partner = x[(i + n_rows // 2) % n_rows].detach()
        pos = torch.dot(x[i], partner) / t - torch.log(over_other)
        neg = neg_m * sum(torch.log(1 - e[j] / (e[cluster] + over_other)) for j in other)
        total = total - (pos + alpha * neg) / n_rows
    return total


def exact_center(x: Tensor, centers: Tensor, labels: Tensor, t: float, neg_m: int) -> float:
    """Compute the same by 1000 digits, so that nothing overflows and no difference cancels."""
    with mpmath.workdps(1000):
        n_rows = len(x)
        present = sorted(set(labels.tolist()))
        rows = [[mpmath.mpf(value) for value in row] for row in x.tolist()]
        means = [[mpmath.mpf(value) for value in row] for row in centers.tolist()]
        total = mpmath.mpf(0)
        for i in range(n_rows):
            cluster = present.index(int(labels[i]))
            e = [mpmath.exp(mpmath.fdot(rows[i], c) / mpmath.mpf(t)) for c in means]
            other = [j for j in range(len(e)) if j != cluster]
            over_other = neg_m * sum(e[j] for j in other)
            pull = mpmath.fdot(rows[i], rows[(i + n_rows // 2) % n_rows]) / mpmath.mpf(t)
            pos = pull - mpmath.log(over_other)
            neg = neg_m * sum(mpmath.log(1 - e[j] / (e[cluster] + over_other)) for j in other)
            total -= (pos + neg) / n_rows
        return float(total)


@pytest.mark.parametrize("t, alpha, neg_m", SOFTMAX)
@pytest.mark.parametrize(
    "n_images, n_clusters, dim", [(3, 2, 3), (2, 2, 4), (6, 3, 8), (16, 11, 128)]
)
def test_center_softmax_is_the_formula(n_images, n_clusters, dim, t, alpha, neg_m):
    x = unit(2 * n_images, dim, seed=1).requires_grad_()
    centers = unit(n_clusters, dim, seed=2).requires_grad_()
    rest = (centers, two_view_labels(n_images, n_clusters), t, alpha, neg_m)
    values = [center_softmax_loss(x, *rest), literal_center(x, *rest)]
    torch.testing.assert_close(*values, **DOUBLE)
    assert_same_gradients(values, x, rtol=1e-7, atol=1e-8)  # the literal log(1 - q) cancels
    values[0].backward()
    assert centers.grad is None


@pytest.mark.parametrize("neg_m", [1, 3])
def test_a_single_cluster_keeps_the_pull_alone(neg_m):
    x = unit(6, 4).requires_grad_()
    centers = unit(1, 4, seed=5).requires_grad_()
    loss = center_softmax_loss(x, centers, torch.full((6,), 9), 0.2, 1.0, neg_m)
    expected = -sum(torch.dot(x[i], x[(i + 3) % 6]).item() for i in range(6)) / 6 / 0.2
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    torch.testing.assert_close(x.grad, -x.detach().roll(3, 0) / 0.2 / 6, **DOUBLE)


def extremes() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    labels = two_view_labels(4, 3)
    centers = unit(3, 6, seed=7)
    cluster = torch.searchsorted(labels.unique(), labels)
    same = unit(1, 6, seed=8).expand(8, 6).clone()
    same_centers = centers[:1].expand(3, 6).clone()
    return {
        "equal embeddings": (same, centers, labels),
        "equal centers": (unit(8, 6, seed=9), same_centers, labels),
        "at the own center": (centers[cluster], centers, labels),
        "at a foreign center": (centers[(cluster + 1) % 3], centers, labels),
        "opposite to the own center": (-centers[cluster], centers, labels),
        "opposite views": (torch.cat([same[:4], -same[:4]]), centers, labels),
        "all equal": (centers[:1].expand(8, 6).clone(), same_centers, labels),
    }


@pytest.mark.parametrize("temperature", [0.001, 0.01, 1.0])
@pytest.mark.parametrize("neg_m", [1, 3])
@pytest.mark.parametrize("name", extremes())
def test_center_softmax_of_extreme_values(name, neg_m, temperature):
    x, centers, labels = extremes()[name]
    expected = exact_center(x, centers, labels, temperature, neg_m)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        rows = x.to(dtype, copy=True).requires_grad_()
        loss = center_softmax_loss(rows, centers.to(dtype), labels, temperature, 1.0, neg_m)
        loss.backward()
        # a product of unit vectors is uncertain by some last places, divided by the temperature
        uncertain = 8 * torch.finfo(dtype).eps / temperature
        limit = uncertain * (1 + 2 * neg_m)
        assert loss.item() == pytest.approx(expected, rel=tolerance, abs=limit)
        assert rows.grad.isfinite().all()


# ------------------------------------------------------------------------ instance softmax


def literal_instance(x: Tensor, t: float, alpha: float, neg_m: int) -> Tensor:
    """Compute -1/2m sum_i (log P(other view) + alpha neg_m sum_j log(1 - P(j)))."""
    n_rows = len(x)
    total = torch.zeros((), dtype=x.dtype)
    for i in range(n_rows):
        partner = (i + n_rows // 2) % n_rows
        other = [j for j in range(n_rows) if j not in (i, partner)]
        e = [torch.exp(torch.dot(x[i], x[j].detach()) / t) for j in range(n_rows)]
        over_all = e[partner] + neg_m * sum(e[j] for j in other)
        total = total + torch.log(e[partner] / over_all)
        total = total + alpha * neg_m * sum(torch.log(1 - e[j] / over_all) for j in other)
    return -total / n_rows


@pytest.mark.parametrize("t, alpha, neg_m", SOFTMAX)
@pytest.mark.parametrize("n_images, dim", [(2, 3), (3, 4), (8, 16)])
def test_instance_softmax_is_the_formula(n_images, dim, t, alpha, neg_m):
    x = unit(2 * n_images, dim, seed=n_images).requires_grad_()
    values = [instance_softmax_loss(x, t, alpha, neg_m), literal_instance(x, t, alpha, neg_m)]
    torch.testing.assert_close(*values, **DOUBLE)
    assert_same_gradients(values, x, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("neg_m", [1, 3])
def test_instance_softmax_of_extreme_embeddings(neg_m):
    """At this temperature a plain exponential of a float overflows."""
    equal_rows = unit(1, 6).expand(8, 6)
    opposite_views = torch.cat([unit(4, 6), -unit(4, 6)])
    equal_pairs = unit(2, 6).repeat_interleave(2, 0).repeat(2, 1)
    for x in (equal_rows, opposite_views, equal_pairs):
        rows = x.float().requires_grad_()
        loss = instance_softmax_loss(rows, 0.005, 1.0, neg_m)
        loss.backward()
        assert loss.isfinite() and rows.grad.isfinite().all()


# ------------------------------------------------------------------------------------ STML


def literal_similarity(x: Tensor, images: list[int], k: int, sigma: float) -> Tensor:
    """Compute the contextual similarity by sets of rows.

    The nearest k rows N(i) begin with the rows of the same image. R(i) holds the rows that are
    nearest mutually. C_ij = |R(i) and R(j)| / |R(i)| for j in R(i), averaged over the nearer half
    of N(i), then over (i, j) and (j, i), then with exp(-d_ij^2 / sigma).
    """
    n_rows = len(x)
    distance = [[(a - b).norm().item() for b in x] for a in x]
    nearest = []
    for i in range(n_rows):
        by_distance = sorted(range(n_rows), key=lambda j: (images[j] != images[i], distance[i][j]))
        nearest.append(by_distance[:k])
    mutual = [{j for j in nearest[i] if i in nearest[j]} for i in range(n_rows)]
    overlap = torch.zeros(n_rows, n_rows, dtype=x.dtype)
    for i in range(n_rows):
        for j in mutual[i]:
            overlap[i, j] = len(mutual[i] & mutual[j]) / len(mutual[i])
    half = round(k / 2)
    context = torch.stack([sum(overlap[h] for h in row[:half]) / half for row in nearest])
    result = torch.empty_like(context)
    for i in range(n_rows):
        for j in range(n_rows):
            pairwise = math.exp(-(distance[i][j] ** 2) / sigma)
            result[i, j] = (pairwise + (context[i, j] + context[j, i]) / 2) / 2
    return result


@pytest.mark.parametrize(
    "n_rows, n_images, k, sigma",
    [(6, 6, 2, 1.0), (12, 6, 4, 3.0), (24, 12, 10, 1.0), (24, 8, 9, 3.0), (40, 20, 7, 0.5)],
)
def test_contextual_similarity_is_its_formula(n_rows, n_images, k, sigma):
    x = unit(n_rows, 4, seed=n_rows)
    images = torch.arange(n_rows) % n_images
    similarity = contextual_similarity(x, images, k, sigma)
    expected = literal_similarity(x, images.tolist(), k, sigma)
    torch.testing.assert_close(similarity, expected, **DOUBLE)
    assert torch.equal(similarity, similarity.T)
    assert similarity.min() >= 0 and similarity.max() <= 1 + 1e-12


def test_contextual_similarity_of_a_batch_smaller_than_the_neighborhood():
    assert contextual_similarity(unit(4, 3), torch.arange(4), 10).isfinite().all()
    equal_rows = unit(1, 5).repeat(4, 1)
    assert contextual_similarity(equal_rows, torch.arange(2).repeat(2)).isfinite().all()


def literal_contrastive(x: Tensor, w: Tensor, margin: float) -> Tensor:
    n_rows = len(x)
    total = torch.zeros((), dtype=x.dtype)
    for i in range(n_rows):
        mean = sum((x[i] - x[j]).norm() for j in range(n_rows) if j != i) / n_rows
        for j in range(n_rows):
            if j != i:
                d = (x[i] - x[j]).norm() / mean
                push = torch.clamp(margin - d, min=0) ** 2
                total = total + w[i, j] * d**2 + (1 - w[i, j]) * push
    return total / (n_rows * (n_rows - 1))


@pytest.mark.parametrize("n_rows, dim, margin", [(2, 3, 1.0), (5, 3, 1.0), (16, 8, 0.7)])
def test_relaxed_contrastive_is_its_formula(n_rows, dim, margin):
    x = unit(n_rows, dim, seed=3).requires_grad_()
    w = SIMILARITY[:n_rows, :n_rows]
    values = [relaxed_contrastive_loss(x, w, margin), literal_contrastive(x, w, margin)]
    torch.testing.assert_close(*values, **DOUBLE)
    assert_same_gradients(values, x, rtol=1e-8, atol=1e-10)


def literal_distillation(small: Tensor, large: Tensor) -> Tensor:
    n_rows = len(small)
    total = torch.zeros((), dtype=small.dtype)
    for i in range(n_rows):
        p, q = (_literal_nearness(x, i) for x in (large, small))
        total = total + (p * (p / q).log()).sum()
    return total / n_rows


def _literal_nearness(x: Tensor, i: int) -> Tensor:
    """Return softmax over j of -d_ij, d_ij divided by its mean over j."""
    distances = [(x[i] - row).norm() if j != i else x.new_zeros(()) for j, row in enumerate(x)]
    d = torch.stack(distances)
    e = torch.exp(-d / (d.sum() / len(x)))
    return e / e.sum()


@pytest.mark.parametrize("n_rows, dim, wide", [(2, 3, 4), (5, 3, 9), (16, 8, 2)])
def test_self_distillation_is_its_formula(n_rows, dim, wide):
    small = noise(n_rows, dim).requires_grad_()
    large = noise(n_rows, wide, seed=1).requires_grad_()
    values = [self_distillation_loss(small, large), literal_distillation(small, large.detach())]
    torch.testing.assert_close(*values, **DOUBLE)
    assert_same_gradients(values, small, rtol=1e-8, atol=1e-10)
    values[0].backward()
    assert large.grad is None


def test_distances_of_equal_rows_have_finite_gradients():
    rows = unit(1, 5).repeat(4, 1).float().requires_grad_()
    loss = relaxed_contrastive_loss(rows, torch.eye(4)) + self_distillation_loss(rows, rows)
    loss.backward()
    assert loss.isfinite() and rows.grad.isfinite().all()


# ---------------------------------------------------------------------------- soft centers


def literal_soft_center(
    x: Tensor, members: Tensor, partitions: list[Tensor], t: float, target_t: float
) -> Tensor:
    total = x.new_zeros(())
    for centers in partitions:
        for row, remembered in zip(x, members, strict=True):
            targets = [literal_softmax(member, centers, target_t) for member in remembered]
            q = torch.stack(targets).mean(0)
            total = total - (q * literal_softmax(row, centers, t).log()).sum()
    return total / (len(x) * len(partitions))


@pytest.mark.parametrize(
    "n_rows, dim, n_members, sizes", [(2, 3, 1, (2,)), (5, 4, 3, (2, 7)), (8, 6, 5, (3, 4, 9))]
)
def test_soft_centers_is_its_formula(n_rows, dim, n_members, sizes):
    x = unit(n_rows, dim).requires_grad_()
    members = unit(n_rows, n_members, dim, seed=1)
    partitions = [unit(size, dim, seed=size) for size in sizes]
    rest = (members, partitions, 0.1, 0.05)
    values = [soft_center_loss(x, *rest), literal_soft_center(x, *rest)]
    torch.testing.assert_close(*values, **DOUBLE)
    assert_same_gradients(values, x, rtol=1e-8, atol=1e-10)


# -------------------------------------------------------------------- reconstruction, total


def test_cluster_means_are_means():
    rows = noise(7, 3, 2, 2).requires_grad_()
    cluster = torch.tensor([2, 0, 1, 0, 2, 2, 1])
    counts = torch.bincount(cluster)
    means = cluster_means(rows, cluster, counts)
    for k in range(3):
        members = [rows[i] for i in range(7) if cluster[i] == k]
        torch.testing.assert_close(means[k], torch.stack(members).mean(0))
    assert torch.autograd.gradcheck(lambda r: cluster_means(r, cluster, counts), rows)
    assert cluster_means(rows.detach().bfloat16(), cluster, counts).dtype == torch.float32


def test_reconstruction_loss_is_the_mean_square():
    a = noise(2, 3, 4, 5).requires_grad_()
    b = noise(2, 3, 4, 5, seed=1)
    squares = [
        (x - y) ** 2 for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)
    ]
    assert reconstruction_loss(a, b).item() == pytest.approx(sum(squares) / len(squares), rel=1e-12)
    assert torch.autograd.gradcheck(reconstruction_loss, (a, b))


def test_total_loss_weighs_and_leaves_out():
    values = {"metric": 2.0, "rim": 3.0, "reconstruction": 5.0}
    losses = {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
    assert total_loss(losses).item() == pytest.approx(0.9 * 2 + 0.3 * 3 + 0.001 * 5, rel=1e-12)
    assert total_loss(losses, 1, 10, 100).item() == 532
    assert total_loss(losses, 0, 0, 0).item() == 0
    for name in losses:
        broken = losses | {name: torch.tensor(math.nan)}
        weights = dict.fromkeys(losses, 1.0)
        assert total_loss(broken, **weights).isnan()
        assert total_loss(broken, **(weights | {name: 0.0})).isfinite()


# --------------------------------------------------------------------------------- refused

LABELS = torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize(
    "loss, arguments, message",
    [
        (rim_loss, (torch.zeros(4),), "cluster_logits must be"),
        (center_softmax_loss, (unit(5, 4), unit(2, 4), torch.zeros(5).long()), "embeddings must"),
        (center_softmax_loss, (unit(4, 4), unit(3, 4), LABELS), "centers must be"),
        (center_softmax_loss, (unit(4, 4), unit(2, 4), LABELS, 0.1, 1.0, 0), "neg_m must be"),
        (instance_softmax_loss, (unit(2, 3),), "m > 1"),
        (instance_softmax_loss, (unit(4, 3), 0.1, 1.0, 0), "neg_m must be"),
        (relaxed_contrastive_loss, (unit(1, 3), torch.eye(1)), "B > 1"),
        (self_distillation_loss, (unit(3, 2), unit(4, 2)), "small and large must be"),
        (soft_center_loss, (unit(4, 3), unit(3, 2, 3), [unit(5, 3)], 1, 1), "embeddings must be"),
        (reconstruction_loss, (torch.zeros(2, 3), torch.zeros(1, 3)), "shapes differ"),
    ],
)
def test_losses_refuse_shapes_that_do_not_fit(loss, arguments, message):
    with pytest.raises(ValueError, match=message):
        loss(*arguments)
