"""What the folder of a run holds: settings, metrics, network, and the data that they name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from datasets.arrays import Split, load_split
from models import CBSwR, load_checkpoint
from utils.errors import UserError
from utils.runs import BEST, CONFIG, LAST, METRICS, scalars


@dataclass
class Run:
    """A run as a report sees it. Whatever is not there has a sentence in `missing`, by part."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    model: CBSwR | None = None
    info: dict[str, Any] = field(default_factory=dict)  # of `models.load_checkpoint`
    training: Split | None = None
    test: Split | None = None

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.path.resolve().name

    @property
    def columns(self) -> list[str]:
        """The names of all numbers in the metrics."""
        return list(dict.fromkeys(name for row in self.rows for name in scalars(row)))


def read_run(path: Path) -> Run:
    """Read settings and metrics of a run. Raises UserError if the folder holds nothing of a run."""
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give one that train.py made")
    if not any((path / name).is_file() for name in (CONFIG, METRICS, LAST, BEST)):
        raise UserError(f"{path}: holds no run; give a folder that train.py made")
    run = Run(path)
    run.config = _read(run, "config", CONFIG, json.loads) or {}
    run.rows = _read(run, "metrics", METRICS, _parse_rows) or []
    if not run.rows:
        run.missing.setdefault("metrics", f"{path / METRICS} is empty: no epoch is finished yet.")
    return run


def _read(run: Run, part: str, file: str, parse: Callable[[str], Any]) -> Any:
    """Return what `parse` makes of a file of the run; None if it cannot be read."""
    path = run.path / file
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        run.missing[part] = f"{path} is missing; train.py writes it."
    except (OSError, ValueError) as error:
        run.missing[part] = f"{path} cannot be read ({error}); a resumed run writes it anew."
    return None


def _parse_rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def open_network(run: Run, checkpoint: str, device: torch.device) -> None:
    """Load the network of a run from a checkpoint in its folder, if it can be had."""
    try:
        run.model, run.info = load_checkpoint(run.path / checkpoint, device)
    except UserError as error:
        run.missing["network"] = f"The network could not be loaded. {error}."
        return
    run.model.to(memory_format=torch.channels_last)
    run.config = run.config or run.info["config"]


def open_data(run: Run, data_dir: str | None) -> None:
    """Open both halves of the data set, if they are in `data_dir` or where the run found them."""
    dataset = run.config.get("dataset")
    if not dataset:
        run.missing["data"] = "The name of the data set is not known, so there are no images."
        return
    folder = data_dir or run.config.get("data_dir", "data")
    size = run.info.get("image_size") or run.config.get("image_size")
    try:
        run.test = load_split(folder, dataset, "validation", size)
        run.training = load_split(folder, dataset, "training", size)
    except (UserError, OSError) as error:
        run.missing["data"] = (
            f"The images could not be opened. {error}. If they are elsewhere, give data_dir."
        )
