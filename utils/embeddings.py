"""A file of embeddings that grows batch by batch and goes on after a kill.

`FILE.npy` holds the rows, `FILE.csv` the path and class of each row, `FILE.json` the facts: what
was embedded, and by which network. Until everything is embedded the three names end in `.part`,
and `FILE.json.part` says how much of the other two files is safe on the disk.
"""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.files import disk_faults, lock_file, sync_folder, write_json

SAVE_EVERY = 2.0  # seconds of work that a kill may cost
NOT_COMPARED = ("checkpoint", "weights", "seed")  # the hash of the network says more
CSV_FORMAT = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
ADVICE = "choose another name, or overwrite it"
NO_ROOM = "make room; the same command goes on"


class EmbeddingWriter:
    """Writes a file of embeddings, or goes on with an unfinished one.

    Attributes:
        complete: whether the file is finished, now or by an earlier run.
        images: number of images that are done; unreadable ones count, though they have no row.
        rows: number of rows.
        unreadable: path and reason of each unreadable image.
    """

    def __init__(self, file: Path, facts: dict, overwrite: bool = False) -> None:
        """Open the files.

        Args:
            facts: content of `FILE.json`, with `dimension` D and `dtype` of the rows.
            overwrite: begin anew, whatever is there.

        Raises UserError if a file of other facts is there, or another process is writing it.
        """
        self.facts = facts
        self._paths = _paths_of(file)
        self._parts = {kind: _part(path) for kind, path in self._paths.items()}
        self._dtype = np.dtype(facts["dtype"]).newbyteorder("<")
        saved = {} if overwrite else self._read_saved()
        self.images, self.rows, csv_size = saved.get("progress", (0, 0, 0))
        self.unreadable = saved.get("unreadable", [])
        self.complete = "rows" in saved
        if self.complete:
            self.rows = saved["rows"]
            return
        for kind in ("npy", "csv"):
            self._parts[kind].touch()
        self._npy = open(self._parts["npy"], "rb+")  # noqa: SIM115  # see close
        self._csv = open(self._parts["csv"], "r+", **CSV_FORMAT)  # noqa: SIM115
        self._table = csv.writer(self._csv, lineterminator="\n")
        if not lock_file(self._npy.fileno()):
            raise UserError(f"{file}: another process is writing it; choose another name")
        row_size = facts["dimension"] * self._dtype.itemsize
        self._npy.truncate(self._write_header() + self.rows * row_size)
        self._csv.truncate(csv_size)
        self._csv.seek(csv_size)
        if csv_size == 0:
            self._table.writerow(("path", "class"))
        self._save()

    def add(
        self,
        rows: np.ndarray,
        listed: Sequence[tuple[str, str]],
        unreadable: Sequence[tuple[str, str]] = (),
    ) -> None:
        """Append the embeddings (b, D) of a batch, with path and class of each row."""
        self.images += len(listed) + len(unreadable)
        self.rows += len(rows)
        self.unreadable += unreadable
        with disk_faults(self._paths["npy"], NO_ROOM):
            self._npy.write(rows.astype(self._dtype).tobytes())
            self._table.writerows(listed)
            if time.monotonic() - self._last_save >= SAVE_EVERY:
                self._save()

    def finish(self) -> None:
        """Give the files their names, `FILE.json` last: without it the others do not count."""
        self._save()
        self._npy.close()
        self._csv.close()
        self._paths["json"].unlink(missing_ok=True)
        for kind in ("npy", "csv"):
            os.replace(self._parts[kind], self._paths[kind])
        facts = self.facts | {"rows": self.rows, "unreadable": self.unreadable}
        write_json(self._paths["json"], facts)
        self._parts["json"].unlink()
        sync_folder(self._paths["npy"].parent)
        self.complete = True

    def close(self) -> None:
        """Save what is there, and let other processes have the files."""
        if not self._npy.closed:
            for step in (self._save, self._npy.close, self._csv.close):
                with suppress(OSError, UserError):  # it was reported; what is saved stays whole
                    step()

    def _save(self) -> None:
        """Bring the rows to the disk, then write how many they are."""
        with disk_faults(self._paths["npy"], NO_ROOM):
            self._write_header()
            self._npy.seek(0, os.SEEK_END)
            for file in (self._npy, self._csv):
                file.flush()
                os.fsync(file.fileno())
            progress = (self.images, self.rows, self._csv.tell())
            facts = self.facts | {"unreadable": self.unreadable, "progress": progress}
            write_json(self._parts["json"], facts)
        self._last_save = time.monotonic()

    def _write_header(self) -> int:
        """Write the start of the .npy file; its length does not depend on the number of rows."""
        self._npy.seek(0)
        shape = (self.rows, self.facts["dimension"])
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._npy, header)
        return self._npy.tell()

    def _read_saved(self) -> dict:
        """Read the facts of the finished or unfinished file that is there; {} if there is none."""
        if self._paths["json"].exists():
            return self._read_same(self._paths["json"])
        if all(path.exists() for path in self._parts.values()):
            return self._read_same(self._parts["json"])
        for path in self._paths.values():
            if path.exists() and not self._parts["json"].exists():
                raise UserError(f"{path}: is there, and not of embed.py; {ADVICE}")
        return {}

    def _read_same(self, path: Path) -> dict:
        content = _read_facts(path)
        for name, value in self.facts.items():
            if content.get(name) != value and name not in NOT_COMPARED:
                change = f"{name} was {content.get(name)} and is {value}"
                if name in ("source", "images"):
                    change = "the images have changed"
                raise UserError(f"{path}: of another network or other images: {change}; {ADVICE}")
        return content


def open_embeddings(file: Path) -> tuple[np.ndarray, list[str], dict]:
    """Open a finished file of embeddings.

    Returns:
        The rows (N, D), memory-mapped; the path of each row's image; the content of `FILE.json`.

    Raises UserError if the file is missing, unfinished or not of embed.py.
    """
    paths = _paths_of(file)
    if not paths["json"].exists():
        if _part(paths["json"]).exists():
            raise UserError(f"{file}: is unfinished; run embed.py again")
        raise UserError(f"{paths['json']}: no such file; make it with embed.py")
    facts = _read_facts(paths["json"])
    try:
        rows = np.load(paths["npy"], mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError):
        raise UserError(f"{paths['npy']}: not a .npy array, or truncated; embed again") from None
    with open(paths["csv"], **CSV_FORMAT) as lines:
        images = [row["path"] for row in csv.DictReader(lines)]
    if rows.shape != (len(images), facts.get("dimension")):
        raise UserError(f"{file}: does not match its .csv and .json; embed again")
    return rows, images, facts


def _paths_of(file: Path) -> dict[str, Path]:
    return {kind: file.with_suffix(f".{kind}") for kind in ("npy", "csv", "json")}


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _read_facts(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(f"{path}: was not written by embed.py; choose another name") from None
