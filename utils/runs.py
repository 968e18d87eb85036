"""A run's folder: its settings, one line of metrics an epoch, its checkpoints. Every file is written whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

from utils.errors import UserError
from utils.files import written_whole

CONFIG, METRICS, LAST, BEST = "config.json", "metrics.jsonl", "last.pth", "best.pth"


def save_config(run: Path, config: dict) -> None:
    """Write the run's settings as JSON."""
    with written_whole(run / CONFIG) as path:
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_metrics(run: Path) -> list[dict]:
    """The metrics of a run, a dictionary an epoch; [] when there are none yet. Raises UserError for a damaged file."""
    path = run / METRICS
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise UserError(f"{path}: a line is not valid JSON ({error}); mend or remove it") from None


def save_metrics(run: Path, rows: list[dict]) -> None:
    """Write all rows of metrics.jsonl anew, so that it never holds a torn or a doubled line."""
    with written_whole(run / METRICS) as path:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def fault_in(saved: object, images: int) -> str:
    """What keeps a training of `images` images from continuing from the content of a last.pth; "" if nothing does."""
    import torch

    if not isinstance(saved, dict):
        return f"it holds a {type(saved).__name__}"
    missing = {"model", "optimizer", "epoch", "rng", "metrics", "pseudo_labels"} - saved.keys()
    if missing:
        return f"no {', '.join(sorted(missing))} in it"
    state, labels, rows, epoch = (saved[name] for name in ("model", "pseudo_labels", "metrics", "epoch"))
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        return "model is no state_dict"
    if not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 0:
        return "epoch is no whole number of 0 or more"
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "epoch" in row for row in rows):
        return "metrics are no rows, one an epoch"
    if labels is not None and (not isinstance(labels, torch.Tensor) or labels.shape != (images,)):
        return f"pseudo_labels are not those of {images} training images"
    return ""


def save_checkpoint(path: Path, content: dict) -> None:
    """torch.save, whole."""
    import torch

    with written_whole(path) as beside:
        torch.save(content, beside)


def link_checkpoint(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, atomically; a copy where the file system knows no hard links."""
    beside = target.with_name(f".{target.name}.{os.getpid()}.part")
    beside.unlink(missing_ok=True)
    try:
        os.link(source, beside)
    except OSError:
        import shutil

        shutil.copyfile(source, beside)
    os.replace(beside, target)
