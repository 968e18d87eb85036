"""train.py on a tiny data set: its files, its numbers, every option, and what it says to a mistake."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scripts import Outcome, failed
from synthetic import shapes, write_dataset, write_split
from training import execute, options, outcome, same_weights, trained

import train as script
from models import build_model, load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")
FILES = {"config.json", "metrics.jsonl", "last.pth", "best.pth", "run.log"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def baseline(data, tmp_path_factory) -> SimpleNamespace:
    return trained(data, tmp_path_factory.mktemp("baseline"))


# ---------------------------------------------------------------- what a run leaves behind


def test_files_and_metrics(data, tmp_path):
    done = trained(data, tmp_path, n_epoch=2)
    assert {path.name for path in done.run.iterdir()} == FILES
    assert [row["epoch"] for row in done.rows] == [1, 2]
    for row in done.full_rows:
        assert {"loss", "metric_loss", "rim_loss", "reconstruction_loss", "recall@1", "recall@2", "recall@4",
                "recall@8", "nmi", "nmi_protocol", "best", "seconds", "images_per_second"} <= row.keys()  # fmt: skip
        assert row["loss"] == pytest.approx(
            0.9 * row["metric_loss"] + 0.3 * row["rim_loss"] + 0.001 * row["reconstruction_loss"], rel=1e-5
        )
        assert 0 <= row["recall@1"] <= row["recall@2"] <= row["recall@4"] <= row["recall@8"] <= 1
        assert 0 <= row["nmi"] <= 1 and row["nmi_protocol"].startswith("4 clusters, ")
        parts = row["seconds"]
        assert parts["epoch"] == pytest.approx(parts["features"] + parts["train"] + parts["evaluate"])
        assert row["images_per_second"] == pytest.approx(48 / parts["train"])  # 3 batches of 2 x 8
    assert done.saved["epoch"] == 2
    config = json.loads((done.run / "config.json").read_text())
    assert config == done.saved["config"]
    assert (config["lr"], config["t"], config["model_name"], config["data_dir"]) == (0.05, 0.1, "run", str(data))
    info = load_checkpoint(done.run / "best.pth")[1]
    assert (info["backbone"], info["n_cluster"], info["low_dim"]) == ("resnet_small", 4, 16)
    best = max(done.rows, key=lambda row: row["recall@1"])
    assert info["epoch"] == best["epoch"] and best["best"]


def test_the_losses_of_an_epoch_are_the_means_of_its_steps(data, tmp_path, monkeypatch):
    steps, step = [], script.train_step
    monkeypatch.setattr(script, "train_step", lambda *a: steps.append(step(*a)) or steps[-1])
    row = trained(data, tmp_path).rows[0]
    means = torch.stack(steps).mean(0).tolist()
    assert len(steps) == 3
    assert [row[name] for name in ("loss", "metric_loss", "rim_loss", "reconstruction_loss")] == pytest.approx(means)


def test_the_best_epoch_is_the_first_with_the_best_recall(data, tmp_path, monkeypatch, capsys):
    recalls = iter([0.5, 0.7, 0.7, 0.6])

    def evaluate(*_):
        return {f"recall@{k}": next(recalls) if k == 1 else 0.9 for k in (1, 2, 4, 8)} | {
            "nmi": 0.5,
            "nmi_protocol": "none",
        }

    monkeypatch.setattr(script, "evaluate", evaluate)
    done = trained(data, tmp_path, n_epoch=4)
    assert [row["best"] for row in done.rows] == [True, True, False, False]
    assert torch.load(done.run / "best.pth")["epoch"] == 2 and done.saved["epoch"] == 4
    out = capsys.readouterr().out
    assert "last epoch (4): R@1 60.00" in out and "CHOSEN ON TEST (2): R@1 70.00" in out
    assert (done.run / "run.log").read_text() in out


def test_no_epoch_scores_the_untrained_network(data, tmp_path):
    done = trained(data, tmp_path, n_epoch=0)
    torch.manual_seed(3)
    expected = build_model("resnet_small", 4, 16).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in done.saved["model"].items())
    assert [row["epoch"] for row in done.rows] == [0] and "recall@1" in done.rows[0] and "loss" not in done.rows[0]
    script.main(["--resume", str(done.run), "--n_epoch", "1"])
    assert [row["epoch"] for row in outcome(done.run).rows] == [0, 1]


@pytest.mark.parametrize("settings", [
    {"pseudo_labels": "kmeans"},
    {"positives": "nn"},
    {"pseudo_labels": "kmeans", "positives": "nn", "precision": "bf16"},
])  # fmt: skip
def test_ways_to_pseudo_labels_and_positives(data, tmp_path, settings):
    done = trained(data, tmp_path, n_epoch=2, **settings)
    for row in done.rows:
        assert np.isfinite(row["loss"])
        assert ("cluster_sizes" in row) == ("pseudo_labels" in settings)
    if "pseudo_labels" in settings:
        assert all(sum(row["cluster_sizes"]) == 24 and min(row["cluster_sizes"]) > 0 for row in done.rows)
        assert "nmi_to_previous_clusters" not in done.rows[0]
        assert 0 <= done.rows[1]["nmi_to_previous_clusters"] <= 1
        assert len(done.saved["pseudo_labels"]) == 24


def test_training_learns(data, tmp_path):
    done = trained(data, tmp_path, n_epoch=6, lr=0.1, pseudo_labels="kmeans")
    assert done.rows[-1]["loss"] < done.rows[0]["loss"] - 0.2


# ---------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("settings", [{"positives": "nn", "interval": 2}, {"pseudo_labels": "kmeans"}])
def test_two_and_two_epochs_are_four(data, tmp_path, settings):
    whole = trained(data, tmp_path / "whole", n_epoch=4, **settings)
    trained(data, tmp_path / "parts", n_epoch=2, **settings)
    torch.manual_seed(99)  # what happened in between does not matter
    resumed = str(tmp_path / "parts" / "run")
    assert script.main(["--resume", f"{resumed}/last.pth" if "positives" in settings else resumed, "--n_epoch=4"]) == 0
    parts = outcome(tmp_path / "parts" / "run")
    assert same_weights(whole, parts)
    assert whole.rows == parts.rows and len(whole.rows) == 4
    assert whole.saved["optimizer"] == parts.saved["optimizer"]
    assert torch.equal(whole.saved["rng"]["cpu"], parts.saved["rng"]["cpu"])
    assert json.loads((parts.run / "config.json").read_text())["n_epoch"] == 4


def test_a_finished_run_stays_as_it_is(data, tmp_path):
    done = trained(data, tmp_path)
    (done.run / "metrics.jsonl").unlink()  # a run that was killed between its checkpoint and this file
    for epochs in ("1", "0"):
        assert script.main(["--resume", str(done.run), "--n_epoch", epochs]) == 0
        again = outcome(done.run)
        assert again.full_rows == done.full_rows and same_weights(again, done)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_change_nothing(data, tmp_path, baseline, workers):
    done = trained(data, tmp_path, workers=workers)
    assert same_weights(done, baseline) and done.rows == baseline.rows


def test_another_process_gets_the_same_numbers(data, tmp_path, baseline):
    command = [sys.executable, "train.py", *options(data, tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert outcome(tmp_path / "run").rows == baseline.rows
    assert "epoch   1  loss" in done.stdout and "CHOSEN ON TEST" in done.stdout


# ---------------------------------------------------------------- every option changes something

LIVE = {
    "lr": 0.01, "t": 0.3, "low_dim": 8, "mu": 2.0, "alpha": 0.2, "rim": 1.0, "recon": 1.0, "ml": 0.1, "n_cluster": 6,
    "neg_m": 3, "seed": 4, "batch_size": 6, "positives": "nn", "pseudo_labels": "kmeans", "recon_target": "image",
    "precision": "bf16", "pool": "gem", "layers": "layer2,layer3", "head_init": "pca", "metric_loss": "instance",
    "stripes": "2", "optimizer": "adamw", "train_stages": 1, "group": 4,
}  # fmt: skip
SHOWN_ELSEWHERE = {
    "n_epoch", "interval", "test_batch", "log_dir", "checkpoint_dir", "model_name", "config", "resume", "overwrite",
    "checkpoint_every_steps", "deterministic", "workers", "dataset",
    "data_dir", "image_size", "backbone", "weights", "device", "data_on", "kmeans_engine",
    "eval_memory_mb", "compile", "nmi", "help", "flip_eval", "baseline", "report",
    "val_classes", "tensorboard",
    "recipe", "whiten_power", "teacher_momentum", "refit_head", "refit_power", "distill_dim",  # test_recipe.py
    "cluster_sizes", "target_t", "target_neighbors",  # test_soft_centers.py
}  # fmt: skip


def test_every_option_is_shown_to_have_an_effect():
    assert {action.dest for action in script.make_parser()._actions} == LIVE.keys() | SHOWN_ELSEWHERE


@pytest.mark.parametrize("name", LIVE)
def test_option_changes_the_training(data, tmp_path, baseline, name):
    done = trained(data, tmp_path, **{name: LIVE[name]})
    assert not same_weights(done, baseline)
    assert done.rows[0]["loss"] != baseline.rows[0]["loss"]
    assert done.saved["config"][name] == LIVE[name] != baseline.saved["config"][name]
    assert np.isfinite(done.rows[0]["loss"])


@pytest.mark.parametrize("name, part", [
    ("metric_loss", "metric_loss"),
    ("t", "metric_loss"), ("alpha", "metric_loss"), ("neg_m", "metric_loss"), ("mu", "rim_loss"),
    ("recon_target", "reconstruction_loss"),
])  # fmt: skip
def test_option_changes_its_own_loss(data, tmp_path, name, part):
    """One step only, so that no weight has changed yet: the other losses stay as they are."""
    one, other = (trained(data, tmp_path / f"{i}", batch_size=24, **change).rows[0] for i, change in
                  enumerate(({}, {name: LIVE[name]})))  # fmt: skip
    for loss in ("metric_loss", "rim_loss", "reconstruction_loss"):
        assert (one[loss] != other[loss]) == (loss == part)


@pytest.mark.parametrize("name, rest", [
    ("ml", "0.3 * rim + 0.001 * reconstruction"),
    ("rim", "0.9 * metric + 0.001 * reconstruction"),
    ("recon", "0.9 * metric + 0.3 * rim"),
])  # fmt: skip
def test_a_loss_of_weight_zero_is_left_out(data, tmp_path, name, rest):
    row = trained(data, tmp_path, **{name: 0}).rows[0]
    parts = {part: row[f"{part}_loss"] for part in ("metric", "rim", "reconstruction")}
    assert row["loss"] == pytest.approx(eval(rest, parts), rel=1e-5)


def test_epochs_and_interval(data, tmp_path):
    rows = trained(data, tmp_path, n_epoch=5, interval=2).rows
    assert ["recall@1" in row for row in rows] == [False, True, False, True, True]


def test_test_batch_is_the_batch_of_evaluation(data, tmp_path, baseline, monkeypatch):
    from models import CBSwR

    sizes, features = [], CBSwR.features
    monkeypatch.setattr(CBSwR, "features", lambda self, x, flip: sizes.append(len(x)) or features(self, x, flip))
    done = trained(data, tmp_path, test_batch=7)
    assert sizes == [7, 7, 7, 3]
    assert same_weights(done, baseline)


def test_eval_memory_mb_bounds_every_search(data, tmp_path, monkeypatch):
    from utils import metrics, search

    seen = []

    def watch(module, name: str) -> None:
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: seen.append(k["memory_mb"]) or function(*a, **k))

    watch(search, "nearest_neighbors")
    watch(metrics, "recall_at_k")
    few, many = (trained(data, tmp_path / f"{n}", positives="nn", eval_memory_mb=n) for n in (1, 300))
    assert seen == [1, 1, 300, 300]
    assert same_weights(few, many) and few.rows == many.rows


def test_compile(data, tmp_path, baseline, monkeypatch):
    """Traced into graphs that torch then runs as they are: its C++ would take minutes."""
    monkeypatch.setenv("CXX", sys.executable)  # any program will do
    compiled, compile_ = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m: compiled.append(m) or compile_(m, backend="eager"))
    done = trained(data, tmp_path, "--compile")
    assert [type(module) for module in compiled] == [type(build_model("resnet_small").base_model)]
    assert same_weights(done, baseline) and done.rows == baseline.rows


def test_folders(data, tmp_path):
    done = trained(data, tmp_path, checkpoint_dir=tmp_path / "a" / "b", log_dir=tmp_path / "logs" / "c")
    assert done.run == tmp_path / "a" / "b" / "run"
    assert {path.name for path in done.run.iterdir()} == FILES - {"run.log"}
    assert "epoch   1" in (tmp_path / "logs" / "c" / "run.log").read_text()


@pytest.mark.parametrize(
    "dataset, name", [("cub200", "CBSwR_CUB200"), ("car196", "CBSwR_Car196"), ("other", "CBSwR_other")]
)
def test_the_run_is_named_after_the_data_set(tmp_path, dataset, name):
    write_dataset(tmp_path / "data", dataset)
    argv = [
        a for a in options(tmp_path / "data", tmp_path / "runs", dataset=dataset, n_epoch=0) if "model_name" not in a
    ]
    assert script.main(argv) == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [name]


def test_positives_are_mined_on_cub200_alone(tmp_path):
    def rows(dataset: str, positives: str) -> list:
        write_dataset(tmp_path / "data", dataset)
        return trained(tmp_path / "data", tmp_path / dataset / positives, dataset=dataset, positives=positives).rows

    assert rows("cub200", "auto") == rows("cub200", "nn") != rows("cub200", "self")
    assert rows("car196", "auto") == rows("car196", "self")


def test_image_size_and_data_dir(data, tmp_path, baseline):
    for half, classes in (("training", range(1, 5)), ("validation", range(5, 9))):
        for size in (24, 40):
            write_split(tmp_path / "data", "tiny", half, *shapes(24, classes, size, seed=size))
    done = trained(tmp_path / "data", tmp_path, image_size=24)
    assert done.rows != baseline.rows
    assert ", 24 px" in (done.run / "run.log").read_text()
    assert done.rows != trained(tmp_path / "data", tmp_path / "40", image_size=40).rows


def test_weights_and_backbone(data, tmp_path, baseline):
    start = trained(data, tmp_path / "start", weights=baseline.run / "last.pth", n_epoch=0)
    assert torch.equal(
        start.saved["model"]["base_model.conv1.weight"], baseline.saved["model"]["base_model.conv1.weight"]
    )
    assert not torch.equal(start.saved["model"]["feat_ext.0.weight"], baseline.saved["model"]["feat_ext.0.weight"])
    other = trained(data, tmp_path / "other", backbone="resnet18", n_epoch=0)
    assert load_checkpoint(other.run / "last.pth")[1]["backbone"] == "resnet18"


@pytest.mark.parametrize("engine", ["torch", "faiss", "auto"])
def test_kmeans_engine(data, tmp_path, monkeypatch, engine):
    from utils import clustering

    found = importlib.util.find_spec("faiss") is not None
    if engine == "faiss" and not found:
        engine = "torch"
    used, kmeans = [], clustering.kmeans
    monkeypatch.setattr(clustering, "kmeans", lambda *a, **k: used.append(k["engine"]) or kmeans(*a, **k))
    trained(data, tmp_path, pseudo_labels="kmeans", kmeans_engine=engine)
    assert used[0] == (("faiss" if found else "torch") if engine == "auto" else engine)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a CUDA device")
def test_device(data, tmp_path):
    failed(execute(*options(data, tmp_path, device="cuda")), "--device cuda: torch sees no CUDA device")


def test_data_on(data, tmp_path, baseline):
    done = trained(data, tmp_path, data_on="host")
    assert same_weights(done, baseline) and done.rows == baseline.rows
    failed(execute(*options(data, tmp_path / "other", data_on="device")), "--data_on device: there is no GPU")


@pytest.mark.parametrize("slow", [True, False])
def test_bf16_says_where_it_is_slow(data, tmp_path, monkeypatch, slow):
    monkeypatch.setattr("utils.devices.bf16_is_slow", lambda device: slow)
    trained(data, tmp_path, precision="bf16", n_epoch=0)
    assert ("slower here than fp32" in (tmp_path / "run" / "run.log").read_text()) == slow


# ---------------------------------------------------------------- options in a file


def test_config_stands_between_the_command_line_and_the_defaults(data, tmp_path):
    config = tmp_path / "options.json"
    config.write_text(json.dumps({"lr": 0.5, "n_cluster": 9, "log_dir": None, "overwrite": False, "positives": "self"}))
    args = script.parse_args(["--config", str(config), "--n_cluster", "7"])
    assert (args.lr, args.n_cluster, args.positives, args.t) == (0.5, 7, "self", 0.1)
    assert script.parse_args(["--n_cluster=7", f"--config={config}"]).n_cluster == 7


def test_the_config_of_a_run_repeats_it(data, tmp_path, baseline):
    assert script.main(["--config", str(baseline.run / "config.json"), "--checkpoint_dir", str(tmp_path)]) == 0
    assert outcome(tmp_path / "run").rows == baseline.rows


@pytest.mark.parametrize("content, words", [
    ('{"n_clusters": 3}', "unknown option 'n_clusters'; did you mean 'n_cluster'?"),
    ('{"config": "a.json"}', "unknown option 'config'"),
    ('{"help": true}', "unknown option 'help'"),
    ('{"resume": "a"}', "resume belongs on the command line"),
    ('{"lr": "fast"}', "argument --lr: expected a number, got 'fast'"),
    ('{"lr": -1}', "argument --lr: must be greater than 0, got -1"),
    ('{"lr": NaN}', "argument --lr"),
    ('{"lr": [0.1]}', "lr takes a number or a text, got [0.1]"),
    ('{"n_epoch": 2.5}', "argument --n_epoch: expected a whole number, got '2.5'"),
    ('{"n_epoch": true}', "n_epoch takes a number or a text, got true"),
    ('{"overwrite": "yes"}', "overwrite is true or false, got 'yes'"),
    ('{"backbone": "resnet_smal"}', "did you mean resnet_small?"),
    ('{"lr": 0.1', "not valid JSON"),
    ("", "not valid JSON"),
    ("[1, 2]", "expected a JSON object"),
    (b"\xff\xfe", "not valid JSON"),
    (None, "No such file"),
])  # fmt: skip
def test_faults_in_a_config_name_the_file(tmp_path, content, words):
    path = tmp_path / "options.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    result = execute("--config", path)
    failed(result, words)
    assert str(path) in result.err
    failed(execute("--config", path, "--lr", "0.5"), str(path))  # a fault stays one where the command line overrides it


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize("argv, words", [
    (["--norm", "1"], "--norm: weighted a loss that the released code did not have"),
    (["--cl=0.1"], "--cl: weighted a loss"),
    (["--batch_m", "4"], "--batch_m: had no effect in the released code"),
    (["--n_clusters", "4"], "unknown option --n_clusters; did you mean --n_cluster?"),
    (["--n-cluster=4"], "did you mean --n_cluster?"),
    (["--n_ep", "3"], "unknown option --n_ep"),
    (["--zzz"], "unknown option --zzz"),
    (["cub200"], "unrecognized arguments: cub200"),
    (["--lr"], "argument --lr: expected one argument"),
    (["--lr", "0"], "must be greater than 0"),
    (["--lr", "inf"], "must be greater than 0"),
    (["--t", "-0.1"], "must be at least 1e-06"),
    (["--alpha", "nan"], "must be at least 0"),
    (["--n_cluster", "1"], "must be at least 2"),
    (["--n_epoch", "-1"], "must be at least 0"),
    (["--neg_m", "0"], "must be at least 1"),
    (["--batch_size", "many"], "expected a whole number"),
    (["--positives", "sefl"], "did you mean self?"),
    (["--backbone", "googlnet"], "did you mean googlenet?"),
    (["--model_name", "../up"], "expected a plain name"),
    (["--model_name", ""], "expected a plain name"),
    (["--dataset", ".hidden"], "expected a plain name"),
    (["--resume", "a", "--config", "b"], "leave out --config"),
])  # fmt: skip
def test_refused_options(argv, words):
    failed(execute(*argv), words)


def test_missing_data_names_the_file_and_leaves_nothing(tmp_path):
    for dataset in ("cub200", "car196"):
        result = execute("--dataset", dataset, "--data_dir", tmp_path / "data", "--checkpoint_dir", tmp_path / "runs")
        failed(result, str(tmp_path / "data" / dataset / f"training_{dataset}_256resized_img.npy"), "no such file",
               f"python pre_process/pre_process_{dataset}.py")  # fmt: skip
    write_split(tmp_path / "data", "tiny", "training", *shapes(8, range(2), 32, seed=0))
    failed(execute(*options(tmp_path / "data", tmp_path / "runs")), "validation_tiny_32resized_img.npy")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("changed, words", [
    ({"weights": "no/such/file.pth"}, "no/such/file.pth: no such file"),
    ({"weights": "auto"}, "no pretrained weights exist for resnet_small"),
    ({"batch_size": 25}, "--batch_size 25: the training half of tiny holds 24 images only"),
    ({"pseudo_labels": "kmeans", "n_cluster": 25}, "--n_cluster 25: more clusters than the 24 training images"),
    ({"image_size": 64}, "training_tiny_64resized_img.npy: no such file"),
])  # fmt: skip
def test_impossible_settings_leave_no_folder(data, tmp_path, changed, words):
    failed(execute(*options(data, tmp_path / "runs", **changed)), words)
    assert not (tmp_path / "runs").exists()


def test_a_run_is_not_overwritten_by_accident(data, tmp_path):
    done = trained(data, tmp_path)
    before = {path.name: path.read_bytes() for path in done.run.iterdir()}
    result = execute(*options(data, tmp_path, seed=9))
    failed(result, str(done.run), "--resume", "--overwrite")
    failed(execute(*options(data, tmp_path, seed=9, weights="none.pth"), "--overwrite"), "none.pth: no such file")
    (done.run / "last.pth").rename(tmp_path / "last.pth")
    failed(execute(*options(data, tmp_path, seed=9)), "holds a run already")  # the best one is worth keeping, too
    (tmp_path / "last.pth").rename(done.run / "last.pth")
    assert {path.name: path.read_bytes() for path in done.run.iterdir()} == before
    assert execute(*options(data, tmp_path, seed=9), "--overwrite").code == 0
    again = outcome(done.run)
    assert [row["epoch"] for row in again.rows] == [1] and not same_weights(again, done)
    assert "overwrite" not in again.saved["config"]


def test_a_run_that_never_finished_an_epoch_may_be_started_again(data, tmp_path, baseline):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert trained(data, tmp_path).rows == baseline.rows


@pytest.mark.parametrize("option", ["--t=0.2", "--seed=5", "--dataset=cub200", "--backbone=resnet18", "--overwrite"])
def test_resume_with_another_setting_is_refused(baseline, option):
    before = (baseline.run / "last.pth").read_bytes()
    failed(execute("--resume", baseline.run, option), option.partition("=")[0], "cannot change")
    assert (baseline.run / "last.pth").read_bytes() == before


def test_resume_takes_the_same_setting_and_a_moved_run(data, tmp_path):
    done = trained(data, tmp_path)
    moved = tmp_path / "elsewhere" / "other"
    moved.parent.mkdir()
    done.run.rename(moved)
    assert script.main(["--resume", str(moved), "--n_epoch", "2", "--lr", "0.05", "--workers", "0"]) == 0
    assert [row["epoch"] for row in outcome(moved).rows] == [1, 2]
    assert not (tmp_path / "run").exists()


def test_resume_of_nothing(data, tmp_path):
    failed(
        execute("--resume", tmp_path / "none"), str(tmp_path / "none" / "config.json"), "no run of train.py lies there"
    )
    done = trained(data, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text((done.run / "config.json").read_text())
    shutil.copyfile(done.run / "metrics.jsonl", other / "metrics.jsonl")
    failed(execute("--resume", other), f"{other / 'last.pth'}: no such file; put it back, or start again without")
    whole = (done.run / "last.pth").read_bytes()
    (other / "last.pth").write_bytes(whole[: len(whole) // 2])
    failed(execute("--resume", other), str(other / "last.pth"))
    torch.save({"model": done.saved["model"], "epoch": 1}, other / "last.pth")
    failed(execute("--resume", other), "not a checkpoint that training can continue from")
    torch.save({**done.saved, "model": build_model("resnet_small", 5, 16).state_dict()}, other / "last.pth")
    failed(execute("--resume", other), "does not fit the run's config.json")


@pytest.mark.parametrize("settings, words", [
    ({"lr": 1e30}, "epoch 1, step 2 of 3: the loss is not finite (loss nan, metric nan, rim nan, reconstruction "),
    ({"lr": 1e30, "positives": "nn", "interval": 5, "n_epoch": 3}, "epoch 1, step 2 of 3: the loss is not finite"),
    ({"lr": 1e30, "batch_size": 24, "n_epoch": 2}, "the network's features are not finite"),
    ({"lr": 1e30, "ml": 1e12, "batch_size": 24, "n_epoch": 2}, "step 1 of epoch 1: the weights are not finite"),
])  # fmt: skip
def test_divergence_is_one_line(data, tmp_path, settings, words):
    failed(execute(*options(data, tmp_path, **settings)), words, f"--resume {tmp_path}/run --lr", code=3)
    assert not (tmp_path / "run" / "last.pth").exists()


def test_identical_images_are_one_line(tmp_path):
    for half in ("training", "validation"):
        write_split(tmp_path, "tiny", half, np.full((24, 32, 32, 3), 90, np.uint8), np.arange(24) % 4)
    failed(execute(*options(tmp_path, tmp_path)), "cannot score the embeddings of 24 images")
    failed(execute(*options(tmp_path, tmp_path / "2", pseudo_labels="kmeans", kmeans_engine="torch")),
           "cannot cluster the training images: only 1 of the 24 rows are distinct")  # fmt: skip


def test_places_that_cannot_be_written(data, tmp_path):
    (tmp_path / "file").write_text("in the way")
    failed(execute(*options(data, tmp_path / "file")), str(tmp_path / "file"))
    failed(execute(*options(data, tmp_path / "runs", log_dir=tmp_path / "file")), str(tmp_path / "file"))


def test_a_real_command_line_fails_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "--dataset", "cub200"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    failed(Outcome(done.returncode, done.stdout, done.stderr), "data/cub200/training_cub200_256resized_img.npy")
    assert done.stdout == "" and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("name", ["train.py", "test.py"])
def test_help_is_quick_and_explains_every_option(name):
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: status = end.code\n"
        "print('STATUS', status, 'SLOW', sorted({'torch', 'numpy', 'torchvision', 'tqdm'} & set(sys.modules)))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / name), "--help"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "COLUMNS": "200"}, timeout=60,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stderr == "" and "STATUS 0 SLOW []" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5  # seconds of this process alone
    for line in ("--dataset", "--backbone", "--precision"):
        assert line in done.stdout


def test_every_option_has_help():
    for action in script.make_parser()._actions:
        assert action.help and len(action.help) > 10, action.dest


def test_resume_of_a_finished_run_says_so(data, tmp_path):
    done = trained(data, tmp_path)
    before = (done.run / "last.pth").read_bytes()
    result = execute("--resume", done.run)
    assert result.code == 0
    assert "give a larger --n_epoch" in result.out
    assert (done.run / "last.pth").read_bytes() == before


def test_one_test_class_is_refused(tmp_path):
    write_split(tmp_path, "single", "training", *shapes(24, range(1, 5), 32, 0))
    write_split(tmp_path, "single", "validation", *shapes(24, range(5, 6), 32, 1))
    options = ["--dataset", "single", "--data_dir", tmp_path, "--backbone", "resnet_small", "--weights", "none"]
    failed(execute(*options, "--batch_size", 4, "--checkpoint_dir", tmp_path / "runs"), "one class only")
    assert not (tmp_path / "runs").exists()
