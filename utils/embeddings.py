"""A file of embeddings that grows batch by batch, goes on after a kill, and keeps what it has.

`FILE.npy` holds the rows, `FILE.csv` what each row was made from (see `COLUMNS`), `FILE.json` the
facts: what was embedded, and by which network. Until everything is embedded the three names end in
`.part`, and `FILE.json.part` says how much of the other two files is safe on the disk. An earlier
file, and an unfinished one of a folder that has changed since (`.before`), give the rows of images
that are still there.
"""

from __future__ import annotations

import csv
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.errors import UserError
from utils.files import disk_faults, lock_file, sync_folder, write_json
from utils.tables import CSV_FORMAT, csv_writer

SAVE_EVERY = 2.0  # seconds of work that a kill may cost
COLUMNS = ("path", "class", "bytes", "modified_ns", "sha256")
OF_IMAGES = ("source", "images")  # facts that change with a folder
NOT_COMPARED = ("checkpoint", "weights", "seed")  # the hash of the network says more
ADVICE = "choose another name, or overwrite it"
NO_ROOM = "make room; the same command goes on"


class Embeddings(NamedTuple):
    """A file of embeddings."""

    rows: np.ndarray  # (N, D), memory-mapped
    columns: dict[str, Sequence[str]]  # of FILE.csv, each with N texts
    facts: dict  # of FILE.json


class KnownRows:
    """Rows of earlier files, by image: by path, size and time of change, or by content."""

    def __init__(self, files: Sequence[Embeddings]) -> None:
        self._of_path: dict[str, tuple] = {}
        self._of_content: dict[str, np.ndarray] = {}
        for file in files:
            if not set(COLUMNS) <= set(file.columns):  # of an earlier version
                continue
            columns = (file.columns[name] for name in COLUMNS)
            for row, (path, _, size, modified, content) in enumerate(zip(*columns, strict=True)):
                self._of_path[path] = (size, modified, content, file.rows[row])
                self._of_content[content] = file.rows[row]

    def __contains__(self, path: str) -> bool:
        """Return whether a row was made from a file of this path."""
        return path in self._of_path

    def unchanged(self, path: str, entry: os.stat_result) -> tuple[str, np.ndarray] | None:
        """Return content hash and row of a file that is as it was, None if it is not."""
        known = self._of_path.get(path)
        if known is None or known[:2] != (str(entry.st_size), str(entry.st_mtime_ns)):
            return None
        return known[2:]

    def of_content(self, sha256: str) -> np.ndarray | None:
        """Return the row of an image with these bytes, wherever it lay."""
        return self._of_content.get(sha256)


class EmbeddingWriter:
    """Writes a file of embeddings, or goes on with an unfinished one.

    Attributes:
        complete: whether the file is finished, now or by an earlier run.
        images: number of images that are done; unreadable ones count, though they have no row.
        rows: number of rows.
        unreadable: path and reason of each unreadable image.
        known: rows of earlier files of the same network.
    """

    def __init__(
        self,
        file: Path,
        facts: dict,
        overwrite: bool = False,
        shares: Callable[[KnownRows], bool] = lambda known: True,
    ) -> None:
        """Open the files.

        Args:
            facts: content of `FILE.json`, with `dimension` D and `dtype` of the rows.
            overwrite: begin anew, whatever is there.
            shares: whether some images are among those of earlier files.

        Raises UserError if a file of another network or of other images is there, or another
        process is writing it.
        """
        self.facts = facts
        self._paths = _paths_of(file)
        self._parts = _paths_of(file, ".part")
        self._before = _paths_of(file, ".before")
        self._dtype = np.dtype(facts["dtype"]).newbyteorder("<")
        finished = None if overwrite else self._read_same(self._paths)
        part = None if overwrite else self._read_same(self._parts)
        self.complete = finished is not None and self._has_same_images(finished)
        if self.complete:
            self.rows = finished["rows"]
            return
        if not (overwrite or finished or part):
            self._check_free()
        is_of_changed_folder = part is not None and not self._has_same_images(part)
        files = [] if overwrite else [self._before, self._paths]
        if is_of_changed_folder:
            files.append(self._parts)
        self._earlier = [_open(paths) for paths in files if self._read_same(paths)]
        self.known = KnownRows(self._earlier)
        if self._earlier and not shares(self.known):
            raise UserError(f"{file}: is of other images; {ADVICE}")
        self._open_parts()
        if is_of_changed_folder:
            self._set_aside()
            part = None
        self.images, self.rows, csv_size = part["progress"] if part else (0, 0, 0)
        self.unreadable = part["unreadable"] if part else []
        row_size = facts["dimension"] * self._dtype.itemsize
        self._npy.truncate(self._write_header() + self.rows * row_size)
        self._csv.truncate(csv_size)
        self._csv.seek(csv_size)
        if csv_size == 0:
            self._table.writerow(COLUMNS)
        self._save()

    def add(
        self,
        rows: np.ndarray,
        listed: Sequence[tuple],
        unreadable: Sequence[tuple[str, str]] = (),
    ) -> None:
        """Append the embeddings (b, D) of a batch, with the columns of each row."""
        self.images += len(listed) + len(unreadable)
        self.rows += len(rows)
        self.unreadable += unreadable
        with disk_faults(self._paths["npy"], NO_ROOM):
            self._npy.write(rows.astype(self._dtype).tobytes())
            self._table.writerows(listed)
            if time.monotonic() - self._last_save >= SAVE_EVERY:
                self._save()

    def finish(self) -> str:
        """Give the files their names, `FILE.json` last: without it the others do not count.

        Returns what has changed since the earlier files, in words; "" if there were none.
        """
        self._save()
        self._npy.close()
        self._csv.close()
        changes = self._changes()
        self._paths["json"].unlink(missing_ok=True)
        for kind in ("npy", "csv"):
            os.replace(self._parts[kind], self._paths[kind])
        facts = self.facts | {"rows": self.rows, "unreadable": self.unreadable}
        write_json(self._paths["json"], facts)
        for path in (self._parts["json"], *self._before.values()):
            path.unlink(missing_ok=True)
        sync_folder(self._paths["npy"].parent)
        self.complete = True
        return changes

    def close(self) -> None:
        """Save what is there, and let other processes have the files."""
        if not self._npy.closed:
            for step in (self._save, self._npy.close, self._csv.close):
                with suppress(OSError, UserError):  # it was reported; what is saved stays whole
                    step()

    def _open_parts(self) -> None:
        """Open the unfinished files, which no other process may write."""
        for kind in ("npy", "csv"):
            self._parts[kind].touch()
        self._npy = open(self._parts["npy"], "rb+")  # noqa: SIM115  # see close
        self._csv = open(self._parts["csv"], "r+", **CSV_FORMAT)  # noqa: SIM115
        self._table = csv_writer(self._csv)
        if not lock_file(self._npy.fileno()):
            name = self._paths["npy"]
            raise UserError(f"{name}: another process is writing it; choose another name")

    def _set_aside(self) -> None:
        """Keep the unfinished files of other images for their rows, and begin new ones."""
        for kind, part in self._parts.items():
            os.replace(part, self._before[kind])
        self._npy.close()
        self._csv.close()
        self._open_parts()

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

    def _changes(self) -> str:
        """Say how many images are new, changed, renamed and gone since the earlier files."""
        if not self._earlier:
            return ""
        before = dict.fromkeys(zip(*_content_columns(self._earlier), strict=True))
        paths, contents = ({pair[number] for pair in before} for number in (0, 1))
        now = set(zip(*_content_columns([_open(self._parts)]), strict=True))
        kinds = dict.fromkeys(("new", "changed", "renamed or copied", "kept", "gone"), 0)
        for path, content in now - before.keys():
            if path in paths:
                kinds["changed"] += 1
            else:
                is_copy = content != "" and content in contents
                kinds["renamed or copied" if is_copy else "new"] += 1
        kinds["kept"] = len(now & before.keys())
        paths_now, contents_now = ({pair[number] for pair in now} for number in (0, 1))
        kinds["gone"] = sum(
            path not in paths_now and content not in contents_now for path, content in before
        )
        return ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)

    def _check_free(self) -> None:
        """Raise UserError if a file that is not of embed.py has one of the names."""
        for path in self._paths.values():
            if path.exists() and not self._parts["json"].exists():
                raise UserError(f"{path}: is there, and not of embed.py; {ADVICE}")

    def _has_same_images(self, facts: dict) -> bool:
        return facts.get("source") == self.facts.get("source")

    def _read_same(self, paths: dict[str, Path]) -> dict | None:
        """Read the facts of files, None if some are missing.

        Raises UserError if another network made them.
        """
        if not all(path.exists() for path in paths.values()):
            return None
        content = _read_facts(paths["json"])
        for name, value in self.facts.items():
            if content.get(name) != value and name not in (*NOT_COMPARED, *OF_IMAGES):
                change = f"{name} was {content.get(name)} and is {value}"
                raise UserError(f"{paths['json']}: of another network: {change}; {ADVICE}")
        return content


def _content_columns(files: Sequence[Embeddings]) -> tuple[list[str], list[str]]:
    """Return paths and content hashes of all rows of some files."""
    paths = [path for file in files for path in file.columns["path"]]
    contents = [file.columns.get("sha256", [""] * len(file.rows)) for file in files]
    return paths, [content for column in contents for content in column]


def open_embeddings(file: Path) -> Embeddings:
    """Open a finished file of embeddings.

    Raises UserError if the file is missing, unfinished or not of embed.py.
    """
    paths = _paths_of(file)
    if not paths["json"].exists():
        if _paths_of(file, ".part")["json"].exists():
            raise UserError(f"{file}: is unfinished; run embed.py again")
        raise UserError(f"{paths['json']}: no such file; make it with embed.py")
    return _open(paths)


def _open(paths: dict[str, Path]) -> Embeddings:
    """Open files of embeddings; of unfinished ones the part that is safe on the disk."""
    facts = _read_facts(paths["json"])
    n_rows = facts["progress"][1] if "progress" in facts else facts.get("rows")
    try:
        rows = np.load(paths["npy"], mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError):
        raise UserError(f"{paths['npy']}: not a .npy array, or truncated; embed again") from None
    with open(paths["csv"], **CSV_FORMAT) as lines:
        table = csv.reader(lines)
        names = next(table, [])
        texts = list(islice(table, n_rows))
    is_whole = all(len(row) == len(names) for row in texts) and "path" in names
    if not is_whole or rows.shape != (len(texts), facts.get("dimension")):
        raise UserError(f"{paths['npy']}: does not match its .csv and .json; embed again")
    columns = zip(*texts, strict=True) if texts else [()] * len(names)
    return Embeddings(rows, dict(zip(names, columns, strict=True)), facts)


def count_alike(rows: np.ndarray) -> int:
    """Return how many rows are equal to another one."""
    counts = Counter(hash(row.tobytes()) for row in rows)
    return sum(count for count in counts.values() if count > 1)


def _paths_of(file: Path, ending: str = "") -> dict[str, Path]:
    return {kind: file.with_suffix(f".{kind}{ending}") for kind in ("npy", "csv", "json")}


def _read_facts(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(f"{path}: was not written by embed.py; choose another name") from None
