"""Images in the cells of parquet files, as Hugging Face keeps them; read one at a time, however large the file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pre_process import image_arrays
from utils.errors import UserError
from utils.process import memory_limited

IMAGE, LABEL = "image", "label"  # the columns
BATCH = 16  # rows that are decoded together
BUFFER = 2**20  # bytes; without one a whole column of a row group would be held
MOST_MEMORY = 10**9  # bytes to read with: a hundred times what such files take
MEND = "download it again"


class ParquetImage(NamedTuple):
    """Where an image is: the row, from 0, in a row group of a file."""

    file: Path
    group: int
    row: int


def open_parquet(file: Path) -> Any:
    """The `pyarrow.parquet.ParquetFile`; `UserError` where pyarrow is missing, or the file or one of its columns."""
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # others reserve memory that no limit sees
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{file}: parquet files are read by pyarrow: pip install pyarrow, or use another copy"
        ) from None
    with reading(file):
        opened = pyarrow.parquet.ParquetFile(file, buffer_size=BUFFER)
    columns = opened.schema_arrow.names
    for column in (IMAGE, LABEL):
        if column not in columns:
            raise UserError(f"{file}: has no column {column!r} ({', '.join(columns)[:200]}); use a copy that has")
    return opened


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into a `UserError`; no more than `MOST_MEMORY` is taken."""
    try:
        with memory_limited(MOST_MEMORY):
            yield
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"{file}: claims more than {MOST_MEMORY // 10**6} MB; {MEND}") from None
    except Exception as error:  # the reader raises almost anything for damaged files
        what = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{file}: cannot be read as a parquet file ({what}); {MEND}") from None


def read_labels(file: Path) -> tuple[list[ParquetImage], list[Any], list[str]]:
    """All rows of a file in order: the place of each image and its label, a number or a text; the labels' names.

    The names are those that Hugging Face's library stores beside the columns; none where there are none.
    """
    opened = open_parquet(file)
    places, labels = [], []
    with reading(file):
        for group in range(opened.num_row_groups):
            for batch in opened.iter_batches(2**14, row_groups=[group], columns=[LABEL], use_threads=False):
                labels += batch.column(0).to_pylist()
            places += [ParquetImage(file, group, row) for row in range(len(labels) - len(places))]
        names = label_names(opened.schema_arrow.metadata or {})
    return places, labels, names


def label_names(metadata: dict[bytes, bytes]) -> list[str]:
    """The names of the classes in the metadata that Hugging Face's library writes; empty without them."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][LABEL]["names"]
    except (KeyError, TypeError, ValueError):
        return []
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def read_parquet_image(source: ParquetImage, image_size: int) -> np.ndarray:
    """`image_arrays.decode_image` of a cell, as it is stored; `UserError` for what cannot be read whole."""
    content = cells_of(source.file, source.group).get(source.row)
    where = f"{source.file}: row {source.row} of row group {source.group}"
    if not isinstance(content, bytes):
        raise UserError(f"{where}: holds no image; {MEND}")
    try:
        return image_arrays.decode_image(BytesIO(content), image_size, upright=False)
    except image_arrays.UnreadableError as error:
        raise UserError(f"{where}: {error}; {MEND}") from None


@lru_cache(maxsize=1)
def cells_of(file: Path, group: int) -> Cells:
    """The cells of the row group that is being read; rows are asked for in order."""
    return Cells(file, group)


class Cells:
    """The images of one row group, read forwards a few at a time; going back starts over."""

    def __init__(self, file: Path, group: int) -> None:
        self.file, self.group = file, group
        self.opened = open_parquet(file)
        self.rewind()

    def rewind(self) -> None:
        self.first, self.cells = 0, []
        self.batches = self.opened.iter_batches(BATCH, row_groups=[self.group], columns=[IMAGE], use_threads=False)

    def get(self, row: int) -> object:
        """The bytes in a row, from 0; something else where the column holds no images."""
        if row < self.first:
            self.rewind()
        with reading(self.file):
            while row >= self.first + len(self.cells):
                self.first += len(self.cells)
                self.cells = next(self.batches).column(0)
            cell = self.cells[row - self.first].as_py()
        return cell.get("bytes") if isinstance(cell, dict) else cell


def parquet_files(folder: Path, parts: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """The parquet files of `parts` (beginnings of names), in that order and each by name; and the others.

    Without any file of `parts` all files are taken. Raises `UserError` where one of several pieces is missing.
    """
    found = sorted(path for path in folder.glob("*.parquet") if not path.name.startswith("."))
    taken = [path for part in parts for path in found if path.name.startswith(part)] or found
    for path in taken:
        start, dash, end = path.stem.rpartition("-of-")
        head, _, number = start.rpartition("-")
        if dash and end.isdigit() and number.isdigit():
            for n in range(min(int(end), 1000)):
                piece = path.with_name(f"{head}-{n:0{len(number)}d}-of-{end}.parquet")
                if not piece.is_file():
                    raise UserError(f"{piece}: missing, one of {int(end)} pieces; download it, too")
    return taken, [path for path in found if path not in taken]
