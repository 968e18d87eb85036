"""--val_classes: classes of the training half are held out, seen by nothing in training, and choose the epoch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import failed, run_in_process
from synthetic import shapes, write_dataset, write_split
from training import execute, options, outcome, same_weights, trained

import train as script
from datasets import EpochPlan, center_crops, load_split
from utils.evaluation import score

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Six training classes, their images interleaved; the test labels are by chance, to score in the middle."""
    folder = write_dataset(tmp_path_factory.mktemp("data"))
    images, labels = shapes(36, range(1, 7), 32, seed=0)
    write_split(folder, "tiny", "training", images, np.where(labels == 6, 40, labels))  # gaps between the numbers
    images, labels = shapes(24, range(5, 9), 32, seed=1)
    write_split(folder, "tiny", "validation", images, np.random.default_rng(2).permutation(labels))
    return folder


def test_the_last_classes_by_number_are_held_out_and_nothing_else(data):
    whole = load_split(data, "tiny", "training")
    rest, held = whole.hold_out(2)
    assert set(held.labels) == {5, 40} and set(rest.labels) == {1, 2, 3, 4}
    assert (len(rest), len(held)) == (24, 12)
    for part in (rest, held):
        assert np.array_equal(part.labels, whole.labels[part.rows]) and part.images is whole.images
        crops = torch.cat(list(center_crops(part.images, 5, 0, rows=part.rows)))
        assert np.array_equal(crops.numpy(), np.asarray(whole.images)[part.rows][:, 2:30, 2:30])
        shared = [torch.cat(list(center_crops(part.images, 3, 0, share=(r, 2), rows=part.rows))) for r in (0, 1)]
        assert sum(map(len, shared)) == len(part)


def test_training_never_sees_a_held_out_image(data):
    rest, _ = load_split(data, "tiny", "training").hold_out(2)
    positives = np.roll(np.arange(24), 1)
    plan = EpochPlan(24, 6, 32, 3, 1, positives, rows=rest.rows)
    seen = np.concatenate([plan.views(batch).index for batch in range(len(plan))])
    assert set(seen) == set(rest.rows) and len(seen) == 48
    alone = EpochPlan(24, 6, 32, 3, 1, positives)
    assert np.array_equal(plan.views(2).index, rest.rows[alone.views(2).index])
    assert np.array_equal(plan.images(2), alone.images(2))  # numbers of pseudo-labels, not of stored rows


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """Mining, clustering and training on the four classes that remain."""
    return trained(data, tmp_path_factory.mktemp("run"), val_classes=2, n_epoch=3, positives="nn",
                   pseudo_labels="kmeans")  # fmt: skip


def test_it_is_the_training_on_the_rest_alone(data, tmp_path, run):
    """Bit for bit the run on a data set that never had the held-out classes."""
    rest, held = load_split(data, "tiny", "training").hold_out(2)
    other = tmp_path / "other"
    write_split(other, "tiny", "training", np.asarray(rest.images)[rest.rows], rest.labels)
    write_split(other, "tiny", "validation", np.asarray(held.images)[held.rows], held.labels)
    alone = trained(other, tmp_path, n_epoch=3, positives="nn", pseudo_labels="kmeans")
    assert same_weights(run, alone)
    for row, bare in zip(run.rows, alone.rows, strict=True):  # whose test half is what was held out here
        assert {name: row[f"val_{name}"] for name in ("recall@1", "recall@8", "nmi", "nmi_protocol")} == {
            name: bare[name] for name in ("recall@1", "recall@8", "nmi", "nmi_protocol")
        }
        assert row["loss"] == bare["loss"] and row["cluster_sizes"] == bare["cluster_sizes"] and "recall@1" in row
    assert len(run.saved["pseudo_labels"]) == 24 and run.saved["config"]["val_classes"] == 2


def test_the_best_epoch_is_chosen_on_them(data, tmp_path, monkeypatch, capsys):
    """The test half, scored second to none, would choose another."""
    found = iter([0.3, 0.2, 0.9, 0.5, 0.1, 0.8, 0.2, 0.6])  # of each epoch: test, held-out

    def fake(*_, **__):
        share = next(found)
        return {**{f"recall@{k}": share for k in (1, 2, 4, 8)}, "nmi": share, "nmi_protocol": "by hand"}

    monkeypatch.setattr("utils.evaluation.score", fake)
    done = trained(data, tmp_path, val_classes=2, n_epoch=4)
    assert [row["best"] for row in done.rows] == [True, True, True, False]
    assert torch.load(done.run / "best.pth")["epoch"] == 3
    text = capsys.readouterr().out
    assert "best epoch, chosen on held-out training classes (3): R@1 10.00  NMI 10.00  held-out R@1 80.00" in text
    assert "ON TEST" not in text and "12 images of 2 classes of the training half held out" in text
    monkeypatch.undo()
    result = run_in_process("test.py", "--dataset=tiny", f"--data_dir={data}", f"--checkpoint_path={done.run}")
    assert "best on held-out training classes (not on test; last.pth is the last)" in result.out


def test_stopped_and_resumed_it_is_the_same(data, tmp_path, run):
    trained(data, tmp_path, val_classes=2, n_epoch=1, positives="nn", pseudo_labels="kmeans")
    assert script.main(["--resume", str(tmp_path / "run"), "--n_epoch=3", "--interval=1"]) == 0
    resumed = outcome(tmp_path / "run")
    assert resumed.rows == run.rows and same_weights(resumed, run)
    failed(execute("--resume", tmp_path / "run", "--val_classes=3"), "--val_classes was 2")


def test_interval(data, tmp_path):
    rows = trained(data, tmp_path, val_classes=2, n_epoch=3, interval=2).rows
    assert ["val_recall@1" in row for row in rows] == ["best" in row for row in rows] == [False, True, True]


def test_two_processes_score_the_same(data, tmp_path, forks, run):
    argv = options(data, tmp_path, val_classes=2, n_epoch=1, positives="nn", pseudo_labels="kmeans")
    done = forks.run(*argv, processes=2)
    assert done.code == 0, done.err
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert row["loss"] == pytest.approx(run.rows[0]["loss"], rel=1e-3)
    assert row["val_nmi"] == pytest.approx(run.rows[0]["val_nmi"], abs=0.2) and "held-out R@1" in done.out


def test_without_test_labels_the_epoch_is_chosen_all_the_same(data, tmp_path):
    images, labels = shapes(24, range(5, 9), 32, seed=1)
    folder = tmp_path / "data"
    write_split(folder, "tiny", "training", *shapes(24, range(1, 5), 32, 0))
    write_split(folder, "tiny", "validation", images, np.full_like(labels, -1))
    done = trained(folder, tmp_path, val_classes=2)
    assert "recall@1" not in done.rows[0] and done.rows[0]["best"] and (done.run / "best.pth").exists()


@pytest.mark.parametrize("changed, words", [
    ({"val_classes": 5}, "the training half has 6 classes; hold out at least 2 and leave at least 2"),
    ({"val_classes": 1}, "hold out at least 2"),
    ({"val_classes": -1}, "must be at least 0"),
    ({"val_classes": 2, "batch_size": 25}, "holds 24 images only"),
    ({"val_classes": 2, "n_cluster": 25}, "more clusters than the 24 training images"),
])  # fmt: skip
def test_refused(data, tmp_path, changed, words):
    failed(execute(*options(data, tmp_path / "runs", **changed)), words)
    assert not (tmp_path / "runs").exists()


def test_refused_without_labels(tmp_path):
    write_dataset(tmp_path)
    images, labels = shapes(24, range(1, 5), 32, 0)
    write_split(tmp_path, "tiny", "training", images, np.full_like(labels, -1))
    failed(execute(*options(tmp_path, tmp_path / "runs", val_classes=2)), "holds no labels; leave the option out")


def test_the_scores_are_those_of_the_network_that_is_saved(data, run):
    from models import load_checkpoint
    from utils.features import extract_features

    _, held = load_split(data, "tiny", "training").hold_out(2)
    model, _ = load_checkpoint(run.run / "last.pth")
    _, embeddings = extract_features(model, center_crops(held.images, 100, 0, rows=held.rows))
    assert score(embeddings, held.labels)["recall@1"] == run.rows[-1]["val_recall@1"]
