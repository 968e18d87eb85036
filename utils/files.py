"""Writing files whole: beside, flushed to the disk, renamed."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from utils.errors import UserError


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it is flushed and renamed to `path`, else it is removed.

    A reader sees the old file or the new one, never half of one. Raises what the writing raises, FileNotFoundError
    when the folder does not exist.
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
    except BaseException:
        with suppress(OSError):  # the first fault is the one to report
            beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write `content` as indented JSON, whole (see `written_whole`)."""
    with written_whole(path) as beside:
        beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_target(target: str, ending: str = "") -> None:
    """Raise UserError unless a file can be written under the name `target`, which is to end in `ending`."""
    path = Path(os.path.realpath(target))
    if path.is_dir():
        raise UserError(f"{target}: is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise UserError(f"{target}: its folder does not exist; make it first")
    if not target.endswith(ending):
        raise UserError(f"{target}: the name must end in {ending}")
    check_writable(path.parent, "choose another place for the file")


def lock_open_file(handle: int) -> bool:
    """Take the lock of an open file or folder until it is closed; False if another process has it.

    True without a lock where the system or the file system has none.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def check_writable(folder: Path, advice: str) -> None:
    """Raise UserError, ending in `advice`, unless `folder` can be written in or can be made. Nothing is made here."""
    place = folder.absolute()
    try:
        place.exists()  # raises for a name that is too long
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


def lock_folder(folder: Path, held: str) -> int | None:
    """Take the lock of a folder until the handle that this returns is closed; None on Windows, which opens no folders.

    Raises UserError, the folder and `held`, if another process has it.
    """
    if os.name == "nt":
        return None
    handle = os.open(folder, os.O_RDONLY)
    if not lock_open_file(handle):
        os.close(handle)
        raise UserError(f"{folder}: {held}")
    return handle


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make `folder` and those above it for a block; if the block fails, remove the empty ones among those made.

    Raises what making a folder raises.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]  # the innermost first
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for place in missing:
            with suppress(OSError):
                place.rmdir()
        raise


def sync_folder(folder: str | os.PathLike) -> None:
    """Flush a folder's entries, so that a rename in it survives a power cut; nothing where the system cannot."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
