"""What a run's folder holds: settings, metrics, network, and the data that they name. What is missing is said."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from datasets import Split, load_split
from datasets.folder import listed_paths
from models import CBSwR, load_checkpoint
from utils.arguments import folder_name
from utils.errors import UserError
from utils.runs import BEST, CONFIG, LAST, METRICS


@dataclass
class Run:
    """A run as a report sees it. `missing`: part -> a sentence about what is not there and how to get it."""

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


def read_run(path: Path) -> Run:
    """The settings and metrics of a run; UserError where the folder holds nothing of a run."""
    if not path.is_dir():
        kind = "is a file, not the folder of a run" if path.exists() else "no such folder"
        raise UserError(f"{path}: {kind}; give a folder that train.py made, such as new_checkpoint/CBSwR_CUB200")
    if not any((path / name).is_file() for name in (CONFIG, METRICS, LAST, BEST)):
        raise UserError(f"{path}: holds no run (none of {CONFIG}, {METRICS}, {LAST}); give a folder that train.py made")
    run = Run(path)
    run.config = _kept(run, "config", path / CONFIG, lambda text: _object(json.loads(text)), {})
    run.rows = _kept(run, "metrics", path / METRICS, _rows, [])
    if not run.rows and "metrics" not in run.missing:
        run.missing["metrics"] = f"{path / METRICS} is empty: no epoch of this run is finished yet."
    return run


def open_network(run: Run, checkpoint: str, device: torch.device) -> None:
    """Load the network of a run, if it can be had."""
    path = run.path / checkpoint
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such file; it is written after the first epoch, or copy it there")
        run.model, run.info = load_checkpoint(path, device)
        run.model.to(memory_format=torch.channels_last)
        run.config = run.config or {str(name): value for name, value in run.info["config"].items()}
    except UserError as error:
        run.missing["network"] = f"The network could not be loaded. {error}."


def open_data(run: Run, data_dir: str | None) -> None:
    """Open both halves of the run's data set, if they can be had; data_dir None: where the run found them."""
    size = run.info.get("image_size") or run.config.get("image_size")
    size = size if isinstance(size, int) else None
    for half in ("training", "validation"):
        try:
            dataset = folder_name(str(run.config.get("dataset", "")))
            split = load_split(data_dir or str(run.config.get("data_dir", "data")), dataset, half, size)
        except (UserError, OSError, ValueError, argparse.ArgumentTypeError) as error:
            said = str(error)
            if isinstance(error, argparse.ArgumentTypeError):
                said = f"the name of the data set is not known: {error}"
            run.missing["data"] = f"The images could not be opened. {said}. If they are elsewhere, give --data_dir."
        else:
            setattr(run, "test" if half == "validation" else half, split)


def names_of(split: Split) -> tuple[list[str], list[str]]:
    """What each image is called, and its class ("" without labels), by the list beside the arrays if there is one."""
    listed = listed_paths(split)
    called = [f"image {row}" if "#" in Path(path).name else Path(path).name for row, (path, _) in enumerate(listed)]
    return called, [name for _, name in listed]


def _object(value: object) -> dict:
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


def _rows(text: str) -> list[dict]:
    rows = [_object(json.loads(line)) for line in text.split("\n") if line]
    if not all(isinstance(row.get("epoch"), int) for row in rows):
        raise ValueError("a row without its epoch")
    return rows


def _kept(run: Run, part: str, path: Path, parse: Callable[[str], Any], otherwise: Any) -> Any:
    """What `parse` makes of a file; `otherwise`, and a sentence, where it is missing or damaged."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        run.missing[part] = f"{path} is missing; train.py writes it."
    except (OSError, ValueError, RecursionError) as error:
        run.missing[part] = f"{path} cannot be read ({error}); train.py --resume {run.path} writes it anew."
    return otherwise
