"""Writes a file of embeddings batch by batch, goes on after a kill, and keeps what is there.

Until everything is embedded the three names of `utils.embeddings` end in `.part`, and
`FILE.json.part` says how much of the other two files is safe on the disk. An earlier file, and an
unfinished one of a folder that has changed since (`.before`), give the rows of images that are
still there. So do the shards, `FILE.shard-1-of-4.npy` and so on, which several processes write:
files of a part of the images.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from utils.embeddings import (
    COLUMNS,
    NOT_COMPARED,
    Embeddings,
    KnownRows,
    open_files,
    paths_of,
    read_facts,
)
from utils.errors import UserError
from utils.files import Lock, disk_faults, sync_folder, write_json
from utils.tables import CSV_FORMAT, csv_writer

SAVE_EVERY = 2.0  # seconds of work that a kill may cost
OF_IMAGES = ("source", "images")  # facts that change with a folder
ADVICE = "choose another name, or overwrite it"
NO_ROOM = "make room; the same command goes on"


class EmbeddingWriter:
    """Writes a file of embeddings, or goes on with an unfinished one.

    Attributes:
        complete: whether the file is finished, now or by an earlier run.
        images: number of images that are done; unreadable ones count, though they have no row.
        rows: number of rows.
        unreadable: path and reason of each unreadable image.
        earlier_rows: those of earlier files of the same network.
    """

    def __init__(
        self,
        file: Path,
        facts: dict,
        overwrite: bool = False,
        shares: Callable[[KnownRows], bool] = lambda rows: True,
        others: Sequence[Path] = (),
    ) -> None:
        """Open the files.

        Args:
            facts: content of `FILE.json`, with `dimension` D and `dtype` of the rows.
            overwrite: replace what is there; only an unfinished file of the same is gone on with.
            shares: whether some images are among those of earlier files.
            others: files whose rows are known, too, be they finished or not.

        Raises UserError if a file of another network or of other images is there, or another
        process is writing it.
        """
        self.facts = facts
        self._paths = paths_of(file)
        self._parts = paths_of(file, ".part")
        self._before = paths_of(file, ".before")
        self._dtype = np.dtype(facts["dtype"]).newbyteorder("<")
        self._lock = Lock(file)
        try:
            self._decide(file, overwrite, shares, others)
        except BaseException:
            self._lock.release()
            raise

    def _decide(
        self,
        file: Path,
        overwrite: bool,
        shares: Callable[[KnownRows], bool],
        others: Sequence[Path],
    ) -> None:
        """Look at what is there, and open what is to be written."""
        if not overwrite:
            take_back(file)
        finished = None if overwrite else self._read_same(self._paths)
        part = self._read_part(overwrite)
        self.complete = self._has_same_images(finished) and not finished["unreadable"]
        if self.complete:
            self.rows = finished["rows"]
            self._lock.release()
            return
        if not (overwrite or finished or part):
            self._check_free()
        goes_on = self._has_same_images(part)
        files = [] if overwrite else self._earlier_files()
        if part and not goes_on:
            files.append(open_files(self._parts))
        self._files = files = [file for file in files if len(file.rows)]
        if files and not shares(KnownRows(files)):
            raise UserError(f"{self._paths['npy']}: is of other images; {ADVICE}")
        self.earlier_rows = KnownRows([*files, *self._open_others(others, overwrite)])
        if not goes_on:
            self._set_aside(part)
            part = None
        self.images, self.rows, self._csv_size = part["progress"] if part else (0, 0, 0)
        self.unreadable = part["unreadable"] if part else []
        self._open_parts()
        self._save()

    def add(
        self,
        rows: np.ndarray,
        listed: Sequence[tuple],
        unreadable: Sequence[tuple[str, str]] = (),
    ) -> None:
        """Append the embeddings (b, D) of a batch, with the columns of each row."""
        with self._writing():
            self._npy.write(rows.astype(self._dtype).tobytes())
            self._table.writerows(listed)
            self._csv_size = self._csv.tell()
            self.images += len(listed) + len(unreadable)
            self.rows += len(rows)
            self.unreadable += unreadable
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
        with disk_faults(self._paths["npy"], NO_ROOM):
            self._paths["json"].unlink(missing_ok=True)
            for kind in ("npy", "csv"):
                os.replace(self._parts[kind], self._paths[kind])
            facts = self.facts | {"rows": self.rows, "unreadable": self.unreadable}
            write_json(self._paths["json"], facts)
        for path in (self._parts["json"], *self._before.values()):
            path.unlink(missing_ok=True)
        sync_folder(self._paths["npy"].parent)
        self.complete = True
        self._lock.release()
        return changes

    def discard(self) -> None:
        """Remove what was begun."""
        self._is_sound = False
        self.close()
        for path in self._parts.values():
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Save what is there, unless a write failed, and let other processes have the files."""
        if not self._npy.closed:
            steps = [self._save] if self._is_sound else []
            for step in (*steps, self._npy.close, self._csv.close):
                with suppress(OSError, UserError):  # it was reported; what is saved stays whole
                    step()
        self._lock.release()

    def _read_part(self, overwrite: bool) -> dict | None:
        """Read the facts of the unfinished file; to overwrite, only those of the very same."""
        try:
            part = self._read_same(self._parts)
        except UserError:
            if overwrite:
                return None
            raise
        return None if overwrite and not self._has_same_images(part) else part

    def _earlier_files(self) -> list[Embeddings]:
        names = (self._before, self._paths)
        return [open_files(paths) for paths in names if self._read_same(paths)]

    def _open_others(self, files: Sequence[Path], overwrite: bool) -> list[Embeddings]:
        """Open files of the same network; those of another one are an error, or overwritten."""
        opened = []
        for paths in (paths_of(file, ending) for file in files for ending in ("", ".part")):
            try:
                if self._read_same(paths):
                    opened.append(open_files(paths))
            except FileNotFoundError:  # its process has just finished or joined it
                continue
            except UserError:
                if not overwrite:
                    raise
        return opened

    def _set_aside(self, part: dict | None) -> None:
        """Keep an unfinished file of other images for its rows, unless an earlier one has more."""
        if part:
            before = self._read_same(self._before)
            if before is None or before["progress"][1] <= part["progress"][1]:
                self._before["json"].unlink(missing_ok=True)  # without it the others do not count
                for kind in ("npy", "csv", "json"):
                    os.replace(self._parts[kind], self._before[kind])
        for kind in ("json", "npy", "csv"):
            self._parts[kind].unlink(missing_ok=True)

    def _open_parts(self) -> None:
        """Open the unfinished files, at the end of what is safe in them."""
        for kind in ("npy", "csv"):
            self._parts[kind].touch()
        self._npy = open(self._parts["npy"], "rb+")  # noqa: SIM115  # see close
        self._csv = open(self._parts["csv"], "r+", **CSV_FORMAT)  # noqa: SIM115
        self._table = csv_writer(self._csv)
        self._is_sound = True
        row_size = self.facts["dimension"] * self._dtype.itemsize
        self._npy.truncate(self._write_header() + self.rows * row_size)
        self._csv.truncate(self._csv_size)
        self._csv.seek(self._csv_size)
        if self._csv_size == 0:
            self._table.writerow(COLUMNS)
            self._csv_size = self._csv.tell()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn a full disk into a UserError; what is in the buffers then is never saved."""
        try:
            with disk_faults(self._paths["npy"], NO_ROOM):
                yield
        except BaseException:
            self._is_sound = False
            raise

    def _save(self) -> None:
        """Bring the rows to the disk, then write how many they are."""
        with self._writing():
            self._write_header()
            self._npy.seek(0, os.SEEK_END)
            for file in (self._npy, self._csv):
                file.flush()
                os.fsync(file.fileno())
            progress = (self.images, self.rows, self._csv_size)
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
        if not self._files:
            return ""
        before = set(zip(*_content_columns(self._files), strict=True))
        now = set(zip(*_content_columns([open_files(self._parts)]), strict=True))
        paths, paths_now = ({path for path, _ in pairs} for pairs in (before, now))
        contents = {content for _, content in before} - {""}
        came = [content for path, content in now if path not in paths]
        copies = Counter(content for content in came if content in contents)
        went = Counter(content for path, content in before if path not in paths_now)
        kinds = {
            "new": len(came) - copies.total(),
            "changed": sum(path in paths for path, _ in now - before),
            "renamed or copied": copies.total(),
            "kept": len(now & before),
            "gone": (went - copies).total(),
        }
        return ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)

    def _check_free(self) -> None:
        """Raise UserError if a file that is not of embed.py has one of the names."""
        for path in self._paths.values():
            if path.exists() and not self._parts["json"].exists():
                raise UserError(f"{path}: is there, and not of embed.py; {ADVICE}")

    def _has_same_images(self, facts: dict | None) -> bool:
        return facts is not None and facts.get("source") == self.facts.get("source")

    def _read_same(self, paths: dict[str, Path]) -> dict | None:
        """Read the facts of files, None if some are missing.

        Raises UserError if another network made them.
        """
        if not all(path.exists() for path in paths.values()):
            return None
        content = read_facts(paths["json"])
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


def shard_of(file: Path, number: int, count: int) -> Path:
    """Return the name of shard `number` (from 0) of `count` of a file of embeddings."""
    return file.with_name(f"{file.stem}.shard-{number + 1}-of-{count}.npy")


def shards_there(file: Path) -> list[Path]:
    """Return the shards of a file of embeddings that are there, finished or not."""
    pattern = re.compile(
        re.escape(file.stem) + r"(\.shard-\d+-of-\d+)\.(npy|csv|json)(\.part|\.before)?"
    )
    names = (pattern.fullmatch(name) for name in os.listdir(file.parent))
    return sorted({file.with_name(f"{file.stem}{name[1]}.npy") for name in names if name})


def take_back(file: Path) -> None:
    """Undo the renaming of a run that was killed in `EmbeddingWriter.finish`."""
    paths, parts = paths_of(file), paths_of(file, ".part")
    if parts["json"].exists() and not paths["json"].exists():
        for kind in ("npy", "csv"):
            if paths[kind].exists() and not parts[kind].exists():
                os.replace(paths[kind], parts[kind])


def remove_embeddings(file: Path) -> None:
    """Remove the three files, finished or not."""
    for ending in ("", ".part", ".before"):
        for path in paths_of(file, ending).values():
            path.unlink(missing_ok=True)
