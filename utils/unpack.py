"""Unpacking a stranger's .zip or .tgz: nothing lands outside the folder, nothing grows without end, nothing is half."""

from __future__ import annotations

import errno
import gzip
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO, NamedTuple

from tqdm import tqdm

from utils.process import memory_limited

MOST_TIMES = 5  # that an archive's content may be larger than itself: archives of images are hardly compressed
ALWAYS_ALLOWED = 64 * 2**20  # bytes, whatever the size of the archive
MOST_ENTRIES = 2_000_000
MOST_MEMORY = 10**9  # bytes for the lists and long names of an archive
CHUNK = 2**20


class UnpackError(Exception):
    """An archive that is damaged or hostile; the text says what is wrong, without the file's name."""


class Entry(NamedTuple):
    """A file (or, with `content` None, a folder) of an archive: its checked path and its bytes."""

    parts: tuple[str, ...]
    content: BinaryIO | None


def unpack(archive: Path, into: Path) -> list[Path]:
    """Unpack `archive` into the folder `into`; the files and folders at its top, in the order they were put there.

    Everything is written to a hidden folder beside and renamed once all of it is there: files first, then folders, so
    that a folder of images appears last. Only plain files and folders are unpacked: no links, no devices, no absolute
    paths, none with `..`, none twice, nothing over what is there; modes, owners and dates are the user's own.

    Raises `UnpackError` for an archive that holds anything else, is damaged, or unpacks to more than `MOST_TIMES` its
    size; nothing of it is left then. Raises OSError for a full disk.
    """
    for leftover in into.glob(f".{archive.name}.*.unpacking"):  # of a run that was killed
        shutil.rmtree(leftover)
    staging = into / f".{archive.name}.{os.getpid()}.unpacking"
    staging.mkdir()
    try:
        with memory_limited(MOST_MEMORY):
            write_entries(archive, staging)
        tops = sorted(staging.iterdir(), key=lambda path: (path.is_dir(), path.name))
        for top in tops:
            if os.path.lexists(into / top.name):
                raise UnpackError(f"holds {top.name}, which is in {into} already; move that away")
        return [top.rename(into / top.name) for top in tops]
    except MemoryError:
        raise UnpackError(f"takes more than {MOST_MEMORY // 10**6} MB of memory to read") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_entries(archive: Path, staging: Path) -> None:
    """Write every entry of `archive` below `staging`, under a progress bar."""
    limit = max(ALWAYS_ALLOWED, MOST_TIMES * archive.stat().st_size)
    with open(archive, "rb") as file:
        start = file.read(4)
    reader = zip_entries if start == b"PK\x03\x04" else tar_entries if start[:2] == b"\x1f\x8b" else None
    if reader is None:
        raise UnpackError("is no .zip and no .tgz archive")
    count = 0
    bar = tqdm(desc=f"unpacking {archive.name}", unit="B", unit_scale=True, leave=False, disable=None)
    try:
        with bar:
            for entry in reader(archive, limit):
                count += 1
                if count > MOST_ENTRIES:
                    raise UnpackError(f"holds more than {MOST_ENTRIES:,} files")
                size = write_entry(entry, staging)
                bar.update(size)
    except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError, zipfile.BadZipFile, ValueError,
            NotImplementedError, RuntimeError) as error:  # fmt: skip
        raise UnpackError(f"is damaged ({' '.join(str(error).split()) or type(error).__name__})") from None
    if not count:
        raise UnpackError("is empty")


def write_entry(entry: Entry, staging: Path) -> int:
    """Write one entry; its size, which the reader of the archive bounds."""
    path, name = staging.joinpath(*entry.parts), "/".join(entry.parts)
    try:
        (path if entry.content is None else path.parent).mkdir(parents=True, exist_ok=True)
        if entry.content is None:
            return 0
        out = open(path, "xb")  # noqa: SIM115
    except (FileExistsError, NotADirectoryError):  # also where the file system ignores case
        raise UnpackError(f"holds {name!r} twice") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UnpackError(f"holds {name!r}, a name that is too long") from None
        raise
    size = 0
    with out:
        while chunk := entry.content.read(CHUNK):
            size += out.write(chunk)
    return size


def too_large() -> UnpackError:
    return UnpackError(f"unpacks to more than {MOST_TIMES} times its size")


def safe_parts(name: str) -> tuple[str, ...]:
    """The folders and the file of an entry's path, () for the top itself; `UnpackError` if it leads elsewhere."""
    path = PureWindowsPath(name)  # knows drive letters, too
    if path.drive or path.root or ".." in path.parts or "\\" in name or not name.isprintable() or not name:
        raise UnpackError(f"holds the path {name!r}, which leads out of its folder or is none")
    return path.parts


# ------------------------------------------------------------------------------------------------- kinds of archive


def zip_entries(archive: Path, limit: int) -> Iterator[Entry]:
    """The entries of a zip archive, each with its checksum checked when it is read to its end."""
    with zipfile.ZipFile(archive) as file:
        infos = file.infolist()
        if sum(info.file_size for info in infos) > limit:
            raise too_large()
        for info in infos:
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise UnpackError(f"holds {info.filename!r}, which is a link or a device")
            parts = safe_parts(info.orig_filename)
            if info.is_dir():
                yield Entry(parts, None)
                continue
            with file.open(info) as content:
                yield Entry(parts, content)


def tar_entries(archive: Path, limit: int) -> Iterator[Entry]:
    """The entries of a gzipped tar archive, read once from start to end."""
    with gzip.open(archive) as unzipped, tarfile.open(fileobj=(stream := Bounded(unzipped, limit)), mode="r|") as file:
        for info in file:
            if not (info.isreg() or info.isdir()) or info.sparse is not None:
                raise UnpackError(f"holds {info.name!r}, which is a link or a device")
            parts = safe_parts(info.name)
            if info.isdir():
                yield Entry(parts, None)
            elif not parts:
                raise UnpackError(f"holds the path {info.name!r}, which is none")
            else:
                yield Entry(parts, file.extractfile(info))
        rest = b""
        while not rest.strip(b"\0") and (rest := file.fileobj.read(CHUNK)):
            pass  # to the end, where gzip's checksum is
        if rest.strip(b"\0") or stream.end.strip(b"\0"):
            raise UnpackError("is damaged (its list of files breaks off)")


class Bounded:
    """A stream that ends with `UnpackError` after `limit` bytes: headers count as well as files."""

    def __init__(self, stream: Any, limit: int) -> None:
        self.stream, self.left = stream, limit + 2**20  # headers and padding of an archive at its limit
        self.end = b""  # the last block that was read: zeros end a tar archive

    def read(self, size: int) -> bytes:
        chunk = self.stream.read(size)
        self.left -= len(chunk)
        if self.left < 0:
            raise too_large()
        self.end = (self.end + chunk)[-tarfile.BLOCKSIZE :]
        return chunk
