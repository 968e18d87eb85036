"""--tensorboard: what TensorBoard shows is what metrics.jsonl says, after kills and resumes too."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from scripts import failed
from synthetic import write_dataset
from training import execute, options

import train as script
from utils.runs import EVENTS, scalars

pytest.importorskip("tensorboard", reason="needs tensorboard (requirements-dev.txt)")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


def shown(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Every point that TensorBoard's own reader finds in the folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(run), size_guidance={"scalars": 0})
    reader.Reload()
    return {tag: [(point.step, point.value) for point in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def said(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Every number of metrics.jsonl, as float32."""
    points = {}
    for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        for name, value in scalars(row).items():
            points.setdefault(name, []).append((row["epoch"], float(np.float32(value))))
    return points


def test_the_points_are_the_metrics_after_kills_and_resumes(data, tmp_path, forks, monkeypatch):
    run = tmp_path / "run"
    argv = options(data, tmp_path, n_epoch=2)
    # killed when the checkpoint of epoch 2 is there and its point is not, then while the file is made anew
    before = "import os, utils.events as e; add = e.EventFile.add; calls = []\n"
    kill = "e.EventFile.add = lambda *a: (calls.append(1), os.kill(os.getpid(), 9) if len(calls) == {} else add(*a))\n"
    assert forks.run(*argv, "--tensorboard", before=before + kill.format(2)).code == -signal.SIGKILL
    assert len(shown(run)["loss"]) == 1 and len(said(run)["loss"]) == 2
    resume = ("--resume", run, f"--data_dir={data}")
    assert forks.run(*resume, before=before + kill.format(1)).code == -signal.SIGKILL
    assert forks.run(*resume, "--n_epoch", 4).code == 0
    assert shown(run) == said(run) and [step for step, _ in shown(run)["recall@1"]] == [1, 2, 3, 4]
    assert {"seconds/train", "images_per_second", "nmi", "rim_loss"} <= shown(run).keys()
    assert len(list(run.glob(EVENTS))) == 1
    assert execute(*options(data, tmp_path, n_epoch=1), "--overwrite").code == 0
    assert list(run.glob(EVENTS)) == []  # they would tell of another run


def test_of_many_processes_the_first_writes(data, tmp_path, forks):
    done = forks.run(*options(data, tmp_path), "--tensorboard", processes=2)
    assert done.code == 0, done.err
    assert len(list((tmp_path / "run").glob("events*"))) == 1 and shown(tmp_path / "run") == said(tmp_path / "run")


def test_a_missing_package_is_told_before_training(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setattr(script, "train", None)  # would raise
    failed(execute(*options(data, tmp_path), "--tensorboard"), "pip install tensorboard")
    assert not (tmp_path / "run").exists()
