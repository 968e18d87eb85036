"""Runs of train.py that take a second: their options and their outcome."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from scripts import Outcome, run_in_process

import train as script


def options(data: Path, folder: Path, **changed: object) -> list[str]:
    """A run of seconds in `folder`/run, with some options changed."""
    settings = {
        "data_dir": data, "dataset": "tiny", "backbone": "resnet_small", "weights": "none", "device": "cpu",
        "n_epoch": 1, "batch_size": 8, "n_cluster": 4, "low_dim": 16, "lr": 0.05, "seed": 3,
        "checkpoint_dir": folder, "model_name": "run",
    } | changed  # fmt: skip
    return [f"--{name}={value}" for name, value in settings.items()]


def execute(*argv: object) -> Outcome:
    return run_in_process("train.py", *argv)


def trained(data: Path, folder: Path, *more: str, **changed: object) -> SimpleNamespace:
    """The outcome of a run: its metrics without the seconds, the content of its last checkpoint, its folder."""
    assert script.main([*options(data, folder, **changed), *more]) == 0
    return outcome(Path(changed.get("checkpoint_dir", folder)) / "run")


def outcome(run: Path) -> SimpleNamespace:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in row.items() if k not in {"seconds", "images_per_second"}} for row in rows]
    return SimpleNamespace(rows=timeless, full_rows=rows, saved=torch.load(run / "last.pth"), run=run)


def same_weights(one: SimpleNamespace, other: SimpleNamespace) -> bool:
    a, b = one.saved["model"], other.saved["model"]
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
