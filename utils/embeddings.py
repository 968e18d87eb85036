"""A file of embeddings: rows that are appended batch by batch, their paths, and which network made them.

`FILE.npy` holds the rows, `FILE.csv` path and class of each, `FILE.json` what they were made of and by. Until all are
complete they are called `FILE.npy.part` and so on; what `FILE.json.part` counts is on the disk in the other two.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.files import lock_open_file, sync_folder, write_json

SAVE_EVERY = 2.0  # seconds; what is lost when the process is killed outright
SOURCE = ("source", "images")  # what is embedded; all other facts are about how


def names_of(file: Path) -> dict[str, Path]:
    """The three files by their kinds: npy, csv, json."""
    return {kind: file.with_suffix(f".{kind}") for kind in ("npy", "csv", "json")}


def network_hash(model) -> str:
    """SHA-256 of the names, types, shapes and values of all that makes embeddings: backbone and embedding head."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if name.startswith(("base_model.", "feat_ext.")):
            array = value.detach().cpu().contiguous().numpy()
            digest.update(f"{name} {array.dtype} {array.shape}\0".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()


class EmbeddingWriter:
    """Writes a file of embeddings, or goes on with one that was interrupted; one process at a time."""

    def __init__(self, file: Path, facts: dict, dimension: int, half: bool, overwrite: bool) -> None:
        """facts: what `FILE.json` is to say; an unfinished file is continued if it says the same.

        Raises UserError where a file of other facts lies there, unless `overwrite`, or another process writes it.
        """
        self.names = names_of(file)
        self.parts = {kind: path.with_name(path.name + ".part") for kind, path in self.names.items()}
        self.facts = facts | {"dimension": dimension, "dtype": "float16" if half else "float32"}
        self.dtype, self.dimension = np.dtype(self.facts["dtype"]), dimension
        self.images = self.rows = 0  # images looked at; rows written, fewer where some are unreadable
        self.done = self._finished(overwrite)
        if self.done:
            return
        saved = self._unfinished(overwrite)
        self._out = open(self.parts["npy"], "ab+")  # noqa: SIM115  # until close
        self._lock()
        self._table = open(self.parts["csv"], "ab+")  # noqa: SIM115
        self.unreadable: list[list[str]] = saved.get("unreadable", [])
        self.images, self.rows, end = saved.get("progress", (0, 0, 0))
        end = end if self.images else 0
        self._out.truncate(0 if self.images == 0 else self._start() + self.rows * self.dimension * self.dtype.itemsize)
        self._table.truncate(end)
        for file in (self._out, self._table):
            file.seek(0, os.SEEK_END)
        if self.images == 0:
            self._out.write(self._header(0))
            self._table.write(_csv_lines([("path", "class")]))
        self._saved = time.monotonic()

    def add(self, rows: np.ndarray, listed: Sequence[tuple[str, str]], images: int, unreadable=()) -> None:
        """Append embeddings (b, D) with path and class of each; `images` were looked at, those unreadable included."""
        self._out.write(np.ascontiguousarray(rows, dtype=self.dtype).tobytes())
        self._table.write(_csv_lines(listed))
        self.rows += len(rows)
        self.images += images
        self.unreadable += [list(fault) for fault in unreadable]
        if time.monotonic() - self._saved >= SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Bring all rows to the disk and then say so: from here on an interrupted run goes on."""
        for file in (self._out, self._table):
            file.flush()
            os.fsync(file.fileno())
        state = {**self.facts, "unreadable": self.unreadable, "progress": [self.images, self.rows, self._table.tell()]}
        write_json(self.parts["json"], state)
        self._saved = time.monotonic()

    def finish(self) -> None:
        """Give the files their names; FILE.json comes last: without it they do not count."""
        self._out.close()
        self._table.close()
        with open(self.parts["npy"], "rb+") as out:
            out.write(self._header(self.rows))
        for kind in ("npy", "csv"):
            with open(self.parts[kind], "rb+") as file:
                os.fsync(file.fileno())
        self.names["json"].unlink(missing_ok=True)
        for kind in ("npy", "csv"):
            os.replace(self.parts[kind], self.names[kind])
        write_json(self.names["json"], {**self.facts, "rows": self.rows, "unreadable": self.unreadable})
        self.parts["json"].unlink(missing_ok=True)
        sync_folder(self.names["npy"].parent)

    def close(self) -> None:
        """Save what is there and let other processes have the file."""
        if not self.done and not self._out.closed:
            self.save()
            self._out.close()
            self._table.close()

    def _finished(self, overwrite: bool) -> bool:
        """Whether the very file is there already; UserError for another one."""
        there = [path for path in self.names.values() if path.exists()]
        if overwrite or not there:
            return False
        if not self.names["json"].exists():
            if self.parts["json"].exists():  # ended between two renames: all rows are made again
                return False
            raise UserError(f"{there[0]}: is there already and was not made by embed.py; choose another --out, or give "
                            "--overwrite")  # fmt: skip
        found = _read_json(self.names["json"])
        self._compare(found, self.names["json"], "choose another --out, or give --overwrite")
        self.rows = found["rows"]
        return True

    def _unfinished(self, overwrite: bool) -> dict:
        """What an interrupted run has saved; {} for none, or for one to overwrite."""
        if not self.parts["json"].exists() or not self.parts["npy"].exists() or not self.parts["csv"].exists():
            return {}
        if overwrite:
            return {}
        found = _read_json(self.parts["json"])
        self._compare(found, self.parts["json"], "give the options that it began with, or --overwrite to begin anew")
        size = self._start() + found["progress"][1] * self.dimension * self.dtype.itemsize
        if self.parts["npy"].stat().st_size < size or self.parts["csv"].stat().st_size < found["progress"][2]:
            raise UserError(f"{self.parts['npy']}: is shorter than it was; give --overwrite to begin anew")
        return found

    def _compare(self, found: dict, file: Path, advice: str) -> None:
        for name, value in self.facts.items():
            if found.get(name) != value:
                what = "the images have changed" if name in SOURCE else f"{name} was {found.get(name)} and is {value}"
                raise UserError(f"{file}: not of this network and these images: {what}; {advice}")

    def _lock(self) -> None:
        if not lock_open_file(self._out.fileno()):
            self._out.close()
            raise UserError(f"{self.names['npy']}: another process is writing it; choose another --out")

    def _header(self, rows: int) -> bytes:
        """The start of the .npy file; its length is the same for every number of rows."""
        out = io.BytesIO()
        description = {
            "descr": self.dtype.newbyteorder("<").str,
            "fortran_order": False,
            "shape": (rows, self.dimension),
        }
        np.lib.format.write_array_header_1_0(out, description)
        return out.getvalue()

    def _start(self) -> int:
        return len(self._header(0))


def open_embeddings(file: Path) -> tuple[np.ndarray, dict]:
    """The rows (N, D) of a file that embed.py has finished, memory-mapped, and the facts of its `FILE.json`.

    Raises UserError where the file is missing, unfinished or not of embed.py.
    """
    names = names_of(file)
    if not names["json"].is_file() or not names["npy"].is_file():
        unfinished = names["json"].with_name(names["json"].name + ".part").exists()
        raise UserError(f"{file}: {'unfinished; run embed.py again' if unfinished else 'no such file; make it'} with "
                        "embed.py")  # fmt: skip
    facts = _read_json(names["json"])
    try:
        rows = np.load(names["npy"], mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError):
        raise UserError(f"{names['npy']}: not a .npy array, or truncated; make it again with embed.py") from None
    if rows.shape != (facts.get("rows"), facts.get("dimension")):
        raise UserError(
            f"{names['npy']}: {rows.shape} is not what {names['json'].name} says; make it again with embed.py"
        )
    return rows, facts


def _csv_lines(rows: Sequence[Sequence[str]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8", errors="surrogateescape")


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not written by embed.py; give --overwrite, or another --out")
    return content
