"""The methods: what they do at the start of an epoch, and their loss of a batch."""

from __future__ import annotations

import copy

import pytest
import torch
from pytorch_metric_learning import losses as metric_losses
from pytorch_metric_learning import miners
from tensors import DOUBLE, noise
from torch import Tensor
from torch.nn import functional as F

import losses
import train
from methods import METHODS, Method, base
from methods.supervised import same_class
from models import build_model
from recipes import fit_to_data
from utils import clustering

pytestmark = pytest.mark.usefixtures("one_thread")
N_IMAGES = 12
INDEX = torch.tensor([5, 0, 7, 2])  # of the images of a batch
LABELS = torch.tensor([0, 1, 2, 1, 0, 2, 2, 1, 0, 0, 1, 2])  # of all images


def make(recipe: str, *words: str) -> Method:
    """Make the method of a recipe, in float64, for a tiny network and N_IMAGES images."""
    args = train.parse_args(["--recipe", recipe, "--batch_size=4", *words])
    torch.manual_seed(0)
    fit_to_data(args, N_IMAGES, n_processes=1)
    model = build_model("resnet_small", getattr(args, "n_cluster", 4), 8)
    model.train_parts(args.train_stages, args.train_batch_norm)
    facts = {"labels": LABELS} if METHODS[args.method].uses_labels else {}
    return METHODS[args.method](model, args, n_images=N_IMAGES, **facts).double().train()


def views(seed: int = 1) -> Tensor:
    """Draw two views of a batch: (8, 3, 32, 32)."""
    return noise(8, 3, 32, 32, seed=seed)


def features_of(method: Method) -> tuple[Tensor, Tensor]:
    """Draw pooled features of all images, and embed them as the method's network does."""
    pooled = noise(N_IMAGES, method.model.pooled_dim, seed=2).abs()
    with torch.no_grad():
        return pooled, method.model.embed(pooled)


def nearest(space: Tensor, count: int) -> Tensor:
    """Find the `count` nearest other rows by the literal distances."""
    return torch.cdist(space, space).fill_diagonal_(torch.inf).argsort(dim=1)[:, :count]


def not_asked() -> tuple[Tensor, Tensor]:
    """Fail: the method needs no features."""
    raise AssertionError("features were computed for nothing")


# ---------------------------------------------------------------- CBSwR


@pytest.mark.parametrize(
    "words, settings",
    [
        ([], {}),
        (["--t=0.3", "--alpha=0.5", "--mu=2", "--neg_m=3"], {"neg_m": 3}),
        (["--recon_target=image", "--ml=0.5"], {"recon_target": "image"}),
        (["--softmax_over=images"], {"softmax_over": "images"}),
    ],
)
def test_cbswr_weights_the_losses_of_the_paper(words, settings):
    method = make("paper", *words)
    options = method.options
    settings = settings | {"temperature": options.t, "alpha": options.alpha, "mu": options.mu}
    torch.manual_seed(1)
    expected = losses.cbswr_losses(copy.deepcopy(method.model), views(), **settings)
    torch.manual_seed(1)  # of the dropout
    computed = method(views(), INDEX)
    total = options.ml * expected["metric"] + options.rim * expected["rim"]
    total = total + options.recon * expected["reconstruction"]
    torch.testing.assert_close(computed["loss"], total, **DOUBLE)
    for name in ("metric", "rim", "reconstruction"):
        torch.testing.assert_close(computed[name], expected[name], **DOUBLE)


def test_cbswr_without_reconstruction_leaves_the_decoder_alone():
    method = make("cbs")
    before = copy.deepcopy(method.model.decoder.state_dict())
    computed = method(views(), INDEX)
    computed["loss"].backward()
    assert computed["reconstruction"] == 0
    assert all(parameter.grad is None for parameter in method.model.decoder.parameters())
    torch.testing.assert_close(method.model.decoder.state_dict(), before, rtol=0, atol=0)


def test_cbswr_clusters_and_mines_at_the_start_of_an_epoch():
    method = make("kmeans", "--positives=nn", "--n_cluster=3")
    pooled, embeddings = features_of(method)
    logged = method.begin_epoch(1, lambda: (pooled, embeddings))
    space = F.normalize(pooled, dim=1)
    assert torch.equal(method.positives, nearest(space, 1)[:, 0])
    labels = method.pseudo_labels.clone()
    assert logged == {"cluster_sizes": torch.bincount(labels, minlength=3).tolist()}
    centers = torch.stack([space[labels == label].mean(0) for label in range(3)])
    assert torch.equal(torch.cdist(space, centers).argmin(1), labels)
    again = method.begin_epoch(2, lambda: (pooled, embeddings))
    assert 0 < again["nmi_to_previous_clusters"] <= 1
    torch.manual_seed(1)
    expected = losses.cbswr_losses(
        copy.deepcopy(method.model), views(), method.pseudo_labels[INDEX]
    )
    torch.manual_seed(1)
    torch.testing.assert_close(method(views(), INDEX)["metric"], expected["metric"], **DOUBLE)


def test_cbswr_asks_for_features_only_if_it_needs_them():
    method = make("paper", "--dataset=car196")
    assert method.begin_epoch(1, not_asked) == {}
    assert method.neighbors_and_positives() == {"positives": None, "neighbors": None}
    assert make("paper", "--dataset=cub200").positives is not None
    assert make("paper", "--dataset=cub200", "--positives=self").positives is None


def test_a_head_in_closed_form_compares_embeddings():
    method = make("kmeans", "--positives=nn", "--n_cluster=3", "--head_init=pca")
    pooled, embeddings = features_of(method)
    method.begin_epoch(1, lambda: (pooled, embeddings))
    assert torch.equal(method.positives, nearest(embeddings, 1)[:, 0])
    assert not torch.equal(method.positives, nearest(F.normalize(pooled, dim=1), 1)[:, 0])


# ---------------------------------------------------------------- deep clustering


def test_many_images_are_clustered_and_searched_approximately(monkeypatch):
    method = make("best", "--cluster_sizes=2", "--target_neighbors=2")
    features = features_of(method)
    monkeypatch.setattr(clustering, "MOST_DISTANCES", N_IMAGES * 5)
    monkeypatch.setattr(base, "EXACT_UP_TO", N_IMAGES - 1)
    labels, centers = method.cluster(features[1], 6, epoch=1)
    monkeypatch.setattr(clustering, "kmeans", pytest.fail)  # is not asked
    monkeypatch.setattr(base, "nearest_neighbors", None)
    again = method.cluster(features[1], 6, epoch=1)
    assert torch.equal(again[0], labels) and torch.equal(again[1], centers)
    assert set(labels.tolist()) <= set(range(6)) and len(labels) == N_IMAGES
    neighbors = method.mine(features[1].float(), 2)
    assert neighbors.shape == (N_IMAGES, 2)
    expected = nearest(features[1].float(), 2)
    assert (neighbors.sort(1).values == expected.sort(1).values).all()
    method.begin_epoch(1, lambda: features)


def test_soft_centers_remembers_the_start_of_the_epoch():
    method = make("best", "--cluster_sizes=3,6", "--target_neighbors=2", "--t=0.2")
    assert method.n_clusters == [2, 4]
    _, embeddings = features_of(method)
    assert method.begin_epoch(1, lambda: (None, embeddings)) == {"partitions": [2, 4]}
    numbers = torch.arange(N_IMAGES)[:, None]
    assert torch.equal(method.members, torch.cat([numbers, nearest(embeddings, 2)], 1))
    assert torch.equal(method.memory, embeddings)
    torch.testing.assert_close(method.centers.norm(dim=1), torch.ones(6).double())
    rows = method.model(views())[0]
    members = embeddings[method.members[INDEX.repeat(2)]]
    expected = losses.soft_center_loss(rows, members, method.centers.split([2, 4]), 0.2, 0.05)
    torch.testing.assert_close(method(views(), INDEX)["loss"], expected, rtol=1e-6, atol=1e-8)


def test_partitions_have_two_clusters_at_least_and_differ():
    assert make("best").n_clusters == [2]  # of 12 images, in clusters of 6 to 48
    assert make("best", "--cluster_sizes=2,4,5").n_clusters == [2, 3, 6]


def test_deepcluster_classifies_by_the_clusters_of_the_epoch():
    method = make("deepcluster", "--n_cluster=4", "--t=0.2")
    embeddings = method.model(views())[0]
    logged = method.begin_epoch(1, lambda: features_of(method))
    assert sum(logged["cluster_sizes"]) == N_IMAGES
    of_all = features_of(method)[1]
    for k in range(4):  # a centroid is the mean of its images, and has unit length
        mean = of_all[method.pseudo_labels == k].mean(0)
        torch.testing.assert_close(
            method.centers[k], F.normalize(mean, dim=0), rtol=1e-5, atol=1e-6
        )
    labels = method.pseudo_labels[INDEX.repeat(2)]
    picked = (embeddings @ method.centers.T / 0.2).log_softmax(1)[torch.arange(8), labels]
    torch.testing.assert_close(method(views(), INDEX)["loss"], -picked.mean(), **DOUBLE)


# ---------------------------------------------------------------- STML


def move(method: Method) -> None:
    """Change the student, so that it differs from its teacher."""
    with torch.no_grad():
        for parameter in method.model.parameters():
            parameter.mul_(1.2).add_(0.01)


def similarity_by_teacher(method: Method) -> Tensor:
    """Compute the contextual similarity of a batch as the teacher sees it."""
    teacher = method.teacher
    with torch.no_grad():
        pooled = teacher["model"].pool(teacher["model"].maps(views()))
        embeddings = teacher["large"](pooled) if "large" in teacher else None
        if embeddings is None:
            embeddings = teacher["model"].embed(pooled)
    embeddings = F.normalize(embeddings, dim=1)
    return losses.contextual_similarity(embeddings, INDEX.repeat(2), 10, method.options.sigma)


@pytest.mark.parametrize("size", [0, 32])
def test_stml_follows_the_similarity_of_its_teacher(size):
    method = make("stml", "--group=2", f"--distill_dim={size}", "--sigma=2")
    move(method)
    similarity = similarity_by_teacher(method)
    model = method.model
    pooled = model.pool(model.maps(views()))
    small = model.feat_ext(pooled)
    if size:
        torch.testing.assert_close(method.large.weight.norm(dim=1), torch.ones(32).double())
        large = method.large(pooled)
        contrastive = [losses.relaxed_contrastive_loss(x, similarity) for x in (small, large)]
        expected = sum(contrastive) / 2 + losses.self_distillation_loss(small, large)
    else:
        expected = losses.relaxed_contrastive_loss(F.normalize(small, dim=1), similarity)
    computed = method(views(), INDEX)["loss"]
    torch.testing.assert_close(computed, expected, rtol=1e-7, atol=1e-9)
    computed.backward()
    assert model.feat_ext[0].weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in method.teacher.parameters())
    assert not method.teacher["model"].base_model.training


def test_the_teacher_averages_weights_and_statistics_before_the_optimizer_steps():
    method = make("stml", "--group=2", "--distill_dim=6", "--teacher_momentum=0.9")
    move(method)
    batch_norm = method.model.base_model.bn1
    batch_norm.running_mean.fill_(7.0)
    batch_norm.num_batches_tracked.fill_(5)
    start = copy.deepcopy(method.teacher.state_dict())
    student = copy.deepcopy(method.model.state_dict())
    method(views(), INDEX)  # the forward pass moves it, before the optimizer can
    after = method.teacher.state_dict()
    for name in ("feat_ext.0.weight", "base_model.conv1.weight", "base_model.bn1.running_mean"):
        average = 0.9 * start[f"model.{name}"] + 0.1 * student[name]
        torch.testing.assert_close(after[f"model.{name}"], average, **DOUBLE)
    assert after["model.base_model.bn1.num_batches_tracked"] == 5


@pytest.mark.parametrize("size", [0, 6])
def test_a_new_head_makes_a_new_teacher_unless_it_has_its_own(size):
    method = make("stml", "--group=2", f"--distill_dim={size}")
    move(method)
    start = copy.deepcopy(method.teacher["model"].state_dict())
    method.head_changed()
    expected = start if size else method.model.state_dict()
    torch.testing.assert_close(method.teacher["model"].state_dict(), expected)


@pytest.mark.parametrize("size", [0, 6])
def test_stml_mines_by_the_large_embedding_of_the_student(size):
    method = make("stml", "--group=4", f"--distill_dim={size}")
    pooled, embeddings = features_of(method)
    move(method)
    method.begin_epoch(1, lambda: (pooled, embeddings))
    space = method.large(pooled) if size else F.normalize(pooled, dim=1)
    assert torch.equal(method.neighbors, nearest(space.detach(), 3))
    assert make("stml", "--group=1").neighbors is None


# ---------------------------------------------------------------- with labels


def test_the_ceilings_are_losses_of_pytorch_metric_learning():
    method = make("multi_similarity")
    rows = method.model(views())[0]
    labels = LABELS[INDEX.repeat(2)]
    pairs = miners.MultiSimilarityMiner()(rows, labels)
    expected = metric_losses.MultiSimilarityLoss()(rows, labels, pairs)
    torch.testing.assert_close(method(views(), INDEX)["loss"], expected)
    method = make("proxy_anchor")
    torch.testing.assert_close(method(views(), INDEX)["loss"], method.loss(rows, labels))
    groups = method.parameter_groups(0.01)
    assert [group["lr"] for group in groups] == [0.01, 1.0]
    assert [group["scale"] for group in groups] == [1, 100]
    assert [parameter.shape for parameter in groups[1]["params"]] == [(3, 8)]  # the proxies


@pytest.mark.parametrize("count", [1, 3])
def test_same_class_draws_other_images_of_the_class(count):
    drawn = same_class(LABELS, count, (1, 2))
    assert drawn.shape == (N_IMAGES, count)
    for image, row in enumerate(drawn.tolist()):
        assert {int(LABELS[other]) for other in row} == {int(LABELS[image])}
        assert image not in row
        assert len(set(row)) == count
    assert torch.equal(drawn, same_class(LABELS, count, (1, 2)))
    assert not torch.equal(drawn, same_class(LABELS, count, (1, 3)))
    lonely = torch.tensor([0, 1, 1])
    assert same_class(lonely, 2, (1, 2)).tolist() == [[0, 0], [2, 1], [1, 2]]


# ---------------------------------------------------------------- what is trained


def test_batch_norm_keeps_its_statistics_unless_it_is_trained():
    for words, is_trained in (([], False), (["--train_batch_norm"], True)):
        method = make("cbs", *words)
        norm = method.model.base_model.bn1
        before = norm.running_mean.clone()
        method(views(), INDEX)
        assert torch.equal(norm.running_mean, before) != is_trained
        assert norm.training == is_trained


def test_frozen_stages_get_no_gradient():
    method = make("best", "--train_stages=1")
    method.begin_epoch(1, lambda: features_of(method))
    method(views(), INDEX)["loss"].backward()
    touched = {
        name.partition(".")[0]
        for name, parameter in method.model.base_model.named_parameters()
        if parameter.grad is not None
    }
    assert touched == {"layer3"}
    n_trained = sum(len(group["params"]) for group in method.parameter_groups(0.1))
    assert n_trained == sum(p.requires_grad for p in method.model.parameters())
