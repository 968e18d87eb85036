"""--val_classes: training classes that are held out, unseen in training, and choose the epoch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import failed, run_in_process
from synthetic import shapes, write_dataset, write_split
from training import assert_same, execute, options, resumed, same_weights, trained

import train
from datasets.arrays import load_split

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {"recipe": "kmeans", "positives": "nn", "n_cluster": 4, "n_epoch": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Six training classes, with a gap between their numbers."""
    folder = write_dataset(tmp_path_factory.mktemp("data"))
    images, labels = shapes(36, range(1, 7), 32, seed=0)
    write_split(folder, "tiny", "training", images, np.where(labels == 6, 40, labels))
    return folder


def test_it_is_the_training_on_the_rest_alone(data, tmp_path):
    """Bit for bit: a data set that never had the held-out classes gives the same run."""
    rest, held = load_split(data, "tiny", "training").hold_out(2)
    assert set(held.labels) == {5, 40}
    other = tmp_path / "other"
    write_split(other, "tiny", "training", rest.images[rest.rows], rest.labels)
    write_split(other, "tiny", "validation", held.images[held.rows], held.labels)
    alone = trained(other, tmp_path / "alone", **SETTINGS)
    run = trained(data, tmp_path, val_classes=2, **SETTINGS)
    assert same_weights(run, alone)
    for row, bare in zip(run.rows, alone.rows, strict=True):
        for name in ("recall@1", "recall@8", "nmi", "nmi_protocol"):
            assert row[f"val_{name}"] == bare[name]
        assert (row["loss"], row["cluster_sizes"]) == (bare["loss"], bare["cluster_sizes"])
        assert "recall@1" in row
    part = trained(data, tmp_path / "part", val_classes=2, **SETTINGS | {"n_epoch": 1})
    assert_same(resumed(part.run, "--n_epoch=2"), run)


def test_the_best_epoch_is_chosen_on_them(data, tmp_path, monkeypatch):
    """The test half would choose another."""
    shares = iter([0.3, 0.2, 0.9, 0.5, 0.1, 0.8, 0.2, 0.6])  # of each epoch: test, held-out
    left_out = {"nmi_left_out": "not asked for"}
    monkeypatch.setattr(train, "score", lambda *_, **__: {"recall@1": next(shares)} | left_out)
    run = trained(data, tmp_path, val_classes=2, n_epoch=4)
    assert [row["best"] for row in run.rows] == [True, True, True, False]
    assert torch.load(run.run / "best.pth")["epoch"] == 3
    line = "best, chosen on held-out training classes epoch (3): R@1 10.00  held-out R@1 80.00"
    assert line in run.out
    assert "ON TEST" not in run.out
    at = ["--dataset=tiny", f"--data_dir={data}", "--device=cpu"]
    assert run_in_process("test.py", *at, f"--checkpoint_path={run.run}").code == 0


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"val_classes": 5}, "the training half has 6 classes; hold out at least 2 and leave at"),
        ({"val_classes": 1}, "hold out at least 2"),
        ({"val_classes": 2, "batch_size": 25}, "batch_size 25: there are 24 training images"),
    ],
)
def test_refused(data, tmp_path, changed, words):
    failed(execute(*options(data, tmp_path / "runs", **changed)), words)
    assert not (tmp_path / "runs").exists()


def test_without_training_labels_there_are_no_classes(tmp_path):
    write_dataset(tmp_path)
    images, labels = shapes(24, range(1, 5), 32, 0)
    write_split(tmp_path, "tiny", "training", images, np.full_like(labels, -1))
    message = "has no labels, so no classes can be held out"
    failed(execute(*options(tmp_path, tmp_path / "runs", val_classes=2)), message)
    result = execute(*options(tmp_path, tmp_path / "runs", recipe="proxy_anchor"))
    failed(result, "has no labels, which this method goes by")
