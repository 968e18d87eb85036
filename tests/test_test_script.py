"""test.py: what it takes, what it prints and writes, and that its scores are those of the embeddings it saves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import Outcome, failed, run_in_process
from synthetic import shapes, write_dataset, write_split

import train
from datasets import load_split
from models import build_model, load_checkpoint
from utils.metrics import precision_at_r

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The test half has labels by chance: scores in the middle, where a fault would show."""
    folder = write_dataset(tmp_path_factory.mktemp("data"), count=30)
    images, labels = shapes(30, range(5, 9), 32, seed=1)
    write_split(folder, "tiny", "validation", images, np.random.default_rng(2).permutation(labels))
    return folder


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("new_checkpoint")
    assert train.main([
        "--data_dir", str(data), "--dataset=tiny", "--backbone=resnet_small", "--weights=none", "--device=cpu",
        "--batch_size=10", "--n_cluster=5", "--low_dim=12", "--n_epoch=2", "--checkpoint_dir", str(folder),
        "--model_name=CBSwR_tiny", "--lr=0.05",
    ]) == 0  # fmt: skip
    return folder / "CBSwR_tiny"


@pytest.fixture
def execute(data):
    def execute(*argv: object, data_dir: Path = data, dataset: str = "tiny") -> Outcome:
        return run_in_process("test.py", "--data_dir", data_dir, "--dataset", dataset, "--device", "cpu", *argv)

    return execute


def literal_recall(embeddings: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of images with one of their class among the k nearest others."""
    hits = 0
    for i in range(len(labels)):
        distances = [(np.square(embeddings[i] - embeddings[j]).sum(), j) for j in range(len(labels)) if j != i]
        hits += any(labels[j] == labels[i] for _, j in sorted(distances)[:k])
    return hits / len(labels)


def scored(execute, tmp_path: Path, *argv: object, **data: object) -> tuple[dict, np.ndarray, str]:
    result = execute(*argv, "--json", tmp_path / "scores.json", "--save_embeddings", tmp_path / "e.npy", **data)
    assert (result.code, result.err) == (0, "")
    return json.loads((tmp_path / "scores.json").read_text()), np.load(tmp_path / "e.npy"), result.out


def test_scores_are_those_of_the_saved_embeddings(execute, run, data, tmp_path):
    scores, embeddings, out = scored(execute, tmp_path, "--checkpoint_path", run / "last.pth")
    labels = load_split(data, "tiny", "validation").labels
    assert embeddings.dtype == np.float32 and embeddings.shape == (30, 12)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    for k in (1, 2, 4, 8):
        assert scores[f"recall@{k}"] == literal_recall(embeddings.astype(np.float64), labels, k)
        assert f"R@{k} {100 * scores[f'recall@{k}']:.2f}" in out
    assert 0.05 < scores["recall@1"] < scores["recall@4"] < 0.99
    assert 0 < scores["nmi"] < 1 and f"NMI {100 * scores['nmi']:.2f}" in out
    assert scores["nmi_protocol"] in out
    more = {name: scores.pop(name) for name in ("map@r", "r_precision", "ami")}
    expected = precision_at_r(embeddings, labels)
    assert {name: more[name] for name in expected} == pytest.approx(expected) and more["ami"] < scores["nmi"]
    line = f"MAP@R {100 * more['map@r']:.2f}  R-precision {100 * more['r_precision']:.2f}  AMI {100 * more['ami']:.2f}"
    assert line in out.splitlines()
    assert {key: value for key, value in scores.items() if not key.startswith(("recall@", "nmi"))} == {
        "features": "embedding", "backbone": "resnet_small", "weights": None, "checkpoint": str(run / "last.pth"),
        "epoch": 2, "n_cluster": 5, "low_dim": 12, "dataset": "tiny", "images": 30, "classes": 4, "image_size": 32,
        "dimension": 12, "pooling": "avg", "flip_eval": False, "precision": "fp32", "device": "cpu",
    }  # fmt: skip


def test_embeddings_are_those_of_the_centre_crops_in_order(execute, run, data, tmp_path):
    _, embeddings, _ = scored(execute, tmp_path, "--checkpoint_path", run / "last.pth", "--test_batch", 7)
    model, _ = load_checkpoint(run / "last.pth")
    images = torch.from_numpy(np.array(load_split(data, "tiny", "validation").images[:, 2:30, 2:30]))
    with torch.no_grad():
        expected = model(model.normalization(images))[0]
    np.testing.assert_allclose(embeddings, expected.numpy(), atol=1e-5)


def test_scores_are_those_that_training_printed(execute, run, tmp_path):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores, _, _ = scored(execute, tmp_path, "--checkpoint_path", run / "last.pth")
    for name in ("recall@1", "recall@2", "recall@4", "recall@8", "nmi", "nmi_protocol"):
        assert scores[name] == rows[-1][name]


@pytest.mark.parametrize("given", ["CBSwR_tiny", "CBSwR_tiny.pth", "CBSwR_tiny/best.pth"])
def test_a_run_is_found_by_its_folder_and_by_its_published_name(execute, run, tmp_path, given):
    scores, _, out = scored(execute, tmp_path, "--checkpoint_path", run.parent / given)
    assert scores["checkpoint"] == str(run / "best.pth")
    assert scores["epoch"] == torch.load(run / "best.pth")["epoch"]
    assert ("chosen on test" in out) == (not given.endswith("best.pth"))


def test_a_file_of_that_name_goes_before_the_folder(execute, run, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model.pth").write_bytes((run / "last.pth").read_bytes())
    scores, _, _ = scored(execute, tmp_path, "--checkpoint_path", tmp_path / "model.pth")
    assert scores["checkpoint"] == str(tmp_path / "model.pth")


def test_a_released_file(execute, tmp_path, data):
    torch.manual_seed(0)
    state = build_model("googlenet", 20, 128).state_dict()
    optimizer = {"state": {}, "param_groups": [{"lr": 0.001, "params": [0]}]}
    torch.save({"model": state, "epoch": 7, "optimizer": optimizer}, tmp_path / "released.pth")
    write_split(tmp_path, "few", "validation", *shapes(8, range(2), 40, seed=3))
    scores, embeddings, out = scored(
        execute, tmp_path, "--checkpoint_path", tmp_path / "released.pth", data_dir=tmp_path, dataset="few"
    )
    assert (scores["backbone"], scores["n_cluster"], scores["low_dim"], scores["epoch"]) == ("googlenet", 20, 128, 7)
    assert embeddings.shape == (8, 128)
    assert "released.pth after epoch 7: googlenet, embedding of 128 dimensions" in out


def test_a_frozen_backbone(execute, tmp_path, run, data):
    scores, pooled, out = scored(execute, tmp_path, "--backbone", "resnet_small", "--weights", run / "last.pth")
    assert pooled.shape == (30, 128) and scores["dimension"] == 128
    assert (scores["features"], scores["checkpoint"], scores["epoch"]) == ("pooled", None, None)
    assert scores["weights"] == str(run / "last.pth") and f"frozen resnet_small, weights {run / 'last.pth'}" in out
    labels = load_split(data, "tiny", "validation").labels
    assert scores["recall@1"] == literal_recall(pooled.astype(np.float64), labels, 1)
    model, _ = load_checkpoint(run / "last.pth")
    images = torch.from_numpy(np.array(load_split(data, "tiny", "validation").images[:, 2:30, 2:30]))
    with torch.no_grad():
        expected = model.features(model.normalization(images))[0]
    np.testing.assert_allclose(pooled, expected.numpy(), atol=1e-5)


def test_options_that_change_numbers_and_options_that_do_not(execute, tmp_path, run):
    def embeddings(*argv: object) -> np.ndarray:
        return scored(execute, tmp_path, *argv)[1]

    random = ("--backbone", "resnet_small", "--weights", "none")
    assert np.array_equal(embeddings(*random, "--seed", 1), embeddings(*random, "--seed", 1))
    assert not np.array_equal(embeddings(*random, "--seed", 1), embeddings(*random, "--seed", 2))
    trained = ("--checkpoint_path", run / "last.pth")
    plain = embeddings(*trained)
    assert np.array_equal(embeddings(*trained, "--workers", 0), plain)
    half = embeddings(*trained, "--precision", "bf16")
    assert not np.array_equal(half, plain) and (half * plain).sum(1).min() > 0.97
    assert scored(execute, tmp_path, *trained, "--seed", 7)[0]["nmi_protocol"].endswith("seed 7")


def test_test_batch_and_image_size(execute, tmp_path, run, monkeypatch):
    from models import CBSwR

    seen, features = [], CBSwR.features
    monkeypatch.setattr(CBSwR, "features", lambda self, x, flip: seen.append(tuple(x.shape)) or features(self, x, flip))
    for size in (24, 48):
        write_split(tmp_path, "two", "validation", *shapes(10, range(2), size, seed=3))
    last = ("--checkpoint_path", run / "last.pth", "--test_batch", 4)
    assert execute(*last, "--image_size", 48, data_dir=tmp_path, dataset="two").code == 0
    assert seen == [(4, 3, 42, 42), (4, 3, 42, 42), (2, 3, 42, 42)]
    failed(execute(*last, data_dir=tmp_path, dataset="two"), "choose one with --image_size")


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize("argv, words", [
    ([], "give either --checkpoint_path, or --backbone"),
    (["--checkpoint_path", "a.pth", "--backbone", "resnet18"], "give either --checkpoint_path, or --backbone"),
    (["--checkpoint_path", "a.pth", "--weights", "none"], "--weights goes with --backbone"),
    (["--checkpoint", "a.pth"], "unknown option --checkpoint; did you mean --checkpoint_path?"),
    (["--backbone", "resnet8"], "unknown name 'resnet8'; did you mean resnet18?"),
    (["--checkpoint_path", "no/such.pth"], "no/such.pth: no such file"),
    (["--backbone", "resnet_small", "--weights", "no.pth"], "no.pth: no such file"),
    (["--backbone", "resnet_small"], "no pretrained weights exist for resnet_small; use --weights none"),
    (["--backbone", "resnet_small", "--weights", "none", "--test_batch", "0"], "must be at least 1"),
    (["--backbone", "resnet_small", "--weights", "none", "--dataset", "a/b"], "expected a plain name"),
])  # fmt: skip
def test_refused(execute, argv, words):
    failed(execute(*argv), words)


def test_an_unfinished_run_says_what_is_missing(execute, tmp_path):
    (tmp_path / "begun").mkdir()
    for given in ("begun", "begun.pth"):
        failed(
            execute("--checkpoint_path", tmp_path / given), str(tmp_path / "begun" / "best.pth"), "no finished epoch"
        )


def test_missing_data(execute, run, tmp_path):
    result = execute("--checkpoint_path", run, data_dir=tmp_path, dataset="cub200")
    failed(result, "validation_cub200_256resized_img.npy: no such file", "python pre_process/pre_process_cub200.py")


def test_no_checkpoint(execute, tmp_path):
    (tmp_path / "text.pth").write_text("no checkpoint")
    failed(execute("--checkpoint_path", tmp_path / "text.pth"), str(tmp_path / "text.pth"))


def test_a_network_that_diverged(execute, tmp_path, run):
    saved = torch.load(run / "last.pth")
    saved["model"]["base_model.conv1.weight"] *= 1e38
    torch.save(saved, tmp_path / "huge.pth")
    failed(execute("--checkpoint_path", tmp_path / "huge.pth"), "features are not finite", code=3)
    saved["model"]["feat_ext.0.weight"] += torch.nan
    torch.save(saved, tmp_path / "nan.pth")
    failed(execute("--checkpoint_path", tmp_path / "nan.pth"), str(tmp_path / "nan.pth"), "feat_ext.0.weight holds NaN")


@pytest.mark.parametrize("option", ["--json", "--save_embeddings"])
def test_files_that_cannot_be_written(execute, run, tmp_path, option):
    target = tmp_path / "none" / "out"
    failed(execute("--checkpoint_path", run, option, target), str(target), "folder does not exist")
    assert not list(tmp_path.iterdir())


def test_the_command_line(run, data, tmp_path):
    command = [sys.executable, "test.py", "--dataset", "tiny", "--data_dir", data, "--checkpoint_path", f"{run}.pth"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == 6 and lines[3].startswith("R@1 ") and lines[5].startswith("NMI by 4 clusters, ")
