"""A run's folder: its settings, one line of metrics an epoch, its checkpoints. Every file is written whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.errors import UserError
from utils.files import sync_folder, written_whole
from utils.process import is_first

CONFIG, METRICS, LAST, BEST = "config.json", "metrics.jsonl", "last.pth", "best.pth"


def find_checkpoint(given: str) -> Path:
    """The file to load: `given` itself, or of the run's folder of that name its best.pth (said on a line).

    A run without labels has no best epoch: its last.pth. Raises UserError for a run without a finished epoch.
    """
    path = Path(given)
    run = path if path.is_dir() else path.with_suffix("")
    if path.is_file() or not run.is_dir():
        return path
    best, last = run / BEST, run / LAST
    if best.is_file():
        said = f"taking {best}, the epoch that was best on the test half (chosen on test; {LAST} is the last)"
    elif last.is_file():
        said = f"taking {last}, no epoch of this run was scored"
    else:
        raise UserError(f"{best}: no such file; {run} holds no finished epoch yet")
    if is_first():
        print(f"{given}: {said}")
    return best if best.is_file() else last


class RunFolder:
    """The one place from which the files of a run are written; one process at a time holds it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    def files_to_overwrite(self, overwrite: bool) -> list[Path]:
        """The files of a run that lies here already. UserError if it has checkpoints, unless `overwrite`."""
        held = [self.path / name for name in (LAST, BEST, METRICS, CONFIG) if (self.path / name).exists()]
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
        try:
            import fcntl
        except ImportError:  # not on Windows
            return
        handle = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(f"{self.path}: another process is training in this folder; wait for it or stop it, or "
                                f"choose another --model_name") from None  # fmt: skip
        else:  # any other fault: a file system without locks
            self._lock = handle

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
