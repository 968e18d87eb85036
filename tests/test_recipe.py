"""--recipe best and the losses beside the paper's: their formulas, the teacher, groups of neighbours, and the runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import failed, run_in_process
from synthetic import write_dataset
from torch import Tensor
from torch.nn import functional as F
from training import execute, options, outcome, same_weights, trained

import train as script
from datasets import EpochPlan
from losses import (
    ClassificationStep,
    ContextualStep,
    SupervisedStep,
    contextual_similarity,
    large_embedding,
    relaxed_contrastive_loss,
    self_distillation_loss,
)
from models import Pooling, build_model
from models.teacher import Teacher
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
DOUBLE = {"rtol": 1e-10, "atol": 1e-12}
BEST = {"recipe": "best", "batch_size": 8}
CONTEXTUAL = BEST | {"metric_loss": "contextual", "group": 4}


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


# ---------------------------------------------------------------- formulas


def literal_similarity(x: Tensor, k: int, sigma: float) -> Tensor:
    """With sets, row by row."""
    rows = len(x)
    nearest = [sorted(range(rows), key=lambda j: (j != i, (x[i] - x[j]).norm().item()))[:k] for i in range(rows)]
    mutual = [{j for j in nearest[i] if i in nearest[j]} for i in range(rows)]
    first = torch.zeros(rows, rows, dtype=x.dtype)
    for i in range(rows):
        for j in mutual[i]:
            first[i, j] = len(mutual[i] & mutual[j]) / len(mutual[i])
    spread = torch.stack([sum(first[h] for h in nearest[i][: k // 2]) / (k // 2) for i in range(rows)])
    result = torch.empty_like(first)
    for i in range(rows):
        for j in range(rows):
            close = math.exp(-((x[i] - x[j]).norm().item() ** 2) / sigma)
            result[i, j] = (close + (spread[i, j] + spread[j, i]) / 2) / 2
    return result


def literal_contrastive(x: Tensor, w: Tensor, margin: float) -> Tensor:
    rows, total = len(x), torch.zeros((), dtype=x.dtype)
    for i in range(rows):
        mean = sum((x[i] - x[j]).norm() for j in range(rows) if j != i) / rows
        for j in range(rows):
            if j != i:
                d = (x[i] - x[j]).norm() / mean
                total = total + w[i, j] * d**2 + (1 - w[i, j]) * torch.clamp(margin - d, min=0) ** 2
    return total / (rows * (rows - 1))


@pytest.mark.parametrize("rows, dim, k, sigma", [(6, 3, 2, 1.0), (12, 4, 4, 3.0), (24, 8, 10, 3.0), (40, 3, 6, 0.5)])
def test_contextual_similarity_is_its_formula(rows, dim, k, sigma):
    x = unit(rows, dim, seed=rows)
    found = contextual_similarity(x, k, sigma)
    torch.testing.assert_close(found, literal_similarity(x, k, sigma), **DOUBLE)
    assert torch.equal(found, found.T) and found.min() >= 0 and found.max() <= 1 + 1e-12
    single = contextual_similarity(x.float(), k, sigma)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), found, rtol=1e-4, atol=1e-4)


def test_two_clusters_are_similar_inside_and_not_across():
    x = torch.cat([unit(12, 8)[:1] + 0.05 * unit(12, 8, seed=1), -unit(12, 8)[:1] + 0.05 * unit(12, 8, seed=2)])
    found = contextual_similarity(F.normalize(x))
    assert found[:12, :12].mean() > 0.7 and found[:12, 12:].max() < 0.2


def test_a_batch_smaller_than_the_neighbourhood_takes_all():
    assert contextual_similarity(unit(4, 3)).isfinite().all()
    same = contextual_similarity(unit(1, 5).repeat(4, 1))  # ties: a row is still its own nearest
    assert same.isfinite().all() and torch.allclose(same.diag(), same.new_ones(4), atol=0.5)


@pytest.mark.parametrize("rows, dim, margin", [(2, 3, 1.0), (5, 3, 1.0), (16, 8, 0.7)])
def test_relaxed_contrastive_is_its_formula(rows, dim, margin):
    x, w = unit(rows, dim, seed=3).requires_grad_(), torch.rand(rows, rows, dtype=torch.float64)
    loss, expected = relaxed_contrastive_loss(x, w, margin), literal_contrastive(x, w, margin)
    torch.testing.assert_close(loss, expected, **DOUBLE)
    gradients = [torch.autograd.grad(value, x)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)


def test_relaxed_contrastive_in_its_corners():
    same = unit(1, 5).repeat(4, 1).float().requires_grad_()
    loss = relaxed_contrastive_loss(same, torch.eye(4))
    loss.backward()
    assert loss.isfinite() and same.grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        x = unit(6, 5).float()
        assert torch.equal(relaxed_contrastive_loss(x, torch.eye(6)), relaxed_contrastive_loss(x, torch.eye(6)))
        assert relaxed_contrastive_loss(x, torch.eye(6)).dtype == torch.float32
    for x, w in ((unit(1, 3), torch.eye(1)), (unit(4, 3), torch.eye(3)), (torch.zeros(4), torch.eye(4))):
        with pytest.raises(ValueError, match="must be"):
            relaxed_contrastive_loss(x, w)


def literal_distillation(small: Tensor, large: Tensor) -> Tensor:
    rows, total = len(small), torch.zeros((), dtype=small.dtype)
    for i in range(rows):
        weights = []
        for x in (large, small):
            d = torch.stack([(x[i] - x[j]).norm() if i != j else x.new_zeros(()) for j in range(rows)])
            e = torch.exp(-d / (d.sum() / rows))
            weights.append(e / e.sum())
        p, q = weights
        total = total + (p * (p / q).log()).sum()
    return total / rows


@pytest.mark.parametrize("rows, dim, wide", [(2, 3, 4), (5, 3, 9), (16, 8, 2)])
def test_self_distillation_is_its_formula(rows, dim, wide):
    x = torch.randn(rows, dim, dtype=torch.float64).requires_grad_()
    y = torch.randn(rows, wide, dtype=torch.float64).requires_grad_()
    loss, expected = self_distillation_loss(x, y), literal_distillation(x, y.detach())
    torch.testing.assert_close(loss, expected, **DOUBLE)
    torch.testing.assert_close(*(torch.autograd.grad(v, x)[0] for v in (loss, expected)), rtol=1e-8, atol=1e-10)
    assert not self_distillation_loss(x.detach(), y).requires_grad  # the large one does not learn from the small one


def test_self_distillation_in_its_corners():
    x = torch.randn(6, 4)
    assert self_distillation_loss(x, 3 * x).abs() < 1e-6  # no distance but relative ones
    same = torch.ones(4, 3, requires_grad=True)
    self_distillation_loss(same, torch.randn(4, 5)).backward()
    assert same.grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert self_distillation_loss(x, x).dtype == torch.float32
    for a, b in ((x, torch.randn(5, 4)), (x[0], x), (x, x[0])):
        with pytest.raises(ValueError, match="must be"):
            self_distillation_loss(a, b)


# ---------------------------------------------------------------- steps


def small(**settings: object):
    torch.manual_seed(0)
    return build_model("resnet_small", 4, 8, **settings).double()


def test_the_teacher_is_the_moving_average():
    model = small()
    model.base_model.conv1.weight.requires_grad_(False)
    teacher = Teacher(model, 0.9).train()
    assert not teacher.network.training and not any(w.requires_grad for w in teacher.parameters())
    start = {name: weight.clone() for name, weight in model.named_parameters()}
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1.0)
        model.base_model.bn1.running_mean.fill_(7.0)
    teacher.follow(model)
    for name, weight in teacher.network.named_parameters():
        step = 0.1 if name != "base_model.conv1.weight" else 0.0  # that is not trained
        torch.testing.assert_close(weight, start[name] + step)
    assert (teacher.network.base_model.bn1.running_mean == 7.0).all()
    teacher.become(model)
    assert all(torch.equal(a, b) for a, b in zip(teacher.network.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("stages", [0, 1])
def test_a_contextual_step_follows_the_teacher(stages):
    model = small(pooling=Pooling.parse("last2", "gem", True, "3,1"))
    if stages:
        model.train_last(stages)
    step = ContextualStep(model.train(), Teacher(model, 0.99), 0.5)
    with torch.no_grad():
        model.feat_ext[0].weight.mul_(1.5).add_(0.1)  # the two differ now
    inputs = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    losses = step(inputs)
    with torch.no_grad():
        seen = step.teacher.network.eval()(inputs)[0]
        own = model(inputs)[0]
    expected = literal_contrastive(own, literal_similarity(seen, 8, 3.0), 1.0)
    torch.testing.assert_close(losses["metric"], expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(losses["loss"].detach(), 0.5 * expected, rtol=1e-8, atol=1e-10)
    assert losses["rim"] == losses["reconstruction"] == 0
    losses["loss"].backward()
    touched = {n.partition(".")[0] for n, weight in model.base_model.named_parameters() if weight.grad is not None}
    assert touched == ({"layer3"} if stages else {"conv1", "bn1", "layer1", "layer2", "layer3"})
    assert all(weight.grad is None for weight in step.teacher.parameters())


def test_a_contextual_step_with_a_large_embedding_is_that_of_stml():
    model = small()
    large = large_embedding(model.pooled_dim, 32).double()
    eye = torch.eye(32, dtype=torch.float64)
    torch.testing.assert_close(large.weight @ large.weight.T, eye, rtol=1e-5, atol=1e-5)  # orthogonal
    step = ContextualStep(model.train(), Teacher(model, 0.9, large), 0.5, large=large)
    with torch.no_grad():
        large.weight.mul_(1.5).add_(0.1)
    inputs = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        seen = F.normalize(step.teacher.large(step.teacher.network.eval().pool(*model.eval().maps(inputs))))
        pooled = model.train().pool(*model.maps(inputs))
        own, wide = model.feat_ext(pooled), large(pooled)
    target = literal_similarity(seen, 8, 3.0)
    followed = [literal_contrastive(x, target, 1.0) for x in (own, wide)]
    expected = sum(followed) / 2 + literal_distillation(own, wide)
    losses = step(inputs)
    torch.testing.assert_close(losses["metric"], expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(losses["loss"].detach(), 0.5 * expected, rtol=1e-7, atol=1e-9)
    losses["loss"].backward()
    assert all(weight.grad.abs().max() > 0 for weight in (model.feat_ext[0].weight, large.weight))
    before = step.teacher.large.weight.clone()
    assert step.teacher.large.weight.grad is None
    step.teacher.follow(model, large)
    torch.testing.assert_close(step.teacher.large.weight, 0.9 * before + 0.1 * large.weight)


def test_train_last_freezes_what_is_before_and_keeps_the_statistics():
    model = small()
    model.train_last(1)
    model.train()
    before = {name: value.clone() for name, value in model.base_model.state_dict().items()}
    trained_names = {n.split(".")[0] for n, w in model.base_model.named_parameters() if w.requires_grad}
    assert trained_names == {"layer3"}
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    embedding, _, _ = model(x)
    embedding.sum().backward()
    after = model.base_model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())  # running means, too
    kept = [part for part in model.base_model.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    assert kept and not any(part.training for part in kept) and all(part.training for part in model.clustering)
    model.eval()
    whole = small().eval()
    assert torch.equal(model(x)[0], whole(x)[0])
    with pytest.raises(UserError, match="--train_stages 4: resnet_small has 3 stages"):
        small().train_last(4)


def test_classification_is_cross_entropy_by_label():
    model = small().eval()
    step = ClassificationStep(model, 0.7)
    inputs, labels = torch.randn(8, 3, 32, 32, dtype=torch.float64), torch.tensor([3, 0, 2, 3])
    losses = step(inputs, labels)
    logits = model.clustering(model(inputs)[0])
    expected = -sum(logits[i].log_softmax(0)[labels[i % 4]] for i in range(8)) / 8
    torch.testing.assert_close(losses["loss"], 0.7 * expected, **DOUBLE)
    with torch.no_grad():
        model.clustering[2].weight.fill_(9.0)
    step.begin_epoch()
    assert model.clustering[2].weight.abs().max() < 1


@pytest.mark.parametrize("name", ["proxy_anchor", "multi_similarity"])
def test_supervised_losses_learn_the_classes(name):
    model = small().float().train()
    step = SupervisedStep(model, name, 2)
    labels = torch.tensor([0, 1] * 4)
    inputs = torch.randn(16, 3, 16, 16) + 3 * labels.repeat(2).view(-1, 1, 1, 1)
    optimizer = torch.optim.SGD(step.parameters(), 0.05)
    values = []
    for _ in range(8):
        loss = step(inputs, labels)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < values[0]


# ---------------------------------------------------------------- batches


def test_groups_are_images_with_their_neighbours():
    neighbors = np.random.default_rng(0).integers(0, 26, (26, 3))
    plan = EpochPlan(26, 8, 32, 5, 1, neighbors=neighbors)
    assert len(plan) == 3
    firsts = []
    for batch in range(3):
        images = plan.images(batch)
        for group in images.reshape(2, 4):
            assert np.array_equal(group[1:], neighbors[group[0]])
            firsts.append(group[0])
        views = plan.views(batch)
        assert np.array_equal(views.index, np.tile(images, 2))
    assert len(set(firsts)) == 6  # drawn without repetition
    halves = [EpochPlan(26, 8, 32, 5, 1, share=(part, 2), neighbors=neighbors) for part in range(2)]
    assert np.array_equal(np.concatenate([half.images(1) for half in halves]), plan.images(1))


@pytest.mark.parametrize("count", [1, 3])
def test_same_class_gives_others_of_the_class(count):
    classes = torch.tensor([0, 1, 0, 2, 1, 0, 0, 2, 2])
    found = script.same_class(classes, count, (1, 2))
    assert found.shape == (9, count)
    for image, row in enumerate(found.tolist()):
        assert all(classes[other] == classes[image] for other in row)
        if count < int((classes == classes[image]).sum()):
            assert image not in row and len(set(row)) == count
    assert torch.equal(found, script.same_class(classes, count, (1, 2)))
    assert not torch.equal(found, script.same_class(classes, count, (1, 3)))


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("settings, beside", [
    (BEST, {"memory", "members", "centers"}), (CONTEXTUAL | {"teacher_momentum": 1.0}, {"teacher"}),
])  # fmt: skip
def test_best_trains_and_is_resumed_to_the_same_weights(data, tmp_path, capsys, settings, beside):
    whole = trained(data, tmp_path / "a", **settings, n_epoch=2)
    text = capsys.readouterr().out
    assert "recipe best: " in text and "head by whiten" in text
    config = whole.saved["config"]
    assert config["recipe"] == "best" and config["refit_head"] is True and config["refit_power"] == 0.7
    assert (config["t"], config["target_t"], config["group"]) == (0.05, 0.05, settings.get("group", 1))
    assert {name.partition(".")[0] for name in whole.saved["step"]} == beside
    trained(data, tmp_path / "b", **settings)
    assert script.main(["--resume", str(tmp_path / "b" / "run"), "--n_epoch=2"]) == 0
    resumed = outcome(tmp_path / "b" / "run")
    assert same_weights(whole, resumed) and whole.rows == resumed.rows
    assert all(torch.equal(value, resumed.saved["step"][name]) for name, value in whole.saved["step"].items())


def test_a_stop_in_the_middle_of_an_epoch_keeps_groups_and_teacher(data, tmp_path):
    settings = CONTEXTUAL | {"n_epoch": 1, "batch_size": 4, "teacher_momentum": 0.5}
    whole = trained(data, tmp_path / "a", **settings)
    trained(data, tmp_path / "b", **settings, checkpoint_every_steps=4)
    steps = []

    def stop_after(job, *rest):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return real(job, *rest)

    real = script.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "train_step", stop_after)
        with pytest.raises(KeyboardInterrupt):
            script.main([*options(data, tmp_path / "c", **settings), "--checkpoint_every_steps=2"])
    saved = torch.load(tmp_path / "c" / "run" / "last.pth")
    assert saved["current"]["step"] == 2 and saved["current"]["positives"].shape == (24, 3)
    assert script.main(["--resume", str(tmp_path / "c" / "run")]) == 0
    resumed = outcome(tmp_path / "c" / "run")
    assert same_weights(whole, resumed) and same_weights(whole, outcome(tmp_path / "b" / "run"))


def test_a_checkpoint_without_its_teacher_is_refused(data, tmp_path):
    done = trained(data, tmp_path, **CONTEXTUAL)
    del done.saved["step"]
    torch.save(done.saved, done.run / "last.pth")
    failed(execute("--resume", done.run, "--n_epoch=2"), "does not fit", "teacher")


def test_refit_gives_the_head_its_closed_form(data, tmp_path):
    from datasets import center_crops, load_split
    from models import load_checkpoint
    from models.closed_form import closed_form_head
    from utils.features import extract_features

    done = trained(data, tmp_path / "a", **BEST)
    model, _ = load_checkpoint(done.run / "last.pth")
    training = load_split(data, "tiny", "training")
    pooled, _ = extract_features(model, center_crops(training.images, 100), flip=True)
    weight, _ = closed_form_head(pooled, 16, "whiten", 0.7)  # the start had 0.6
    assert torch.allclose(model.feat_ext[0].weight, weight, rtol=1e-3, atol=1e-4)
    own = trained(data, tmp_path / "b", **{k: v for k, v in BEST.items() if k != "recipe"}, head_init="whiten")
    assert "step" in own.saved and not own.saved["step"]


@pytest.mark.parametrize("baseline", ["stml", "deepcluster"])
def test_the_methods_of_others_train(data, tmp_path, baseline):
    done = trained(data, tmp_path / "a", baseline=baseline, batch_size=10)
    assert 0 < done.rows[0]["loss"] == pytest.approx(done.rows[0]["metric_loss"])
    assert done.rows[0]["rim_loss"] == done.rows[0]["reconstruction_loss"] == 0
    assert same_weights(done, trained(data, tmp_path / "b", baseline=baseline, batch_size=10))
    config = done.saved["config"]
    assert (config["distill_dim"], config["group"]) == ((1024, 5) if baseline == "stml" else (0, 1))


def test_the_large_embedding_is_trained_saved_and_resumed(data, tmp_path):
    stml = {"baseline": "stml", "distill_dim": 48, "group": 2, "batch_size": 8}
    whole = trained(data, tmp_path / "a", **stml, n_epoch=2)
    parts = {name for name in whole.saved["step"] if not name.startswith("teacher.network")}
    assert parts == {"large.weight", "large.bias", "teacher.large.weight", "teacher.large.bias"}
    assert len(whole.saved["optimizer"]["param_groups"]) == 2
    trained(data, tmp_path / "b", **stml)
    assert script.main(["--resume", str(tmp_path / "b" / "run"), "--n_epoch=2"]) == 0
    resumed = outcome(tmp_path / "b" / "run")
    assert same_weights(whole, resumed) and whole.rows == resumed.rows
    assert all(torch.equal(value, resumed.saved["step"][name]) for name, value in whole.saved["step"].items())
    without = trained(data, tmp_path / "c", **stml | {"distill_dim": 0})
    assert without.rows[0]["loss"] != whole.rows[0]["loss"]


@pytest.mark.parametrize("loss", ["proxy_anchor", "multi_similarity"])
def test_supervised_runs_say_that_they_use_labels(data, tmp_path, capsys, loss):
    alone = {"metric_loss": loss, "ml": 1, "rim": 0, "recon": 0, "group": 4, "optimizer": "adamw", "lr": 1e-3}
    whole = trained(data, tmp_path / "a", **alone, n_epoch=2)
    assert "trains by the REAL labels of the 4 training classes" in capsys.readouterr().out
    trained(data, tmp_path / "b", **alone)
    assert script.main(["--resume", str(tmp_path / "b" / "run"), "--n_epoch=2"]) == 0
    resumed = outcome(tmp_path / "b" / "run")
    assert same_weights(whole, resumed)
    rates = [group["lr"] for group in resumed.saved["optimizer"]["param_groups"]]
    assert rates == ([1e-3, 0.1] if loss == "proxy_anchor" else [1e-3])
    again = {"resume": tmp_path / "b" / "run", "n_epoch": 3, "lr": 2e-3}
    assert script.main([f"--{name}={value}" for name, value in again.items()]) == 0
    rates = [group["lr"] for group in outcome(tmp_path / "b" / "run").saved["optimizer"]["param_groups"]]
    assert rates == ([2e-3, 0.2] if loss == "proxy_anchor" else [2e-3])


@pytest.mark.parametrize(
    "name, value", [("whiten_power", 0.2), ("refit_power", 0.2), ("teacher_momentum", 0.1), ("stripes", "2,1")]
)
def test_options_of_the_recipe_change_the_training(data, tmp_path, name, value):
    settings = CONTEXTUAL | {"batch_size": 4, "lr": 1e-3, "n_epoch": 2}
    one, other = trained(data, tmp_path / "a", **settings), trained(data, tmp_path / "b", **settings, **{name: value})
    assert one.rows[1]["loss"] != other.rows[1]["loss"] and other.saved["config"][name] == value
    kept = {**settings, "head_init": "whiten"}
    assert not same_weights(one, other) and trained(data, tmp_path / "c", **kept).rows == one.rows


def test_a_network_of_timm_takes_what_it_can(capsys):
    args = script.parse_args(["--recipe=best", "--backbone=timm:resnet18"])
    assert (args.layers, args.stripes, args.train_stages, args.head_init) == (None, "1", 0, "whiten")
    assert script.parse_args(["--recipe=best", "--backbone=timm:resnet18", "--train_stages=1"]).train_stages == 1


def test_other_options_stand_above_the_recipe(data, tmp_path):
    args = script.parse_args(["--recipe=best", "--n_epoch=0", "--low_dim=512", "--stripes=1"])
    assert (args.n_epoch, args.low_dim, args.stripes, args.head_init) == (0, 512, "1", "whiten")
    assert vars(script.parse_args(["--recipe=paper"])) | {"given": 0} == vars(script.parse_args([])) | {"given": 0}
    untrained = trained(data, tmp_path, **BEST, n_epoch=0)
    assert len(untrained.rows) == 1 and untrained.rows[0]["epoch"] == 0


@pytest.mark.parametrize("given, words", [
    (["--recipe=best", "--group=3"], "--recipe sets what is not given"),
    (["--recipe=best", "--baseline=stml"], "are two methods"), (["--group=3"], "no multiple of --group 3; give 15"),
    (["--group=4", "--positives=nn"], "--positives nn"), (["--refit_head"], "--refit_head"),
    (["--metric_loss=classify"], "needs --pseudo_labels kmeans"),
    (["--metric_loss=contextual"], "give --rim 0 --recon 0"), (["--recipe=best", "--compile"], "--compile"),
    (["--distill_dim=8"], "goes with --metric_loss contextual"),
    (["--baseline=stml", "--teacher_momentum=1.5"], "--teacher_momentum"), (["--recipe=bets"], "did you mean best?"),
    (["--recipe=best", "--layers=last9", "--stripes=1", "--batch_size=8"], "last9"),
    (["--recipe=best", "--train_stages=9", "--batch_size=8"], "--train_stages 9"),
    (["--head_init=whiten", "--refit_power=0.5"], "--refit_power 0.5: goes with --refit_head"),
    (["--recipe=best", "--head_init=pca", "--refit_power=0.5", "--batch_size=8"], "and --head_init whiten"),
])  # fmt: skip
def test_refused(data, tmp_path, given, words):
    settings = {} if any(word.startswith("--batch_size") for word in given) else {"batch_size": 16}
    failed(execute(*options(data, tmp_path / "runs", **settings), *given), words)
    assert not (tmp_path / "runs").exists()


def test_real_labels_must_be_there(tmp_path):
    folder = write_dataset(tmp_path / "data")
    for file in (folder / "tiny").glob("*_label.npy"):
        np.save(file, np.full(24, -1))
    alone = {"metric_loss": "proxy_anchor", "ml": 1, "rim": 0, "recon": 0}
    failed(execute(*options(folder, tmp_path / "runs", **alone)), "no labels", "supervised")


def test_a_wrong_neighbour_in_a_checkpoint_is_refused(data, tmp_path):
    done = trained(data, tmp_path, **BEST)
    epoch = {"positives": torch.full((24, 3), 99), "clustering": {}, "losses": torch.zeros(4, dtype=torch.float64),
             "step": 1, "seconds": {"features": 0.0, "train": 0.0}}  # fmt: skip
    torch.save(done.saved | {"epoch": 0, "metrics": [], "current": epoch}, done.run / "last.pth")
    (done.run / "metrics.jsonl").write_text(json.dumps({}) + "\n")
    failed(execute("--resume", done.run, "--n_epoch=2"), "not a checkpoint that training can continue from")


def test_the_first_dimensions_are_the_shorter_closed_form(data, tmp_path):
    """Through test.py and embed.py; search.py finds a row by its image."""
    whole = trained(data, tmp_path / "a", **BEST, n_epoch=0)
    short = trained(data, tmp_path / "b", **BEST | {"low_dim": 6}, n_epoch=0)
    at = [f"--data_dir={data}", "--dataset=tiny", "--device=cpu", "--flip_eval"]
    found = {}
    for name, run, more in (("cut", whole.run, ["--dim=6"]), ("own", short.run, []), ("all", whole.run, [])):
        scores, rows = tmp_path / f"{name}.json", tmp_path / f"{name}.npy"
        done = run_in_process("test.py", *at, f"--checkpoint_path={run}", f"--json={scores}",
                              f"--save_embeddings={rows}", *more)  # fmt: skip
        assert done.code == 0, done.err
        found[name] = np.load(rows)
        assert "--flip_eval" not in done.out
        assert json.loads(scores.read_text())["dimension"] == found[name].shape[1] == (16 if name == "all" else 6)
    np.testing.assert_allclose(found["cut"], found["own"], atol=2e-5)
    cut = found["all"][:, :6]
    np.testing.assert_allclose(found["cut"], cut / np.linalg.norm(cut, axis=1, keepdims=True), atol=2e-5)
    plain = run_in_process("test.py", *at[:-1], f"--checkpoint_path={whole.run}")
    assert "give it here, too" in plain.out
    rows = tmp_path / "embedded.npy"
    embedded = run_in_process("embed.py", *at[:-2], "--split=validation", f"--checkpoint_path={whole.run}",
                              "--device=cpu", "--dim=6", "--flip_eval", f"--out={rows}")  # fmt: skip
    assert embedded.code == 0, embedded.err
    np.testing.assert_allclose(np.load(rows), found["cut"], atol=2e-5)
    facts = json.loads(rows.with_suffix(".json").read_text())
    assert [facts[name] for name in ("layers", "pool", "stripes", "dim")] == ["layer2,layer3", "gem", "3,1", 6]


def test_dimensions_that_there_are_not(data, tmp_path):
    done = trained(data, tmp_path, **BEST, n_epoch=0)
    at = [f"--data_dir={data}", "--dataset=tiny", "--device=cpu"]
    failed(run_in_process("test.py", *at, f"--checkpoint_path={done.run}", "--dim=17"), "--dim 17", "16 dimensions")
    failed(run_in_process("test.py", *at, "--backbone=resnet_small", "--weights=none", "--dim=4"), "--dim goes with")
    by_chance = trained(data, tmp_path / "random")
    failed(run_in_process("test.py", *at, f"--checkpoint_path={by_chance.run}", "--dim=4"), "have no order")


def test_a_small_set_gets_the_dimensions_that_it_has(data, tmp_path):
    small = [word for word in options(data, tmp_path, **BEST) if not word.startswith("--low_dim")]
    assert script.main(small) == 0
    done = outcome(tmp_path / "run")
    assert done.saved["config"]["low_dim"] == 23 == len(done.saved["model"]["feat_ext.0.weight"])  # of 24 images
    assert script.main(["--resume", str(done.run), "--n_epoch=2"]) == 0
    failed(execute(*options(data, tmp_path / "b", **BEST | {"low_dim": 24})), "23 directions", "give at most 23")


def test_flags_of_the_recipe_can_be_taken_back():
    args = script.parse_args(["--recipe=best", "--no-refit_head", "--no-flip_eval"])
    assert (args.refit_head, args.flip_eval, args.t) == (False, False, 0.05)


def test_a_start_that_fails_leaves_no_network(tmp_path):
    folder = write_dataset(tmp_path / "data")
    images = folder / "tiny" / "training_tiny_32resized_img.npy"
    np.save(images, np.repeat(np.load(images)[:3], 8, 0))  # three images, eight times each
    failed(execute(*options(folder, tmp_path, **BEST)), "2 directions")
    assert not list((tmp_path / "run").glob("*.pth"))


def test_the_report_of_a_run_without_decoder_says_so(data, tmp_path):
    done = trained(data, tmp_path, **BEST)
    page = run_in_process("report.py", done.run, "--device=cpu", "--map_points=20")
    assert page.code == 0, page.err
    assert "the decoder was not trained (--recon 0)" in (done.run / "report.html").read_text(encoding="utf-8")
