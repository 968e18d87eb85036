"""Writing files whole: beside, flushed to the disk, renamed."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

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
