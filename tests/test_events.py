"""Event files: TensorBoard's own reader finds in them what metrics.jsonl says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from synthetic import write_dataset

import train
from utils.errors import UserError
from utils.events import EventFile
from utils.runs import EVENTS, METRICS, scalars

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
pytestmark = pytest.mark.usefixtures("one_thread")
Points = dict[str, list[tuple[int, float]]]


def read_events(run: Path) -> Points:
    reader = accumulator.EventAccumulator(str(run), size_guidance={"scalars": 0})
    reader.Reload()
    return {tag: [(p.step, p.value) for p in reader.Scalars(tag)] for tag in reader.scalars.Keys()}


def points_of(rows: list[dict]) -> Points:
    points: Points = {}
    for row in rows:
        for name, value in scalars(row).items():
            points.setdefault(name, []).append((row["epoch"], float(np.float32(value))))
    return points


def row_of(epoch: int, loss: float) -> dict:
    return {"epoch": epoch, "loss": loss, "best": True, "seconds": {"train": 2.5}, "nmi": "text"}


def test_scalars_are_the_finite_numbers():
    row = row_of(3, 0.25) | {"rate": float("nan"), "sizes": [1, 2]}
    assert scalars(row) == {"loss": 0.25, "seconds/train": 2.5}


def test_what_a_killed_run_wrote_beyond_its_checkpoint_is_hidden(tmp_path):
    events = EventFile(tmp_path, epochs_done=0)
    for epoch in (1, 2, 3):
        events.add(row_of(epoch, loss=10 + epoch))
    resumed = EventFile(tmp_path, epochs_done=1)
    rows = [row_of(1, loss=11), row_of(2, loss=22), row_of(3, loss=23)]
    for row in rows[1:]:
        resumed.add(row)
    assert read_events(tmp_path) == points_of(rows)


def test_the_events_of_a_run_are_its_metrics(tmp_path):
    options = {"data_dir": write_dataset(tmp_path / "data"), "dataset": "tiny", "device": "cpu"}
    options |= {"backbone": "resnet_small", "weights": "none", "batch_size": 8, "n_cluster": 4}
    options |= {"checkpoint_dir": tmp_path, "model_name": "run", "n_epoch": 1}
    command = [f"--{name}={value}" for name, value in options.items()]
    assert train.main([*command, "--tensorboard"]) == 0
    run = tmp_path / "run"
    assert train.main([f"--resume={run}", "--n_epoch=2", f"--data_dir={tmp_path / 'data'}"]) == 0
    rows = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    points = read_events(run)
    assert points == points_of(rows)
    assert {"seconds/train", "views_per_second", "nmi", "rim_loss"} <= points.keys()
    assert train.main([*command, "--overwrite"]) == 0
    assert list(run.glob(EVENTS)) == []  # they would tell of another run


def test_a_missing_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(UserError, match="pip install tensorboard"):
        EventFile(tmp_path, 0)
