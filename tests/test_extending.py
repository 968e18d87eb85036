"""The examples of docs/extending.md run as they stand there."""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from raw_folders import save_photo
from scripts import ROOT
from synthetic import write_dataset
from torch.nn import functional as F
from training import assert_same, resumed, stopped, trained

from methods import METHODS
from models import BACKBONES, build_model, load_checkpoint
from pre_process.writer import read_image
from utils.schedules import SCHEDULES

pytestmark = pytest.mark.usefixtures("one_thread", "registries")
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
MOST_LINES = 30


def example(title: str) -> str:
    """Return the code below the marker of that title."""
    (code,) = re.findall(rf"<!-- {title} -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)
    return code


def run_example(title: str) -> dict:
    """Run an example as an import would, and return its names."""
    names = {"__name__": "example"}
    exec(compile(example(title), title, "exec"), names)
    return names


def recipe_of(folder: Path, method: str) -> Path:
    """Write a recipe that names a method and nothing else."""
    path = folder / f"{method}.json"
    path.write_text(json.dumps({"method": method}))
    return path


@pytest.fixture
def registries() -> Iterator[None]:
    """Put back what the examples add to."""
    with patch.dict(METHODS), patch.dict(BACKBONES), patch.dict(SCHEDULES):
        yield


@pytest.fixture
def data(tmp_path) -> Path:
    """A tiny data set."""
    return write_dataset(tmp_path / "data")


@pytest.mark.parametrize("title", ["recipe", "loss", "method", "schedule", "backbone", "data set"])
def test_an_example_is_short(title):
    lines = [line for line in example(title).splitlines() if line.strip()]
    assert len(lines) < MOST_LINES
    assert max(map(len, lines)) <= 100


def test_the_recipe(tmp_path, data):
    recipe = tmp_path / "my_recipe.json"
    recipe.write_text(example("recipe"))
    settings = {"recipe": recipe, "n_cluster": 4, "lr": None}
    config = trained(data, tmp_path, **settings).saved["config"]
    assert config["n_cluster"] == 4  # of the command line
    assert (config["lr"], config["schedule"], config["warmup_epochs"]) == (1e-4, "cosine", 0.5)


@pytest.mark.parametrize("title, method", [("loss", "triplet"), ("method", "memory")])
def test_a_method_resumes_to_the_same_bits(tmp_path, data, title, method):
    run_example(title)
    settings = {"recipe": recipe_of(tmp_path, method), "n_epoch": 3, "nmi": "off"}
    whole = trained(data, tmp_path / "whole", **settings)
    assert_same(whole, resumed(stopped(data, tmp_path / "stopped", 5, **settings)))
    assert whole.rows[-1]["loss"] < whole.rows[0]["loss"]


def test_the_triplet_loss_equals_a_loop():
    angles = torch.tensor([0.0, 1.0, 2.5, 0.5, 0.9, 2.6], dtype=torch.float64)
    rows = torch.stack([angles.cos(), angles.sin()], 1)
    images = torch.tensor([3, 8, 5, 3, 8, 5])
    loss = run_example("loss")["triplet_loss"](rows, images, 0.2)

    terms = []
    for i in range(6):
        distances = [2 - 2 * math.cos(angles[i] - angles[j]) for j in range(6)]
        view = distances[(i + 3) % 6]
        nearest = min(d for d, image in zip(distances, images, strict=True) if image != images[i])
        terms.append(max(0, view - nearest + 0.2))
    assert loss.item() == pytest.approx(np.mean(terms))
    assert 0 < np.count_nonzero(terms) < 6


def test_the_memory_follows_the_first_views():
    model = build_model("resnet_small", n_cluster=4, low_dim=16)
    options = argparse.Namespace(precision="fp32")
    method = run_example("method")["Memory"](model, options, n_images=5).eval()
    views = torch.randn(4, 3, 28, 28)
    index = torch.tensor([3, 0])
    before = method.memory.clone()
    method(views, index)
    assert torch.equal(method.memory, before)
    method.end_step()
    embeddings = model(views[:2])[0]
    before[index] = F.normalize(before[index] + embeddings, dim=1)
    torch.testing.assert_close(method.memory, before)


def test_the_schedule_holds_when_resumed(tmp_path, data):
    run_example("schedule")
    settings = {"lr": 0.3, "n_epoch": 3, "n_cluster": 4, "nmi": "off", "schedule": "late_drop"}
    whole = trained(data, tmp_path / "whole", **settings)
    assert [row["lr"] for row in whole.rows] == pytest.approx([0.3, 0.3, 0.03])
    assert_same(whole, resumed(stopped(data, tmp_path / "stopped", 8, **settings)))


def test_the_backbone(tmp_path, data):
    run_example("backbone")
    run = trained(data, tmp_path, backbone="three_layers")
    assert math.isfinite(run.rows[0]["loss"])
    model, info = load_checkpoint(run.run / "last.pth")
    assert info["backbone"] == model.backbone_name == "three_layers"


def test_the_data_set(tmp_path):
    """The example runs as a script, since workers import it by its name."""
    for number, name in enumerate(("ant", "bee", "cat", "dog")):
        for place in range(2):
            photo = tmp_path / "data" / "pairs" / name / f"{place}.png"
            save_photo(photo, seed=10 * number + place)
    script = tmp_path / "my_data_set.py"
    script.write_text(example("data set"))
    options = [f"--data_dir={tmp_path / 'data'}", "--image_size=16", "--workers=2"]
    command = [sys.executable, str(script), *options]
    result = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")

    folder = tmp_path / "data" / "pairs"
    images, labels, test_labels = (
        np.load(folder / f"{half}_pairs_16resized_{content}.npy")
        for half, content in (("training", "img"), ("training", "label"), ("validation", "label"))
    )
    assert labels.tolist() == [1, 1, 1, 1, 2, 2, 2, 2]
    assert test_labels.tolist() == [3, 3, 3, 3, 4, 4, 4, 4]
    picture = read_image(folder / "ant" / "1.png", 32)
    assert np.array_equal(images[2], picture[::2, :16])
    assert np.array_equal(images[3], picture[::2, 16:])
