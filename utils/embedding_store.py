"""Embeddings on the way to their file: kept in chunks, then joined.

While images are embedded, the folder `FILE.parts` collects chunks: finished files of embeddings
(see `utils.embeddings`), each of some seconds of work. Processes that embed parts of the same
images add theirs to the same folder. Whoever goes on knows the rows of all chunks, and those of an
earlier FILE.npy. At the end all rows are written in order to `FILE.parts/joined.npy`, and moved
from there.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import numpy as np

from utils.embeddings import (
    COLUMNS,
    NOT_COMPARED,
    Embeddings,
    KnownRows,
    open_files,
    parts_of,
    paths_of,
    read_facts,
)
from utils.errors import UserError
from utils.files import (
    FolderLock,
    NpyWriter,
    disk_faults,
    sync_folder,
    write_json,
    written_whole,
)
from utils.tables import CSV_FORMAT, csv_writer

SAVE_EVERY = 10.0  # seconds of work that a kill may cost
JOINED = "joined.npy"
ADVICE = "choose another name, or overwrite it"
NO_ROOM = "make room; the same command goes on"


class EmbeddingStore:
    """Collects embeddings of images, batch by batch, and joins them to a file.

    Attributes:
        is_complete: whether the file has all images already.
        earlier: the file as it was, of the same network; None if there was none.
    """

    def __init__(
        self, file: Path, facts: dict, overwrite: bool = False, is_shared: bool = False
    ) -> None:
        """Open what is there.

        Args:
            facts: content of `FILE.json`, with `dimension` D and `dtype` of the rows.
            overwrite: replace what is there, and use only its rows of the same network.
            is_shared: let other processes embed parts of the same images meanwhile.

        Raises UserError if a file of another network or of another folder is there, or another
        process is writing it.
        """
        self.file = file
        self.facts = facts
        self._overwrite = overwrite
        self._batches: list[tuple[np.ndarray, Sequence[tuple]]] = []
        self._last_save = time.monotonic()
        self._folder = parts_of(file)
        self._is_shared = is_shared
        with disk_faults(file, "choose another place for it"):
            self._folder.mkdir(exist_ok=True)
        self._lock = FolderLock(self._folder, f"{file}: another process is writing it", is_shared)
        try:
            if not is_shared:
                self._publish()
            self.earlier = self._open(paths_of(file))
            self._check_free()
            self.is_complete = (
                self.earlier is not None
                and self.earlier.facts.get("source") == facts["source"]
                and not self.earlier.facts["unreadable"]
            )
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> EmbeddingStore:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.save()
        finally:
            self.close()

    def known_rows(self) -> KnownRows:
        """Open the rows of the same network that are there already."""
        files = [self.earlier]
        for path in sorted(self._folder.glob("*.json")):
            with suppress(FileNotFoundError):  # its process has just been joined
                files.append(self._open(paths_of(path)))
        return KnownRows([file for file in files if file])

    def add(self, rows: np.ndarray, listed: Sequence[tuple]) -> None:
        """Take the embeddings (b, D) of a batch, with the columns of each row."""
        self._batches.append((rows, listed))
        if time.monotonic() - self._last_save >= SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Write what was added since the last time as a chunk."""
        batches = [(rows, listed, []) for rows, listed in self._batches if len(rows)]
        self._batches = []
        if batches:
            self._folder.mkdir(exist_ok=True)
            self._write(paths_of(self._folder / f"{uuid4().hex}.npy"), batches)
        self._last_save = time.monotonic()

    def join(self, batches: Iterable[tuple[np.ndarray, Sequence[tuple], list]]) -> str:
        """Write the file, from the rows, their columns and the unreadable images of each batch.

        Returns what has changed since the earlier file, in words; "" if there was none.
        """
        joined = paths_of(self._folder / JOINED)
        self._write(joined, batches)
        changes = _changes(self.earlier, open_files(joined)) if self.earlier else ""
        self._publish()
        return changes

    def close(self) -> None:
        """Let other processes have the files."""
        if not self._is_shared:
            with suppress(OSError):  # it holds something, or is gone
                self._folder.rmdir()
        self._lock.release()

    def _write(self, paths: dict[str, Path], batches: Iterable[tuple]) -> None:
        """Write three files whole, FILE.json last: without it the others do not count."""
        unreadable = []
        with (
            disk_faults(self.file, NO_ROOM),
            written_whole(paths["npy"]) as npy,
            written_whole(paths["csv"]) as csv,
            NpyWriter(npy, self.facts["dtype"], (self.facts["dimension"],)) as array,
            open(csv, "w", **CSV_FORMAT) as lines,
        ):
            table = csv_writer(lines)
            table.writerow(COLUMNS)
            for rows, listed, bad in batches:
                array.write(rows)
                table.writerows(listed)
                unreadable += bad
            if array.n_rows == 0:
                raise UserError(f"{self.file}: none of the images can be read")
        facts = self.facts | {"rows": array.n_rows, "unreadable": unreadable}
        with disk_faults(self.file, NO_ROOM):
            write_json(paths["json"], facts)

    def _publish(self) -> None:
        """Move the joined files to their names, or go on with that after a kill."""
        joined, paths = paths_of(self._folder / JOINED), paths_of(self.file)
        if not joined["json"].exists():
            return
        with disk_faults(self.file, NO_ROOM):
            paths["json"].unlink(missing_ok=True)
            for kind in ("npy", "csv", "json"):
                if joined[kind].exists():
                    os.replace(joined[kind], paths[kind])
        sync_folder(self.file.parent)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _check_free(self) -> None:
        """Raise UserError if a file that is not of embed.py has one of the names."""
        if not self._overwrite and not self.earlier:
            for path in paths_of(self.file).values():
                if path.exists():
                    raise UserError(
                        f"{path}: is there without the other two files of embed.py; {ADVICE}"
                    )

    def _open(self, paths: dict[str, Path]) -> Embeddings | None:
        """Open files of the same network, None if some are missing.

        Files of another network or folder are an error, unless they may be overwritten: then those
        of another network count as missing, while rows of the same images elsewhere are kept.
        """
        if not all(path.exists() for path in paths.values()):
            return None
        facts = read_facts(paths["json"])
        for name, value in self.facts.items():
            if name in (*NOT_COMPARED, "source", "images") or facts.get(name) == value:
                continue
            if not self._overwrite:
                change = f"{name} was {facts.get(name)} and is {value}"
                raise UserError(f"{paths['json']}: {change}; {ADVICE}")
            if name != "folder":
                return None
        return open_files(paths)


def _changes(earlier: Embeddings, joined: Embeddings) -> str:
    """Say how many images are new, changed, renamed and gone since the earlier file."""
    before, now = (
        set(zip(file.columns["path"], file.columns["sha256"], strict=True))
        for file in (earlier, joined)
    )
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
