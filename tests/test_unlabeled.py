"""A folder of images without labels: it trains and embeds, and nothing is scored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from raw_folders import save_photo
from scripts import Outcome, run_in_process

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def data(tmp_path) -> Path:
    """The --data_dir of 16 photos without labels, 14 of them to train on."""
    for number in range(16):
        save_photo(tmp_path / "photos" / f"{number:02d}.png", number)
    options = ("--images", tmp_path / "photos", "--name", "mine", "--data_dir", tmp_path)
    small = ("--image_size", 16, "--workers", 1)
    assert run_in_process("pre_process_folder.py", *options, *small).code == 0
    return tmp_path


def train(data: Path, n_epoch: int) -> Outcome:
    network = ("--device", "cpu", "--backbone", "resnet_small", "--weights", "none")
    sizes = ("--batch_size", 4, "--n_cluster", 4, "--low_dim", 16, "--n_epoch", n_epoch)
    run = ("--data_dir", data, "--dataset", "mine", "--checkpoint_dir", data, "--model_name", "run")
    return run_in_process("train.py", *network, *sizes, *run)


def test_training_says_that_nothing_is_scored(data):
    done = train(data, 2)
    assert done.code == 0, done
    assert "not scored, as the data set has no labels" in done.out
    lines = (data / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 2
    assert not any("recall@1" in row for row in rows)
    assert [path.name for path in (data / "run").glob("*.pth")] == ["last.pth"]
    resumed = run_in_process("train.py", "--resume", data / "run", "--n_epoch", 3)
    assert resumed.code == 0
    assert "epoch   3" in resumed.out


def test_an_untrained_network(data):
    assert train(data, 0).code == 0
    assert torch.load(data / "run" / "last.pth")["epoch"] == 0


def test_the_test_script_saves_embeddings(data):
    assert train(data, 1).code == 0
    options = ("--dataset", "mine", "--data_dir", data, "--device", "cpu")
    options += ("--checkpoint_path", data / "run")
    refused = run_in_process("test.py", *options)
    assert refused.code == 2
    assert "--save_embeddings" in refused.err
    done = run_in_process("test.py", *options, "--save_embeddings", data / "e.npy")
    assert (done.code, done.err) == (0, "")
    assert "labels" in done.out
    assert np.load(data / "e.npy").shape == (2, 16)
