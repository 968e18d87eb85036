"""Runs of train.py that take a moment: their options, their outcome, and how to disturb them."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import pytest
import torch
from scripts import Outcome, run_in_process

from utils.runs import State


class Run:
    """What a run left in its folder.

    Attributes:
        rows: its metrics without the times, `full_rows` with them.
        saved: its last checkpoint, read when it is first asked for.
        out: what it printed.
    """

    def __init__(self, folder: Path, out: str = "") -> None:
        self.run = folder
        self.out = out
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        self.full_rows = [json.loads(line) for line in lines]
        times = {"seconds", "views_per_second"}
        self.rows = [{k: v for k, v in row.items() if k not in times} for row in self.full_rows]

    @cached_property
    def saved(self) -> dict:
        return torch.load(self.run / "last.pth")


def options(data: Path, folder: Path, **changed: object) -> list[str]:
    """Return the options of a run in `folder`/run, with some of them changed (None: left out)."""
    settings = {"backbone": "resnet_small", "weights": "none", "low_dim": 16, "batch_size": 8}
    settings |= {"dataset": "tiny", "data_dir": data, "device": "cpu", "workers": 0, "seed": 3}
    settings |= {"n_epoch": 1, "lr": 0.05, "checkpoint_dir": folder, "model_name": "run"} | changed
    return [f"--{name}={value}" for name, value in settings.items() if value is not None]


def execute(*argv: object) -> Outcome:
    """Run train.py in this process."""
    return run_in_process("train.py", *argv)


def trained(data: Path, folder: Path, *more: str, **changed: object) -> Run:
    """Train, and return the outcome."""
    result = execute(*options(data, folder, **changed), *more)
    assert (result.code, result.err) == (0, ""), result
    return Run(folder / "run", result.out)


def resumed(run: Path, *more: object) -> Run:
    """Resume a run to its end, and return the outcome."""
    result = execute("--resume", run, *more)
    assert (result.code, result.err) == (0, ""), result
    return Run(run, result.out)


def assert_same(run: Run, other: Run) -> None:
    """Compare two runs bit for bit: metrics, weights, buffers, moments, random generator."""
    assert run.rows == other.rows
    pairs = [(run.saved[name], other.saved[name]) for name in ("model", "method", "rng")]
    pairs.append([done.saved["optimizer"]["state"] for done in (run, other)])  # moments
    for states in pairs:
        torch.testing.assert_close(*states, rtol=0, atol=0)


def same_weights(run: Run, other: Run) -> bool:
    """Tell whether two runs ended with the same weights."""
    weights = [done.saved["model"] for done in (run, other)]
    return all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@contextmanager
def before_call(owner: object, name: str, number: int, action: Callable) -> Iterator[list]:
    """Do `action` before a call of a function, counted from 1; gives a list that grows by calls."""
    calls = []
    function = getattr(owner, name)

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(name)
        if len(calls) == number:
            action()
        return function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, counted)
        yield calls


def stopped(data: Path, folder: Path, step: int, **changed: object) -> Path:
    """Train until a signal arrives in a step, counted from 1, and return the run's folder."""
    with before_call(State, "end_step", step, lambda: signal.raise_signal(signal.SIGTERM)):
        assert execute(*options(data, folder, **changed)).code == 128 + signal.SIGTERM
    return folder / "run"
