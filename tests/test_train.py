"""train.py on a tiny data set: files, numbers, and options about data and evaluation."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scripts import ROOT, failed
from synthetic import shapes, write_dataset, write_split
from training import Run, assert_same, before_call, execute, options, resumed, trained

import train
from datasets.arrays import load_split
from datasets.views import center_crops
from models import build_model, load_checkpoint
from models.closed_form import closed_form_head
from utils.features import pooled_features
from utils.runs import State

pytestmark = pytest.mark.usefixtures("one_thread")
FILES = {"config.json", "metrics.jsonl", "last.pth", "best.pth", "run.log"}
LOSSES = ("metric_loss", "rim_loss", "reconstruction_loss")


@pytest.fixture(scope="module")
def baseline(data, tmp_path_factory) -> Run:
    """Two epochs of three steps."""
    return trained(data, tmp_path_factory.mktemp("baseline"), n_epoch=2)


def make_scores(*recalls: float):
    """Return a stand-in for `train.score` that gives these R@1, call by call."""
    shares = iter(recalls)
    return lambda *_, **__: {"recall@1": next(shares), "nmi": 0.5, "nmi_protocol": "by hand"}


# ---------------------------------------------------------------- what a run leaves behind


def test_files_and_metrics(baseline, data):
    assert {path.name for path in baseline.run.iterdir()} == FILES
    assert [row["epoch"] for row in baseline.rows] == [1, 2]
    for row in baseline.full_rows:
        metric, rim, reconstruction = (row[name] for name in LOSSES)
        total = 0.9 * metric + 0.3 * rim + 0.001 * reconstruction
        assert row["loss"] == pytest.approx(total, rel=1e-5)
        recalls = [row[f"recall@{k}"] for k in (1, 2, 4, 8)]
        assert recalls == sorted(recalls)
        assert row["nmi_protocol"].startswith("4 clusters, ")
        assert row["seconds"].keys() == {"features", "train", "evaluate"}
        assert row["views_per_second"] == pytest.approx(48 / row["seconds"]["train"])
    config = json.loads((baseline.run / "config.json").read_text())
    assert config == baseline.saved["config"]
    assert (config["lr"], config["t"], config["data_dir"]) == (0.05, 0.1, str(data))
    assert {"method": "cbswr", "recipe": "paper"}.items() <= config.items()
    assert not {"given", "overwrite", "resume", "config"} & config.keys()
    _, info = load_checkpoint(baseline.run / "best.pth")
    assert (info["backbone"], info["n_cluster"], info["low_dim"]) == ("resnet_small", 24, 16)
    assert (baseline.run / "run.log").read_text() == baseline.out


def test_the_losses_of_an_epoch_are_the_means_of_its_steps(data, tmp_path, monkeypatch):
    steps = []
    end_step = State.end_step

    def record(self: State, losses: dict, *rest: object) -> object:
        steps.append({name: value.item() for name, value in losses.items()})
        return end_step(self, losses, *rest)

    monkeypatch.setattr(State, "end_step", record)
    row = trained(data, tmp_path).rows[0]
    assert len(steps) == 3
    for name, logged in (("loss", "loss"), ("rim", "rim_loss"), ("metric", "metric_loss")):
        assert row[logged] == pytest.approx(np.mean([step[name] for step in steps]))


def test_the_best_epoch_is_the_first_with_the_best_recall(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "score", make_scores(0.5, 0.7, 0.7, 0.6))
    run = trained(data, tmp_path, n_epoch=4)
    assert [row["best"] for row in run.rows] == [True, True, False, False]
    assert torch.load(run.run / "best.pth")["epoch"] == 2
    assert run.saved["epoch"] == 4
    assert "last epoch (4): R@1 60.00" in run.out
    assert "best, CHOSEN ON TEST epoch (2): R@1 70.00" in run.out


def test_no_epoch_scores_and_saves_the_start(data, tmp_path):
    start = trained(data, tmp_path, n_epoch=0)
    torch.manual_seed(3)
    expected = build_model("resnet_small", 24, 16).state_dict()
    torch.testing.assert_close(start.saved["model"], dict(expected), rtol=0, atol=0)
    assert [row["epoch"] for row in start.rows] == [0]
    assert "loss" not in start.rows[0]
    assert [row["epoch"] for row in resumed(start.run, "--n_epoch=1").rows] == [0, 1]


def test_training_learns(data, tmp_path):
    settings = {"recipe": "kmeans", "n_epoch": 6, "lr": 0.1, "n_cluster": 4}
    rows = trained(data, tmp_path, "--train_batch_norm", **settings).rows
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.2


def test_a_refitted_head_is_the_closed_form_of_the_trained_features(data, tmp_path):
    powers = ("--head_init=whiten", "--whiten_power=0.6", "--refit_head=0.7")
    run = trained(data, tmp_path, *powers, recipe="best", lr=1e-3)
    model, _ = load_checkpoint(run.run / "last.pth")
    crops = center_crops(load_split(data, "tiny", "training"), 100)
    (pooled,) = pooled_features(model, crops, flip=True)
    weight, bias = closed_form_head(pooled, 16, "whiten", 0.7)  # the start had 0.6
    torch.testing.assert_close(model.feat_ext[0].weight, weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model.feat_ext[0].bias, bias, rtol=1e-3, atol=1e-4)


def test_the_moments_of_a_head_that_was_refitted_are_dropped(data, tmp_path):
    def n_moments(*words: str) -> int:
        run = trained(data, tmp_path / str(len(words)), "--recipe=best", *words)
        return len(run.saved["optimizer"]["state"])

    assert n_moments("--refit_head=off") - n_moments() == 2  # weight and bias


def test_the_seed_and_not_the_workers_decide(data, tmp_path, baseline):
    assert_same(trained(data, tmp_path / "3", n_epoch=2, workers=3), baseline)
    assert trained(data, tmp_path / "other", seed=4).rows[0]["loss"] != baseline.rows[0]["loss"]


@pytest.mark.slow
def test_another_process_gets_the_same_numbers(data, tmp_path, baseline):
    command = [sys.executable, "train.py", *options(data, tmp_path, n_epoch=2)]
    single = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=single, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert Run(tmp_path / "run").rows == baseline.rows


# ---------------------------------------------------------------- data and evaluation


def test_evaluation_by_intervals_in_batches_of_its_own(data, tmp_path, baseline):
    with before_call(train, "score", 0, None) as calls:
        rows = trained(data, tmp_path, n_epoch=5, interval=2).rows
    assert ["recall@1" in row for row in rows] == [False, True, False, True, True]
    assert len(calls) == 3
    assert trained(data, tmp_path / "7", n_epoch=2, test_batch=7).rows == baseline.rows
    row = trained(data, tmp_path / "off", nmi="off").rows[0]
    assert row["nmi_left_out"] == "not asked for"
    assert "nmi" not in row


def test_places_of_a_run(data, tmp_path):
    folders = {"checkpoint_dir": tmp_path / "a" / "b", "log_dir": tmp_path / "logs" / "c"}
    assert execute(*options(data, tmp_path, **folders)).code == 0
    assert {path.name for path in (tmp_path / "a/b/run").iterdir()} == FILES - {"run.log"}
    assert "epoch   1" in (tmp_path / "logs/c/run.log").read_text()
    names = {"cub200": "CBSwR_CUB200", "car196": "CBSwR_Car196", "tiny": "CBSwR_tiny"}
    assert {name: train.parse_args([f"--dataset={name}"]).model_name for name in names} == names


def test_image_size_is_chosen_among_several(tmp_path):
    for size in (24, 40):
        write_dataset(tmp_path / "data", size=size)
    failed(execute(*options(tmp_path / "data", tmp_path)), "sizes [24, 40]; choose an image size")
    trained(tmp_path / "data", tmp_path, image_size=24)
    assert load_checkpoint(tmp_path / "run" / "last.pth")[1]["image_size"] == 24


def test_weights_fill_the_backbone_alone(data, tmp_path, baseline):
    start = trained(data, tmp_path, weights=baseline.run / "last.pth", n_epoch=0, seed=8)
    for name, is_filled in (("base_model.conv1.weight", True), ("feat_ext.0.weight", False)):
        weights = [run.saved["model"][name] for run in (start, baseline)]
        assert torch.equal(*weights) == is_filled


def test_a_collapsed_embedding_is_scored(tmp_path):
    labels = np.arange(24) % 4
    for half in ("training", "validation"):
        write_split(tmp_path, "tiny", half, np.full((24, 32, 32, 3), 90, np.uint8), labels)
    row = trained(tmp_path, tmp_path, nmi="on").rows[0]
    assert row["nmi"] < 0.2
    assert execute(*options(tmp_path, tmp_path / "2", recipe="kmeans", n_cluster=4)).code == 0


def test_one_test_class_is_refused(tmp_path):
    write_split(tmp_path, "tiny", "training", *shapes(24, range(1, 5), 32, 0))
    write_split(tmp_path, "tiny", "validation", *shapes(24, range(5, 6), 32, 1))
    failed(execute(*options(tmp_path, tmp_path / "runs")), "one class only")


# ---------------------------------------------------------------- runs that lie there already


def test_a_run_is_not_overwritten_by_accident(data, tmp_path):
    run = trained(data, tmp_path, "--tensorboard")
    before = {path.name: path.read_bytes() for path in run.run.iterdir()}
    failed(execute(*options(data, tmp_path, seed=9)), f"{run.run}: holds a run already; resume it")
    (run.run / "last.pth").rename(tmp_path / "last.pth")
    failed(execute(*options(data, tmp_path)), "holds a run already")  # the best one counts, too
    (tmp_path / "last.pth").rename(run.run / "last.pth")
    assert {path.name: path.read_bytes() for path in run.run.iterdir()} == before
    again = trained(data, tmp_path, "--overwrite", seed=9)
    assert again.rows != run.rows
    assert {path.name for path in run.run.iterdir()} == FILES  # the event file went, too


def test_a_run_that_never_finished_an_epoch_may_be_started_again(data, tmp_path, baseline):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    (tmp_path / "run" / ".last.pth.123.part").write_bytes(b"of a process that was killed")
    assert trained(data, tmp_path, n_epoch=2).rows == baseline.rows
    assert not list((tmp_path / "run").glob(".*"))
