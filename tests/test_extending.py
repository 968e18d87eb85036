"""The examples of docs/extending.md, run as they stand there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from raw_folders import save_photo
from synthetic import write_dataset
from training import options, outcome

import train
from losses import METRIC_LOSSES
from models import BACKBONES, load_checkpoint
from utils import arguments

pytestmark = pytest.mark.usefixtures("one_thread")
LINES = 30


def example(root: Path, name: str) -> str:
    """The code below the marker of that name."""
    page = (root / "docs" / "extending.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"<!-- {name} -->\n```python\n(.*?)```", page, re.DOTALL)
    return found


@pytest.fixture
def tables_as_before(monkeypatch):
    """What the examples add to is put back."""
    before = [(table, dict(table)) for table in (BACKBONES, METRIC_LOSSES)]
    monkeypatch.setattr(arguments, "BACKBONE_NAMES", arguments.BACKBONE_NAMES)
    monkeypatch.setattr(train, "METRIC_LOSS_NAMES", train.METRIC_LOSS_NAMES)
    yield
    for table, content in before:
        table.clear()
        table.update(content)


@pytest.mark.parametrize("name", ["backbone", "loss", "data set"])
def test_an_example_is_short(root, name):
    lines = example(root, name).splitlines()
    assert len([line for line in lines if line.strip()]) < LINES and max(map(len, lines)) <= 125


@pytest.mark.parametrize(
    "name, option", [("backbone", {"backbone": "three_layers"}), ("loss", {"metric_loss": "triplet"})]
)
def test_an_example_trains(root, tmp_path, tables_as_before, name, option):
    data = write_dataset(tmp_path / "data")
    exec(compile(example(root, name), name, "exec"), {"__name__": "example"})
    assert train.main(options(data, tmp_path, **option)) == 0
    done = outcome(tmp_path / "run")
    assert np.isfinite(done.rows[0]["loss"]) and (name == "backbone" or done.rows[0]["metric_loss"] >= 0)
    model, info = load_checkpoint(tmp_path / "run" / "last.pth")
    assert info["backbone"] == option.get("backbone", "resnet_small") == model.backbone_name
    assert info["config"]["metric_loss"] == option.get("metric_loss", "center")


def test_the_triplet_loss_by_hand(root, tables_as_before):
    import torch

    exec(compile(example(root, "loss"), "loss", "exec"), {"__name__": "example"})
    angles = torch.tensor([0.0, 1.0, 0.5, 1.0], dtype=torch.float64)  # of two images, first views then second ones
    rows = torch.stack([angles.cos(), angles.sin()], 1)
    loss = METRIC_LOSSES["triplet"](rows, None, torch.tensor([3, 8, 3, 8]), 0.1, 1.0, 1)

    def squared(a: float, b: float) -> float:
        return 2 - 2 * np.cos(a - b)

    expected = [max(0, squared(*pair) - squared(*other) + 0.1) for pair, other in
                (((0, 0.5), (0, 1)), ((1, 1), (1, 0.5)), ((0.5, 0), (0.5, 1)), ((1, 1), (1, 0.5)))]  # fmt: skip
    assert loss.item() == pytest.approx(np.mean(expected)) and loss > 0


def test_the_data_set(root, tmp_path):
    """As a script, as the page says: it is sent to other processes by its name."""
    for number, name in enumerate(("ant", "bee", "cat", "dog")):
        for i in range(2):
            save_photo(tmp_path / "data" / "pairs" / name / f"{i}.png", seed=10 * number + i)
    script = tmp_path / "my_data_set.py"
    script.write_text(example(root, "data set"))
    command = [sys.executable, str(script), "--image_size=16", f"--data_dir={tmp_path / 'data'}"]
    done = subprocess.run(command, env={"PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done
    folder = tmp_path / "data" / "pairs"
    images = np.load(folder / "training_pairs_16resized_img.npy")
    assert images.shape == (8, 16, 16, 3)
    assert np.load(folder / "training_pairs_16resized_label.npy").tolist() == [1, 1, 1, 1, 2, 2, 2, 2]
    assert np.load(folder / "validation_pairs_16resized_label.npy").tolist() == [3, 3, 3, 3, 4, 4, 4, 4]
    from pre_process.image_arrays import read_image

    picture = read_image(folder / "ant" / "1.png", 32)
    assert np.array_equal(images[2], picture[::2, :16]) and np.array_equal(images[3], picture[::2, 16:])
