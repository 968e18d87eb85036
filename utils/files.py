"""Files that are written whole: beside their place, flushed to the disk, renamed."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np

from utils.errors import UserError


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success flush it and rename it to `path`, else
    remove it.

    A reader sees the old file or the new one, never a part of one. Raises what the writing raises,
    an OSError with the name of the file, and FileNotFoundError if the folder does not exist.
    """
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "its folder does not exist", str(path))
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)
        raise
    sync_folder(path.parent)


class NpyWriter:
    """Writes an .npy file some rows after the others, byte for byte as numpy saves all of them.

    Attributes:
        n_rows: rows written so far.
    """

    def __init__(self, path: str | os.PathLike, dtype: str, row_shape: tuple[int, ...]) -> None:
        self.n_rows = 0
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._row_shape = row_shape
        self._file = open(path, "wb")  # noqa: SIM115
        self._write_header()

    def _write_header(self) -> None:
        """Write the header, whose length does not depend on the number of rows."""
        shape = (self.n_rows, *self._row_shape)
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)

    def write(self, rows: np.ndarray) -> None:
        """Write rows (n, *row_shape)."""
        self._file.write(rows.astype(self._dtype, copy=False).tobytes())
        self.n_rows += len(rows)

    def __enter__(self) -> NpyWriter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        with self._file:
            if kind is None:
                self._file.seek(0)
                self._write_header()


@contextmanager
def disk_faults(path: str | os.PathLike, advice: str) -> Iterator[None]:
    """Turn an OSError in the block into a UserError that names `path` and ends in `advice`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); {advice}") from None


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text in UTF-8, whole (see `written_whole`); bytes of odd file names become "?"."""
    with written_whole(path) as beside:
        beside.write_text(text, encoding="utf-8", errors="replace")


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write `content` as indented JSON, whole (see `written_whole`)."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def check_target(target: str, ending: str = "") -> None:
    """Raise UserError unless a file can be written under the name `target`, which must end in
    `ending`.
    """
    path = Path(os.path.realpath(target))
    if path.is_dir():
        raise UserError(f"{target}: is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise UserError(f"{target}: its folder does not exist; make it first")
    if not target.endswith(ending):
        raise UserError(f"{target}: the name must end in {ending}")
    check_writable(path.parent, "choose another place for the file")


def check_writable(folder: Path, advice: str) -> None:
    """Raise UserError, ending in `advice`, unless `folder` can be written in or can be made. Makes
    nothing.
    """
    place = folder.absolute()
    try:
        place.exists()  # raises if the name is too long
        while not os.path.lexists(place):
            place = place.parent
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; {advice}") from None
    if not place.is_dir():
        raise UserError(f"{folder}: {place} is not a folder; {advice}")
    try:
        TemporaryFile(dir=place).close()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error.strerror}); {advice}") from None


class FolderLock:
    """Keeps other processes out of a folder until `release`.

    Where the system or the file system has no locks, nothing is locked.
    """

    def __init__(self, folder: Path, fault: str, is_shared: bool = False) -> None:
        """Take the lock. Raises UserError with the text `fault` if another process has it.

        is_shared: let in others that share it, too.
        """
        self._handle: int | None = None
        if os.name == "nt":  # Windows opens no folders
            return
        import fcntl

        self._handle = os.open(folder, os.O_RDONLY)
        kind = fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX
        try:
            fcntl.flock(self._handle, kind | fcntl.LOCK_NB)
            is_there = os.path.samestat(os.stat(folder), os.fstat(self._handle))
        except OSError as error:
            is_there = error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.ENOENT)
        if not is_there:
            self.release()
            raise UserError(fault)

    def release(self) -> None:
        """Give the lock back; again is harmless."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make `folder` and its parents for a block; if the block fails, remove the empty ones that it
    made.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for place in missing:
            with suppress(OSError):
                place.rmdir()
        raise


def sync_folder(folder: str | os.PathLike) -> None:
    """Flush the entries of a folder, so that a rename survives a power cut, where the system can
    do that.
    """
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
