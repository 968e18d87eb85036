"""The losses against the literal formulas of the paper, slow and term by term, and in their corners."""

from __future__ import annotations

import copy
import math

import mpmath
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses import cbswr_losses, center_softmax_loss, cluster_means, reconstruction_loss, rim_loss, total_loss
from models import build_model
from models.decoder import WeightedBatchNorm2d

pytestmark = pytest.mark.usefixtures("one_thread")
DOUBLE = {"rtol": 1e-10, "atol": 1e-12}
SINGLE = {"rtol": 2e-5, "atol": 2e-5}


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(
        dtype
    )


def two_view_labels(images: int, clusters: int) -> Tensor:
    """Every one of `clusters` labels, with gaps between their values and out of order; the same for both views."""
    return torch.tensor([(7 * (i % clusters) + 3) % 23 for i in range(images)]).repeat(2)


def literal_rim(logits: Tensor, mu: float) -> Tensor:
    """H(Y|X) + 1 - mu H(Y), with plain logarithms of plain softmax probabilities."""
    batch, n_cluster = logits.shape
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    conditional = marginal = torch.zeros((), dtype=logits.dtype)
    for i in range(batch):
        for k in range(n_cluster):
            conditional = conditional - p[i, k] * p[i, k].log() / (batch * math.log(batch))
    for k in range(n_cluster):
        mean = sum(p[i, k] for i in range(batch)) / batch
        marginal = marginal - mean * mean.log() / math.log(n_cluster)
    return conditional + 1 - mu * marginal


def literal_metric(x: Tensor, centers: Tensor, labels: Tensor, t: float, alpha: float, neg_m: int) -> Tensor:
    """-1/2m sum_i (pos_i + alpha neg_i), every exponential and every logarithm as it is written."""
    rows, present = len(x), sorted(set(labels.tolist()))
    total = torch.zeros((), dtype=x.dtype)
    for i in range(rows):
        own = present.index(int(labels[i]))
        e = [torch.exp(torch.dot(x[i], c.detach()) / t) for c in centers]
        others = [j for j in range(len(present)) if j != own]
        over_others = neg_m * sum(e[j] for j in others)
        partner = x[(i + rows // 2) % rows].detach()
        pos = torch.dot(x[i], partner) / t - torch.log(over_others)
        neg = neg_m * sum(torch.log(1 - e[j] / (e[own] + over_others)) for j in others)
        total = total - (pos + alpha * neg) / rows
    return total


def exact_metric(x: Tensor, centers: Tensor, labels: Tensor, t: float, alpha: float, neg_m: int) -> float:
    """The same with so many digits (1000) that no exponential overflows and no difference cancels."""
    with mpmath.workdps(1000):
        rows, present = len(x), sorted(set(labels.tolist()))
        total = mpmath.mpf(0)
        vectors, means = ([[mpmath.mpf(v) for v in row] for row in m.double().tolist()] for m in (x, centers))
        for i in range(rows):
            own = present.index(int(labels[i]))
            e = [mpmath.exp(mpmath.fdot(vectors[i], c) / mpmath.mpf(t)) for c in means]
            over_others = neg_m * sum(e[j] for j in range(len(e)) if j != own)
            pos = mpmath.fdot(vectors[i], vectors[(i + rows // 2) % rows]) / mpmath.mpf(t) - mpmath.log(over_others)
            neg = neg_m * sum(mpmath.log(1 - e[j] / (e[own] + over_others)) for j in range(len(e)) if j != own)
            total -= (pos + alpha * neg) / rows
        return float(total)


# ---------------------------------------------------------------- rim


@pytest.mark.parametrize("batch, n_cluster", [(2, 2), (6, 3), (16, 32), (33, 5)])
@pytest.mark.parametrize("mu", [0.0, 1.0, 2.5])
def test_rim_is_the_formula(batch, n_cluster, mu):
    logits = unit(batch, n_cluster).requires_grad_()
    loss, expected = rim_loss(logits, mu), literal_rim(logits, mu)
    torch.testing.assert_close(loss, expected, **DOUBLE)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, **DOUBLE)
    single = rim_loss(logits.detach().float(), mu)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected.detach(), **SINGLE)


def test_rim_is_divided_by_the_log_of_the_batch_size():
    """All rows undecided: H(Y|X) = log K / log B, H(Y) = 1."""
    loss = rim_loss(torch.zeros(64, 32, dtype=torch.float64), mu=1.0)
    assert loss.item() == pytest.approx(math.log(32) / math.log(64), rel=1e-12)


def test_rim_gradcheck():
    assert torch.autograd.gradcheck(rim_loss, (unit(5, 4).requires_grad_(), 1.5))


@pytest.mark.parametrize("shape", [(1, 4), (4, 1), (1, 1)])
def test_rim_with_one_row_or_one_cluster_is_finite(shape):
    logits = unit(*shape).requires_grad_()
    loss = rim_loss(logits)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


def test_rim_of_extreme_logits_is_finite():
    logits = torch.tensor([[1e4, 0.0, -1e4], [0.0, 1e4, 0.0], [-1e4, -1e4, 0.0]], requires_grad=True)
    loss = rim_loss(logits)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)  # sure of each row, and balanced
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(4,), (0, 3), (3, 0), (2, 3, 4)])
def test_rim_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match="cluster_logits must be"):
        rim_loss(torch.zeros(shape))


# ---------------------------------------------------------------- centre softmax

SETTINGS = [(0.1, 1.0, 1), (0.1, 1.0, 3), (0.07, 0.5, 1), (1.0, 0.0, 2), (0.5, 2.0, 7)]


@pytest.mark.parametrize("t, alpha, neg_m", SETTINGS)
@pytest.mark.parametrize("images, clusters, dim", [(3, 2, 3), (2, 2, 4), (6, 3, 8), (8, 8, 16), (16, 11, 128)])
def test_metric_loss_is_the_formula(images, clusters, dim, t, alpha, neg_m):
    x = unit(2 * images, dim, seed=1).requires_grad_()
    centers, labels = unit(clusters, dim, seed=2), two_view_labels(images, clusters)
    loss = center_softmax_loss(x, centers, labels, t, alpha, neg_m)
    expected = literal_metric(x, centers, labels, t, alpha, neg_m)
    torch.testing.assert_close(loss, expected, **DOUBLE)
    gradients = [torch.autograd.grad(value, x)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-8)  # the literal log(1 - q) cancels
    single = center_softmax_loss(x.detach().float(), centers.float(), labels, t, alpha, neg_m)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected.detach(), **SINGLE)


def test_defaults_are_those_of_the_paper():
    x, centers, labels = unit(8, 5), unit(3, 5, seed=9), two_view_labels(4, 3)
    assert torch.equal(
        center_softmax_loss(x, centers, labels), center_softmax_loss(x, centers, labels, 0.1, alpha=1.0, neg_m=1)
    )


@pytest.mark.parametrize("neg_m", [1, 3])
def test_the_push_has_the_gradient_of_its_value(neg_m):
    """gradcheck needs a value whose whole gradient is offered: the pull, with its detached partner, is added back."""
    centers, labels = unit(4, 5, seed=3), two_view_labels(4, 4)

    def push(x: Tensor) -> Tensor:
        pull = (x * x.detach().roll(4, 0)).sum(1).mean() / 0.3
        return center_softmax_loss(x, centers, labels, 0.3, 0.7, neg_m) + pull

    assert torch.autograd.gradcheck(push, unit(8, 5, seed=4).requires_grad_())


def test_the_pull_leaves_the_other_view_alone_and_centers_get_no_gradient():
    x = unit(6, 4).requires_grad_()
    centers = unit(1, 4, seed=5).requires_grad_()
    center_softmax_loss(x, centers, torch.full((6,), 9), temperature=0.2).backward()
    torch.testing.assert_close(x.grad, -x.detach().roll(3, 0) / 0.2 / 6, **DOUBLE)
    assert centers.grad is None
    more = unit(3, 4, seed=6).requires_grad_()
    center_softmax_loss(x, more, two_view_labels(3, 3)).backward()
    assert more.grad is None


@pytest.mark.parametrize("neg_m", [1, 3])
def test_one_cluster_only_keeps_the_pull(neg_m):
    x = unit(6, 4).requires_grad_()
    loss = center_softmax_loss(x, unit(1, 4, seed=5), torch.zeros(6, dtype=torch.long), 0.1, 1.0, neg_m)
    loss.backward()
    expected = -sum(torch.dot(x[i], x[(i + 3) % 6]).item() for i in range(6)) / 6 / 0.1
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0


def extremes() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    labels, centers = two_view_labels(4, 3), unit(3, 6, seed=7)
    own = torch.searchsorted(labels.unique(), labels)
    same = unit(1, 6, seed=8).expand(8, 6).clone()
    return {
        "identical embeddings": (same, centers, labels),
        "identical centres": (unit(8, 6, seed=9), centers[:1].expand(3, 6).clone(), labels),
        "on the own centre": (centers[own], centers, labels),
        "on a foreign centre": (centers[(own + 1) % 3], centers, labels),
        "opposite to the own centre": (-centers[own], centers, labels),
        "views opposite": (torch.cat([same[:4], -same[:4]]), centers, labels),
        "all the same": (centers[:1].expand(8, 6).clone(), centers[:1].expand(3, 6).clone(), labels),
    }


@pytest.mark.parametrize("temperature", [0.001, 0.01, 1.0])
@pytest.mark.parametrize("neg_m", [1, 3])
@pytest.mark.parametrize("name", extremes())
def test_extreme_values(name, neg_m, temperature):
    x, centers, labels = extremes()[name]
    expected = exact_metric(x, centers, labels, temperature, 1.0, neg_m)
    assert math.isfinite(expected)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        rows = x.to(dtype, copy=True).requires_grad_()
        loss = center_softmax_loss(rows, centers.to(dtype), labels, temperature, 1.0, neg_m)
        loss.backward()
        # a dot product of unit vectors is uncertain by a few units in the last place, divided by the temperature
        uncertain = 8 * torch.finfo(dtype).eps / temperature
        assert loss.item() == pytest.approx(expected, rel=tolerance, abs=uncertain * (1 + 2 * neg_m))
        assert rows.grad.isfinite().all()


def test_metric_loss_under_autocast_is_float32():
    x, centers, labels = (
        unit(16, 32, dtype=torch.float32),
        unit(4, 32, seed=2, dtype=torch.float32),
        two_view_labels(8, 4),
    )
    logits = unit(16, 7, dtype=torch.float32)
    expected = center_softmax_loss(x, centers, labels), rim_loss(logits)
    with torch.autocast("cpu", torch.bfloat16):
        actual = center_softmax_loss(x, centers, labels), rim_loss(logits)
        halves = center_softmax_loss(x.bfloat16(), centers.bfloat16(), labels), rim_loss(logits.bfloat16())
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    for half, full in zip(halves, expected, strict=True):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, full, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "x, centers, labels, neg_m, message",
    [
        (unit(5, 4), unit(2, 4), torch.zeros(5, dtype=torch.long), 1, "embeddings must be"),
        (unit(4, 4), unit(2, 4), torch.tensor([0, 1]), 1, "embeddings must be"),
        (unit(4, 4).flatten(), unit(2, 4), torch.zeros(16, dtype=torch.long), 1, "embeddings must be"),
        (unit(4, 4), unit(3, 4), torch.tensor([0, 1, 0, 1]), 1, "centers must be"),
        (unit(4, 4), unit(2, 5), torch.tensor([0, 1, 0, 1]), 1, "centers must be"),
        (unit(4, 4), unit(2, 4), torch.tensor([0, 1, 0, 1]), 0, "neg_m must be at least 1, got 0"),
    ],
)
def test_metric_loss_refuses_what_does_not_fit(x, centers, labels, neg_m, message):
    with pytest.raises(ValueError, match=message):
        center_softmax_loss(x, centers, labels, neg_m=neg_m)


# ---------------------------------------------------------------- reconstruction


def test_cluster_means_are_means():
    rows = torch.randn(7, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    cluster = torch.tensor([2, 0, 1, 0, 2, 2, 1])
    means = cluster_means(rows, cluster, torch.bincount(cluster))
    for k in range(3):
        torch.testing.assert_close(means[k], torch.stack([rows[i] for i in range(7) if cluster[i] == k]).mean(0))
    assert torch.autograd.gradcheck(lambda r: cluster_means(r, cluster, torch.bincount(cluster)), rows)
    assert cluster_means(rows.detach().bfloat16(), cluster, torch.bincount(cluster)).dtype == torch.float32


def test_reconstruction_loss_is_the_mean_square():
    a, b = torch.rand(2, 3, 4, 5, dtype=torch.float64), torch.rand(2, 3, 4, 5, dtype=torch.float64)
    expected = sum((x - y) ** 2 for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)) / a.numel()
    assert reconstruction_loss(a, b).item() == pytest.approx(expected, rel=1e-12)
    assert reconstruction_loss(a, b).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        half = reconstruction_loss(a.bfloat16(), b.float())
    assert half.dtype == torch.float32 and half.item() == pytest.approx(expected, rel=0.02)
    assert torch.autograd.gradcheck(reconstruction_loss, (a.requires_grad_(), b))
    with pytest.raises(ValueError, match="shapes differ"):
        reconstruction_loss(a, b[:1])


# ---------------------------------------------------------------- the whole step


def literal_step(
    model, inputs: Tensor, labels: Tensor | None, t, alpha, mu, neg_m, target: Tensor
) -> dict[str, Tensor]:
    """Steps 1 to 5 row by row: every row has its own copy of its centroid, and each copy is decoded."""
    rows, images = len(inputs), len(inputs) // 2
    embedding, cluster_logits, feature_map = model(inputs)
    if labels is None:
        labels = torch.tensor([int(cluster_logits[i].argmax()) for i in range(images)])
    labels = [int(labels[i % images]) for i in range(rows)]
    centroid = [
        torch.stack([feature_map[j] for j in range(rows) if labels[j] == labels[i]]).mean(0) for i in range(rows)
    ]
    centers = [model.embed(model.pool(centroid[labels.index(u)][None].detach()))[0] for u in sorted(set(labels))]
    reconstruction = model.decoder(torch.stack(centroid), size=inputs.shape[-2:])  # counts as plain batch norm does
    return {
        "metric": literal_metric(embedding, torch.stack(centers), torch.tensor(labels), t, alpha, neg_m),
        "rim": literal_rim(cluster_logits, mu),
        "reconstruction": (reconstruction - target).square().sum() / target.numel(),
        "pseudo_labels": torch.tensor(labels[:images]),
    }


def small_model(n_cluster: int = 5) -> nn.Module:
    torch.manual_seed(3)
    model = build_model("resnet_small", n_cluster, 8).double().train()
    model.clustering[1].eval()  # dropout draws at random
    return model


def small_batch(images: int = 4) -> Tensor:
    return torch.randn(2 * images, 3, 16, 16, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


GIVEN = torch.tensor([4, 0, 9, 4])


@pytest.mark.parametrize(
    "given, settings",
    [
        (None, {}),
        (GIVEN, {"temperature": 0.3, "alpha": 0.5, "mu": 2.0, "neg_m": 3}),
        (GIVEN.repeat(2), {"temperature": 0.3, "alpha": 0.5, "mu": 2.0, "neg_m": 3}),
        (GIVEN, {"recon_target": "image"}),
    ],
)
def test_a_step_equals_the_row_by_row_version(given, settings):
    model, inputs = small_model(), small_batch()
    literal = copy.deepcopy(model)
    for module in literal.modules():
        if isinstance(module, WeightedBatchNorm2d):
            module.__class__ = nn.BatchNorm2d
    std, mean = torch.tensor([0.229, 0.224, 0.225]), torch.tensor([0.485, 0.456, 0.406])
    target = inputs * std.double().view(3, 1, 1)
    if settings.get("recon_target") == "image":
        target = target + mean.double().view(3, 1, 1)
    literal.decoder.forward = lambda maps, size: plain_decode(literal.decoder.decoder, maps, size)
    actual = cbswr_losses(model, inputs, given, **settings)
    expected = literal_step(
        literal, inputs, given, settings.get("temperature", 0.1), settings.get("alpha", 1.0), settings.get("mu", 1.0),
        settings.get("neg_m", 1), target,
    )  # fmt: skip
    assert len(set(expected["pseudo_labels"].tolist())) > 1  # else the metric loss has no formula
    assert actual["pseudo_labels"].tolist() == expected["pseudo_labels"].tolist()
    for name in ("metric", "rim"):
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-11)
    # the means of torchvision's ImageNet weights are single-precision literals in this test
    torch.testing.assert_close(actual["reconstruction"], expected["reconstruction"], rtol=1e-6, atol=0)
    for losses in (actual, expected):
        (losses["metric"] + losses["rim"] + losses["reconstruction"]).backward()
    for (name, parameter), other in zip(model.named_parameters(), literal.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-5, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
    for (name, buffer), other in zip(model.named_buffers(), literal.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def plain_decode(layers: nn.Sequential, maps: Tensor, size: tuple[int, int]) -> Tensor:
    """The decoder without its weights for repeated rows: conv, batch norm, ReLU, upsample to 1/16 ... 1/1 of `size`."""
    for block, part in enumerate((16, 8, 4, 2, 1)):
        maps = layers[4 * block + 2](layers[4 * block + 1](layers[4 * block](maps)))
        maps = F.interpolate(maps, [math.ceil(side / part) for side in size], mode="nearest")
    return layers[20](maps).sigmoid()


def test_the_batch_of_that_comparison_decodes_fewer_rows(monkeypatch):
    model, decoded = small_model(), []
    forward = model.decoder.forward
    monkeypatch.setattr(model.decoder, "forward", lambda maps, **k: decoded.append(len(maps)) or forward(maps, **k))
    cbswr_losses(model, small_batch(), GIVEN)
    assert decoded == [3]


def test_labels_per_image_and_per_row_are_the_same():
    one, two = (cbswr_losses(small_model(), small_batch(), labels) for labels in (GIVEN, GIVEN.repeat(2)))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert one["pseudo_labels"].tolist() == GIVEN.tolist()


def test_gradients_are_the_same_every_time_with_threads_too():
    """A batch large enough that threads share the sums of its gradients; their order must not depend on chance."""
    model, inputs = small_model().float(), torch.randn(32, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    threads, seen = torch.get_num_threads(), []
    torch.set_num_threads(4)
    try:
        for _ in range(4):
            model.zero_grad()
            cbswr_losses(model, inputs, torch.arange(16) % 2)["reconstruction"].backward()
            seen.append(model.decoder.decoder[20].weight.grad)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, seen[0]) for gradient in seen)


def test_one_cluster_only_trains_on():
    model = small_model()
    losses = cbswr_losses(model, small_batch(), torch.zeros(4, dtype=torch.long))
    total_loss(losses).backward()
    assert all(losses[name].isfinite() for name in ("metric", "rim", "reconstruction"))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_what_each_loss_trains():
    """The reconstruction trains backbone and decoder but not the embedding head; the metric loss not the decoder."""
    model, inputs = small_model(), small_batch()
    seen = []
    loss = cbswr_losses(model, inputs, GIVEN)
    model.feat_ext[0].weight.register_hook(seen.append)
    loss["reconstruction"].backward(retain_graph=True)
    assert not seen
    assert model.base_model.conv1.weight.grad.abs().max() > 0
    model.zero_grad()
    loss["metric"].backward()
    assert seen and all(p.grad is None for p in model.decoder.parameters())


def test_a_step_under_autocast_has_float32_losses():
    model, inputs = small_model().float(), small_batch().float()
    expected = cbswr_losses(copy.deepcopy(model), inputs, GIVEN)
    with torch.autocast("cpu", torch.bfloat16):
        losses = cbswr_losses(model, inputs, GIVEN)
    total_loss(losses).backward()
    for name in ("metric", "rim", "reconstruction"):
        assert losses[name].dtype == torch.float32
        torch.testing.assert_close(losses[name], expected[name], rtol=0.05, atol=0.05)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_a_step_refuses_odd_rows(rows):
    with pytest.raises(ValueError, match="even number of rows"):
        cbswr_losses(small_model(), torch.zeros(rows, 3, 24, 24))


@pytest.mark.parametrize("shape", [(3,), (4, 1), (16,)])
def test_a_step_refuses_labels_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"pseudo_labels must be \(4,\)"):
        cbswr_losses(small_model(), small_batch(), torch.zeros(shape, dtype=torch.long))


def test_a_step_refuses_an_unknown_target():
    with pytest.raises(ValueError, match="recon_target is input or image, not 'pixels'"):
        cbswr_losses(small_model(), small_batch(), recon_target="pixels")


def test_total_loss_weighs_and_leaves_out():
    losses = {
        name: torch.tensor(v, dtype=torch.float64)
        for name, v in (("metric", 2.0), ("rim", 3.0), ("reconstruction", 5.0))
    }
    assert total_loss(losses).item() == pytest.approx(0.9 * 2 + 0.3 * 3 + 0.001 * 5, rel=1e-12)
    assert total_loss(losses, 1, 10, 100).item() == 532
    for name in losses:
        broken = losses | {name: torch.tensor(math.nan)}
        weights = {"metric": 1.0, "rim": 1.0, "reconstruction": 1.0}
        assert total_loss(broken, **weights).isnan()
        assert total_loss(broken, **(weights | {name: 0.0})).isfinite()
    assert total_loss(losses, 0, 0, 0).item() == 0
