"""The folder of a run: its options, a line of metrics an epoch, its checkpoints, its log."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import DivergedError, UserError
from utils.files import FolderLock, check_writable, disk_faults, write_text, written_whole
from utils.torch_files import read_torch_file, write_torch_file

CONFIG = "config.json"
METRICS = "metrics.jsonl"
LAST = "last.pth"
BEST = "best.pth"
REPORT = "report.html"
EVENTS = "events.out.tfevents.*"
CHOSEN_ON = {
    "recall@1": "CHOSEN ON TEST",
    "val_recall@1": "chosen on held-out training classes",
}


@dataclass
class State:
    """Where a run stands, beside its weights, optimizer and random generators.

    Attributes:
        epoch: epochs done.
        is_begun: whether the method has begun the epoch under way.
        step: steps done in that epoch.
        sums: sum of each loss over these steps.
        logged: what the method reported at the start of that epoch.
        seconds: spent on that epoch so far, by part.
        rows: metrics of the epochs done.
    """

    epoch: int = 0
    is_begun: bool = False
    step: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    logged: dict = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count the time of a block for a part of the epoch under way."""
        started = time.perf_counter()
        yield
        self.count_time(part, started)

    def count_time(self, part: str, started: float) -> float:
        """Count the time since `started` for a part of the epoch; returns the time now."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - started
        return now

    def end_step(self, losses: dict[str, Tensor]) -> None:
        """Count a step as done, with its losses."""
        self.step += 1
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().double()

    def means(self) -> dict[str, float]:
        """Return the mean of each loss over the steps of the epoch under way."""
        return {
            name if name == "loss" else f"{name}_loss": float(total) / self.step
            for name, total in self.sums.items()
        }

    def end_epoch(self, row: dict) -> None:
        """Count an epoch as done, with its metrics.

        It is marked as best if its R@1 is higher than that of all earlier epochs: on the held-out
        classes, or without any on the test half.
        """
        score = criterion([row])
        if score in row:
            row["best"] = row[score] > max(
                (r[score] for r in self.rows if score in r), default=-1.0
            )
        self.rows.append(row)
        self.epoch = row["epoch"]
        self.is_begun = False
        self.step = 0
        self.sums = {}
        self.logged = {}
        self.seconds = {}


class RunFolder:
    """The files of a run. One process at a time holds the folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: FolderLock | None = None

    def check_free(self, may_hold_run: bool) -> None:
        """Raise UserError if it cannot be written in, or holds a run already, unless it may."""
        check_writable(self.path, "choose another place for the run")
        if any((self.path / name).exists() for name in (LAST, BEST)) and not may_hold_run:
            raise UserError(
                f"{self.path}: holds a run already; resume it, choose another name for the new "
                "one, or overwrite it"
            )

    def open(self, config: dict, rows: list[dict], overwrite: bool, resume: bool) -> None:
        """Make and lock the folder, remove the files of an earlier run, write options and metrics.

        Raises UserError if the folder holds a run already, unless `overwrite` or `resume`.
        """
        self.check_free(overwrite or resume)
        earlier = (LAST, BEST, METRICS, CONFIG, REPORT)
        with disk_faults(self.path, "choose another place for the run"):
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock()
            if not resume:
                for path in [*map(self.path.joinpath, earlier), *self.path.glob(EVENTS)]:
                    path.unlink(missing_ok=True)
            for path in self.path.glob(".*.part"):  # of a process that was killed
                path.unlink()
        self._write_text(CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
        self._write_metrics(rows)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock:
            self._lock.release()

    def lock(self) -> None:
        """Keep other processes out until the end. Raises UserError if one holds the folder."""
        if self._lock is None:
            fault = "another process is training in this folder; wait for it, or choose another"
            self._lock = FolderLock(self.path, f"{self.path}: {fault} name for the run")

    def save(self, parts: dict[str, Any], state: State, facts: dict, best: bool) -> None:
        """Write last.pth, for the best epoch so far best.pth too, then the metrics of all epochs.

        A run that is killed in between resumes from the old checkpoint or from the new one.

        Args:
            parts: modules and optimizers by name.
            facts: plain values that are kept with them.

        Raises UserError, with the old files intact, if the disk is at fault.
        """
        content = {name: part.state_dict() for name, part in parts.items()}
        content |= facts | {"epoch": state.epoch, "state": vars(state), "rng": _random_state()}
        target = self.path / (BEST if best else LAST)
        with disk_faults(target, f"free space there, then resume {self.path}"):
            write_torch_file(target, content)
            if best:
                _link(target, self.path / LAST)
        self._write_metrics(state.rows)

    def load(self, data: dict) -> dict:
        """Lock the folder and read last.pth, {} if the run was stopped before its first checkpoint.

        Raises UserError if it cannot be read, or was made of other data (their fingerprints).
        """
        self.lock()
        path = self.path / LAST
        if not path.exists():
            if (self.path / BEST).exists():
                raise UserError(f"{path}: no such file; copy {BEST} there to go on from it")
            return {}
        saved = read_torch_file(path)
        for name, fingerprint in data.items():
            if saved.get("data", {}).get(name) != fingerprint:
                raise UserError(f"{path}: the {name} half is not the one that the run began with")
        return saved

    def restore(self, saved: dict, parts: dict[str, Any], device: torch.device) -> State:
        """Put back what `load` read, and return the state. Raises UserError if it does not fit."""
        path = self.path / LAST
        try:
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            state = State(**saved["state"])
            torch.set_rng_state(saved["rng"]["cpu"])
            if "cuda" in saved["rng"] and device.type == "cuda":
                torch.cuda.set_rng_state(saved["rng"]["cuda"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{path}: does not fit the options of its run ({reason})") from None
        state.sums = {name: total.to(device) for name, total in state.sums.items()}
        return state

    def _write_metrics(self, rows: list[dict]) -> None:
        self._write_text(METRICS, "".join(json.dumps(row) + "\n" for row in rows))

    def _write_text(self, name: str, text: str) -> None:
        path = self.path / name
        with disk_faults(path, f"free space there, then resume {self.path}"):
            write_text(path, text)


def _link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy where there are no hard links."""
    with written_whole(target) as beside:
        try:
            os.link(source, beside)
        except OSError:
            shutil.copyfile(source, beside)


def _random_state() -> dict[str, Tensor]:
    """Return the state of torch's generators, from which dropout draws."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def check_finite(named: dict[str, Tensor], where: str) -> None:
    """Raise DivergedError that names the first of the tensors that is not finite."""
    for name, value in named.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise DivergedError(f"{where}: {name} is not finite; resume the run with a lower rate")


def criterion(rows: Sequence[dict]) -> str:
    """Return the score that chooses the best epoch: R@1 of held-out classes, else of the test half.

    rows: metrics of epochs.
    """
    return "val_recall@1" if any("val_recall@1" in row for row in rows) else "recall@1"


def last_and_best(rows: Sequence[dict]) -> list[tuple[str, dict]]:
    """Return title and metrics of the last scored epoch and of the best one; [] if none is scored.

    rows: metrics of epochs.
    """
    score = criterion(rows)
    scored = [row for row in rows if score in row]
    if not scored:
        return []
    best = max(scored, key=lambda row: row[score])
    return [("last", scored[-1]), (f"best, {CHOSEN_ON[score]}", best)]


def read_metrics(folder: Path) -> list[dict]:
    """Return the metrics of all epochs of a run that are done."""
    path = folder / METRICS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def run_to_resume(path: str) -> Path:
    """Return the folder of the run that a path stands for: itself, or that of a last.pth.

    Raises UserError if no run lies there.
    """
    folder = Path(path).resolve()
    if folder.name == LAST:
        folder = folder.parent
    if not (folder / CONFIG).is_file():
        raise UserError(f"resume {path}: no run lies there (no {CONFIG}); give its folder")
    return folder


def find_checkpoint(path: str) -> Path:
    """Return the checkpoint that a path stands for: a file, or of a run's folder its best.pth.

    RUN.pth is the run, too, if there is no such file. A run without scores has no best epoch: its
    last.pth. Raises UserError for a run without a finished epoch.
    """
    folder = Path(path)
    if not folder.is_dir():
        folder = Path(path.removesuffix(".pth"))
    if Path(path).is_file() or not folder.is_dir():
        return Path(path)
    metrics = folder / METRICS
    has_no_epoch = metrics.is_file() and not metrics.stat().st_size  # stopped within its first
    for name in (BEST, LAST):
        if (folder / name).is_file() and not has_no_epoch:
            return folder / name
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: is not the folder of a run (no {CONFIG}), nor a checkpoint")
    raise UserError(f"{folder / BEST}: no such file; {folder} holds no finished epoch yet")


def scalars(row: dict) -> dict[str, float]:
    """Return the finite numbers of a row of metrics, those of inner objects as `seconds/train`."""
    numbers = {}
    for name, value in row.items():
        if isinstance(value, dict):
            numbers |= {f"{name}/{inner}": number for inner, number in scalars(value).items()}
        elif isinstance(value, int | float) and isfinite(value) and name not in {"epoch", "best"}:
            numbers[name] = value
    return numbers
