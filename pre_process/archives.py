"""Archives of raw data sets: .tgz, .zip, and parquet files of images."""

from __future__ import annotations

import json
import shutil
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from pre_process.car196_classes import class_names
from utils.errors import UserError


class UnusableError(UserError):
    """A source does not give its files."""


def unpack(archives: Sequence[Path], folder: Path) -> list[Path]:
    """Unpack archives into a hidden folder and move what they hold to `folder` when all is there.

    Returns:
        The files and folders at the top of the archives, in their new places.

    Raises:
        UnusableError: an archive is damaged or of another kind.
        UserError: something is in the way.
    """
    hidden = folder / f".{archives[0].name}.unpacking"
    shutil.rmtree(hidden, ignore_errors=True)  # of a run that was killed
    hidden.mkdir()
    try:
        for archive in archives:
            _unpack_one(archive, hidden)
        tops = sorted(hidden.iterdir())
        for top in tops:
            if (folder / top.name).exists():
                raise UserError(f"{folder / top.name}: is there already; move it away")
        return [top.rename(folder / top.name) for top in tops]
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _unpack_one(archive: Path, into: Path) -> None:
    """Unpack one archive; no file of it gets a place outside `into`."""
    try:
        if archive.suffix == ".parquet":
            _unpack_parquet(archive, into)
        elif zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as content:
                content.extractall(into)
        else:
            with tarfile.open(archive) as content:
                content.extractall(into, filter="data")
    except Exception as error:  # the readers raise almost anything for damaged files
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk
        raise UnusableError(f"{archive}: cannot be unpacked ({error}); delete it") from None


def _unpack_parquet(file: Path, into: Path) -> None:
    """Write the images of a parquet file of Cars196 to `into/<part>/<class>/`, one after another.

    Args:
        file: `<part>-00000-of-00002.parquet` with the columns image (a struct with the bytes of a
            file) and label (from 0 on, in the order of the names that are stored with it, else in
            the official order).
    """
    from pyarrow.parquet import ParquetFile

    table = ParquetFile(file)
    names = _label_names(table.schema_arrow.metadata or {}) or class_names()
    part = file.name.partition("-")[0]
    rows = (row for batch in table.iter_batches(16) for row in batch.to_pylist())
    for number, row in enumerate(rows):
        folder = into / part / names[row["label"]].replace("/", "-")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{file.stem}_{number:05d}.jpg").write_bytes(row["image"]["bytes"])


def _label_names(metadata: dict[bytes, bytes]) -> list[str]:
    """Read the names of the labels in the metadata that Hugging Face's library writes, if any."""
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return features.get("label", {}).get("names", [])
