"""--metric_loss soft_centers: its formula, what it remembers, and the runs."""

from __future__ import annotations

import pytest
import torch
from scripts import failed
from synthetic import write_dataset
from torch import Tensor
from torch.nn import functional as F
from training import execute, outcome, same_weights, trained

import train as script
from losses import SoftCentersStep, partition_sizes, soft_center_loss
from models import build_model
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
DOUBLE = {"rtol": 1e-10, "atol": 1e-12}
SOFT = {"metric_loss": "soft_centers", "ml": 1, "rim": 0, "recon": 0, "positives": "self", "cluster_sizes": "3,6"}


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def literal(x: Tensor, members: Tensor, centers: list[Tensor], t: float, target_t: float) -> Tensor:
    total = x.new_zeros(())
    for one in centers:
        for row, known in zip(x, members, strict=True):
            q = x.new_zeros(len(one))
            for member in known:
                e = torch.stack([torch.exp(member @ c / target_t) for c in one])
                q = q + e / e.sum() / len(known)
            e = torch.stack([torch.exp(row @ c / t) for c in one])
            total = total - (q * (e / e.sum()).log()).sum()
    return total / (len(x) * len(centers))


@pytest.mark.parametrize("rows, dim, known, sizes", [(2, 3, 1, (2,)), (5, 4, 3, (2, 7)), (8, 6, 5, (3, 4, 9))])
def test_the_loss_is_its_formula(rows, dim, known, sizes):
    x, members = unit(rows, dim).requires_grad_(), unit(rows, known, dim, seed=1)
    centers = [unit(k, dim, seed=k) for k in sizes]
    loss, expected = soft_center_loss(x, members, centers, 0.1, 0.05), literal(x, members, centers, 0.1, 0.05)
    torch.testing.assert_close(loss, expected, **DOUBLE)
    torch.testing.assert_close(*(torch.autograd.grad(v, x)[0] for v in (loss, expected)), rtol=1e-8, atol=1e-10)


def test_the_loss_in_its_corners():
    x, members, centers = unit(4, 3).float(), unit(4, 2, 3).float(), [unit(5, 3).float()]
    with torch.autocast("cpu", torch.bfloat16):
        inside = soft_center_loss(x, members, centers, 0.1, 0.05)
    assert inside.dtype == torch.float32 and torch.equal(inside, soft_center_loss(x, members, centers, 0.1, 0.05))
    assert soft_center_loss(x, members, centers, 1e-6, 1e-6).isfinite()
    for bad in ((x, members[:3], centers), (x, members[:, :, :2], centers), (x[0], members, centers), (x, members, [])):
        with pytest.raises(ValueError, match="must be"):
            soft_center_loss(*bad, 0.1, 0.05)


def test_partitions_have_two_clusters_at_least_and_none_is_there_twice():
    assert partition_sizes(2409, (6, 12, 24, 48)) == [50, 100, 200, 401]
    assert partition_sizes(24, (6, 12, 24, 48)) == [2, 4]


def test_a_step_goes_by_what_was_found_at_the_start_of_the_epoch():
    torch.manual_seed(0)
    model = build_model("resnet_small", 4, 8).double()
    step = SoftCentersStep(model.train(), 12, (3, 6), temperature=0.2, target_temperature=0.1, neighbors=2, weight=0.5)
    space = unit(12, 8, seed=3).float()
    memory, members, centers = step.find(space, 1, "torch", 50, 64)
    distance = torch.cdist(space, space)
    for image, row in enumerate(members.tolist()):
        assert row == distance[image].argsort().tolist()[:3] and row[0] == image
    torch.testing.assert_close(centers.norm(dim=1), torch.ones(2 + 4))
    step.begin_epoch(memory, members, centers)
    images, inputs = torch.tensor([5, 0, 7, 2]), torch.randn(8, 3, 32, 32, dtype=torch.float64)
    losses = step(inputs, images)
    own = model(inputs)[0]
    parts = [part.double() for part in centers.split([2, 4])]
    expected = literal(own, space[members[images.repeat(2)]].double(), parts, 0.2, 0.1)
    torch.testing.assert_close(losses["metric"], expected.detach(), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(losses["loss"], 0.5 * expected, rtol=1e-7, atol=1e-9)
    losses["loss"].backward()
    assert model.feat_ext[0].weight.grad.abs().max() > 0 and step.memory.grad is None
    with pytest.raises(ValueError, match="distinct"):
        step.find(space[:1].repeat(12, 1), 1, "torch", 50, 64)


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("more", [{}, {"head_init": "whiten"}, {"recipe": "best"}])
def test_a_run_is_stopped_and_resumed_to_the_same_weights(data, tmp_path, more):
    settings = SOFT | more | {"n_epoch": 2, "batch_size": 4}
    whole = trained(data, tmp_path / "a", **settings)
    assert whole.rows[0]["partitions"] == [4, 8] and whole.rows[1]["kmeans_engine"] in ("faiss", "torch")
    assert "partitions of 4, 8 clusters" in (whole.run / "run.log").read_text()
    assert whole.rows[0]["loss"] > 0 and whole.rows[0]["rim_loss"] == 0
    assert {"memory", "members", "centers"} == whole.saved["step"].keys()
    steps, real = [], script.train_step

    def stop_after(job, *rest):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return real(job, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "train_step", stop_after)
        with pytest.raises(KeyboardInterrupt):
            trained(data, tmp_path / "b", **settings, checkpoint_every_steps=2)
    assert script.main(["--resume", str(tmp_path / "b" / "run")]) == 0
    resumed = outcome(tmp_path / "b" / "run")
    assert same_weights(whole, resumed)
    assert all(torch.equal(value, resumed.saved["step"][name]) for name, value in whole.saved["step"].items())


@pytest.mark.parametrize("name, value", [
    ("cluster_sizes", "4"), ("target_t", 0.5), ("target_neighbors", 0), ("t", 0.3), ("kmeans_engine", "torch"),
])  # fmt: skip
def test_every_option_of_it_is_live(data, tmp_path, name, value):
    before, after = (trained(data, tmp_path / str(i), **SOFT | more) for i, more in enumerate(({}, {name: value})))
    assert before.saved["config"][name] != after.saved["config"][name] == value
    assert name == "kmeans_engine" or before.rows[0]["loss"] != after.rows[0]["loss"]


def test_it_trains_towards_its_assignments(data, tmp_path):
    done = trained(data, tmp_path, **SOFT | {"head_init": "pca", "n_epoch": 1, "lr": 0.05})
    model = trained(data, tmp_path / "0", **SOFT | {"head_init": "pca", "n_epoch": 6, "lr": 0.05})
    assert model.rows[-1]["loss"] < done.rows[0]["loss"]


@pytest.mark.parametrize("options, words", [
    (["--cluster_sizes=0"], "--cluster_sizes"), (["--cluster_sizes=6,x"], "--cluster_sizes"),
    (["--target_t=0"], "--target_t"), (["--target_neighbors=-1"], "--target_neighbors"),
    (["--metric_loss=soft_centers"], "give --rim 0 --recon 0"),
])  # fmt: skip
def test_wrong_options_are_refused(options, words):
    failed(execute(*options), words)


def test_too_few_different_images_end_in_a_clear_error(data, tmp_path, monkeypatch):
    def find(*_):
        raise ValueError("3 distinct rows cannot make 4 clusters")

    monkeypatch.setattr(SoftCentersStep, "find", find)
    with pytest.raises(UserError, match=r"cannot cluster the training images: 3 distinct.*; raise --cluster_sizes"):
        trained(data, tmp_path, **SOFT)


def test_features_that_lost_a_direction_in_training_still_get_their_head(data, tmp_path, monkeypatch, capsys):
    real = script.train_steps

    def lose_channels(job):
        real(job)
        maps = job.model.base_model.layer3
        maps.register_forward_hook(lambda _, __, found: found * (torch.arange(found.shape[1])[:, None, None] < 10))

    monkeypatch.setattr(script, "train_steps", lose_channels)
    done = trained(data, tmp_path, recipe="best", batch_size=8, layers="layer3", stripes="1", low_dim=16)
    assert "directions only: the last" in capsys.readouterr().out
    head = done.saved["model"]["feat_ext.0.weight"]
    own = int((head != 0).any(1).sum())
    assert 5 <= own <= 10 and (head[own:] == 0).all() and done.rows[0]["recall@1"] > 0
