"""A run's folder: its settings, one line of metrics an epoch, its checkpoints. Every file is written whole."""

from __future__ import annotations

import json
import os
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path

from utils.errors import UserError
from utils.files import lock_folder, sync_folder, written_whole
from utils.process import is_first

CONFIG, METRICS, LAST, BEST = "config.json", "metrics.jsonl", "last.pth", "best.pth"
REPORT = "report.html"  # of report.py
EVENTS = "events.out.tfevents.*.metrics"  # for TensorBoard


def run_folder(path: Path) -> Path:
    """The run's folder that a checkpoint's path may stand for: itself, or the one of its name without the ending."""
    return path if path.is_dir() else path.with_suffix("")


def recall_titles(scores: dict) -> dict[str, str]:
    """The R@K among scores, the smallest K first: {"R@1": "recall@1", ...}."""
    ks = sorted(int(name.removeprefix("recall@")) for name in scores if name.startswith("recall@"))
    return {f"R@{k}": f"recall@{k}" for k in ks}


def nmi_remark(scores: dict) -> str:
    """How the NMI among scores was found, or why it was left out."""
    return f"left out: {scores['nmi_left_out']}" if "nmi_left_out" in scores else f"by {scores['nmi_protocol']}"


def find_checkpoint(given: str) -> Path:
    """The file to load: `given` itself, or of the run's folder of that name its best.pth (said on a line).

    A run without labels has no best epoch: its last.pth. Raises UserError for a run without a finished epoch.
    """
    path = Path(given)
    run = run_folder(path)
    if path.is_file() or not run.is_dir():
        return path
    best, last = run / BEST, run / LAST
    if best.is_file():
        said = f"taking {best}, the epoch that was best on {_chosen_on(run)}; {LAST} is the last)"
    elif last.is_file():
        said = f"taking {last}, no epoch of this run was scored"
    else:
        raise UserError(f"{best}: no such file; {run} holds no finished epoch yet")
    if is_first():
        print(f"{given}: {said}")
    return best if best.is_file() else last


def _chosen_on(run: Path) -> str:
    """What the best epoch of a run was chosen on, in words."""
    try:
        held_out = json.loads((run / CONFIG).read_text(encoding="utf-8")).get("val_classes")
    except (OSError, ValueError, AttributeError):  # of another making; the released code chose on test
        held_out = 0
    return "held-out training classes (not on test" if held_out else "the test half (chosen on test"


def scalars(row: dict) -> dict[str, float]:
    """The finite numbers of a row of metrics.jsonl by name, those of an inner object as `seconds/train`; no epoch."""
    found = {}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= {f"{name}/{inner}": number for inner, number in scalars(value).items()}
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and name != "epoch" and isfinite(value):
            found[name] = value
    return found


class RunFolder:
    """The one place from which the files of a run are written; one process at a time holds it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    def files_to_overwrite(self, overwrite: bool) -> list[Path]:
        """The files of a run that lies here already. UserError if it has checkpoints, unless `overwrite`."""
        held = [self.path / name for name in (LAST, BEST, METRICS, CONFIG, REPORT) if (self.path / name).exists()]
        held += self.path.glob(EVENTS)
        for path in held:
            if path.is_dir():
                raise UserError(f"{path}: is a folder, not the file of a run; choose another --model_name")
        if {self.path / LAST, self.path / BEST} & set(held) and not overwrite:
            raise UserError(f"{self.path}: holds a run already; continue it with --resume {self.path}, choose another "
                            f"--model_name, or start afresh with --overwrite")  # fmt: skip
        return held

    def has_metrics(self) -> bool:
        """Whether an epoch was done here once."""
        path = self.path / METRICS
        return path.exists() and path.stat().st_size > 0

    def lock(self) -> None:
        """Keep other processes from the folder until `close`; UserError if one holds it."""
        self._lock = lock_folder(self.path, "another process is training in this folder; wait for it or stop it, or "
                                 "choose another --model_name")  # fmt: skip

    def close(self) -> None:
        """Give the folder free."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def begin(self, config: dict, rows: list[dict], stale: list[Path]) -> None:
        """Make and lock the folder, remove `stale` files and what a killed process left, write settings and metrics."""
        with self._writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            self.lock()
        with self._writing(self.path):
            for path in [*stale, *self.path.glob(".*.part")]:
                path.unlink(missing_ok=True)
        with self._writing(self.path / CONFIG), written_whole(self.path / CONFIG) as path:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        self._save_metrics(rows)

    def save(self, content: dict, best: bool = False) -> None:
        """Write last.pth, for the `best` epoch so far best.pth as well, then all rows of content["metrics"] anew.

        A run that is killed in between has the checkpoint before or this one, and repeats what is missing when it is
        resumed. Raises UserError naming the file that cannot be written; those there before are intact then.
        """
        target = self.path / (BEST if best else LAST)
        with self._writing(target):
            _torch_save(target, content)
        if best:  # after best.pth: a run killed in between makes both again
            with self._writing(self.path / LAST):
                _link(self.path / BEST, self.path / LAST)
        self._save_metrics(content["metrics"])

    def _save_metrics(self, rows: list[dict]) -> None:
        """Write all rows anew, so that the file never holds a torn or a doubled line."""
        with self._writing(self.path / METRICS), written_whole(self.path / METRICS) as path:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """Turn a fault of the disk into a UserError that names `path` and what to do."""
        try:
            yield
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); free space there or make it writable, "
                            f"then train.py --resume {self.path}") from None  # fmt: skip


def fault_in(saved: object, images: int, args: Namespace) -> str:
    """What keeps a training of `images` images with the options `args` from continuing from what a checkpoint holds.

    "" if nothing does. The weights are not looked at.
    """
    if not isinstance(saved, dict):
        return f"it holds a {type(saved).__name__}"
    missing = {"model", "optimizer", "epoch", "rng", "metrics", "pseudo_labels"} - saved.keys()
    if missing:
        return f"no {', '.join(sorted(missing))} in it"
    labels, current, data = saved["pseudo_labels"], saved.get("current"), saved.get("data")
    if not _is_state_dict(saved["model"]):
        return "model is no state_dict"
    if not _is_count(saved["epoch"]):
        return "epoch is no whole number of 0 or more"
    if not _are_metrics(saved["metrics"]):
        return "metrics are no rows, one an epoch"
    if labels is not None and not _are_numbers(labels, images, args.n_cluster):
        return f"pseudo_labels are not those of {images} training images in {args.n_cluster} clusters"
    if data is not None and not _are_fingerprints(data):
        return "data are no fingerprints of two halves"
    if not _is_state_dict(saved.get("step") or {}):
        return "step is no state_dict"
    if current is not None and not _is_epoch(current, images, images // args.batch_size):
        return f"current is no epoch under way of {images // args.batch_size} steps over {images} images"
    if current is not None and labels is None and args.pseudo_labels == "kmeans":
        return "no pseudo_labels for the epoch under way"
    return ""


def _is_state_dict(value: object) -> bool:
    import torch

    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(part, torch.Tensor) for name, part in value.items()
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_numbers(value: object, count: int, below: int) -> bool:
    """Whether it is a tensor (count,) int64 of numbers from 0 to `below` - 1."""
    import torch

    plain = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    if not plain or value.dtype != torch.int64 or value.shape != (count,):
        return False
    return bool(((value >= 0) & (value < below)).all())


def _are_places(value: object, images: int) -> bool:
    """Whether it is a tensor (images,), or (images, k), int64 of places among the images."""
    import torch

    count = value.numel() if isinstance(value, torch.Tensor) and value.dim() in {1, 2} else 0
    return count > 0 and len(value) == images and _are_numbers(value.flatten(), count, images)


def _are_metrics(rows: object) -> bool:
    """Whether they are rows of metrics.jsonl with what is read of them again."""
    if not isinstance(rows, list) or not _is_json(rows):
        return False
    if not all(isinstance(row, dict) and _is_count(row.get("epoch")) for row in rows):
        return False
    clusters = (("nmi", float), ("nmi_protocol", str)), (("nmi_left_out", str),)
    return all(
        isinstance(row.get(half + name), kind)
        for half in ("", "val_")
        for row in rows
        if f"{half}recall@1" in row
        for name, kind in (("recall@1", float), *clusters[f"{half}nmi_left_out" in row])
    )


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _are_fingerprints(data: object) -> bool:
    """Whether they are those of `datasets.Split.fingerprint` for both halves."""
    if not isinstance(data, dict) or data.keys() != {"training", "validation"}:
        return False
    return all(
        isinstance(half, dict)
        and half.keys() - {"roles"} == {"images", "labels"}
        and all(isinstance(v, str) for v in half.values())
        for half in data.values()
    )


def _is_epoch(current: object, images: int, steps: int) -> bool:
    """Whether it is what train.py saves of an epoch under way."""
    import torch

    names = {"positives", "clustering", "losses", "step", "seconds"}
    if not isinstance(current, dict) or current.keys() != names:
        return False
    positives, clustering, losses, seconds = (current[n] for n in ("positives", "clustering", "losses", "seconds"))
    if positives is not None and not _are_places(positives, images):
        return False
    if not isinstance(losses, torch.Tensor) or (losses.dtype, losses.shape) != (torch.float64, (4,)):
        return False
    if not isinstance(seconds, dict) or not all(isinstance(seconds.get(n), float) for n in ("features", "train")):
        return False
    logged = isinstance(clustering, dict) and _is_json(clustering)
    return logged and _is_count(current["step"]) and current["step"] <= steps


def _torch_save(path: Path, content: dict) -> None:
    """torch.save, whole. Raises OSError when the disk is at fault, which torch reports as an error of its own."""
    import torch

    with written_whole(path) as beside, open(beside, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def _link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, atomically; a copy where the file system knows no hard links."""
    beside = target.with_name(f".{target.name}.{os.getpid()}.part")
    beside.unlink(missing_ok=True)
    try:
        os.link(source, beside)
    except OSError:
        with written_whole(target) as copy:
            shutil.copyfile(source, copy)
    else:
        os.replace(beside, target)
        sync_folder(target.parent)
