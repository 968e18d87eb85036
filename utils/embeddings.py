"""A file of embeddings as it lies on the disk, and what is known of its rows.

`FILE.npy` holds the rows, `FILE.csv` what each row was made from (see `COLUMNS`), `FILE.json` the
facts: what was embedded, and by which network. `utils.embedding_writer` writes the three; until all
is embedded their names end in `.part`.
"""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Sequence
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.errors import UserError
from utils.tables import CSV_FORMAT

BLOCK = 1 << 14  # rows
COLUMNS = ("path", "class", "bytes", "modified_ns", "sha256")
NOT_COMPARED = ("checkpoint", "weights", "seed")  # the hash of the network says more


class Embeddings(NamedTuple):
    """A file of embeddings."""

    rows: np.ndarray  # (N, D), memory-mapped
    columns: dict[str, Sequence[str]]  # of FILE.csv, each with N texts
    facts: dict  # of FILE.json


class KnownRows:
    """Rows of earlier files, by image: by path, size and time of change, or by content."""

    def __init__(self, files: Sequence[Embeddings]) -> None:
        """Later files stand above earlier ones."""
        self._files = [file for file in reversed(files) if set(COLUMNS) <= set(file.columns)]
        self._numbers = {
            name: [dict(zip(file.columns[name], count())) for file in self._files]
            for name in ("path", "sha256")
        }

        self.sizes = {size for file in self._files for size in file.columns["bytes"]}

    def count_paths(self) -> int:
        """Return the number of paths that rows were made from."""
        return len(set().union(*self._numbers["path"]))

    def __contains__(self, path: str) -> bool:
        """Return whether a row was made from a file of this path."""
        return self._find("path", path) is not None

    def unchanged(self, path: str, entry: os.stat_result) -> tuple[str, np.ndarray] | None:
        """Return content hash and row of a file that is as it was, None if it is not."""
        place = self._find("path", path)
        if place is None:
            return None
        file, row = place
        size, modified, sha256 = (file.columns[name][row] for name in COLUMNS[2:])
        if (size, modified) != (str(entry.st_size), str(entry.st_mtime_ns)):
            return None
        return sha256, file.rows[row]

    def of_content(self, sha256: str) -> np.ndarray | None:
        """Return the row of an image with these bytes, wherever it lay."""
        place = self._find("sha256", sha256)
        return place and place[0].rows[place[1]]

    def _find(self, column: str, text: str) -> tuple[Embeddings, int] | None:
        """Return the file and the number of the row that has a text in a column."""
        for file, numbers in zip(self._files, self._numbers[column], strict=True):
            if text in numbers:
                return file, numbers[text]
        return None


def open_embeddings(file: Path) -> Embeddings:
    """Open a finished file of embeddings.

    Raises UserError if the file is missing, unfinished or not of embed.py.
    """
    if file.suffix != ".npy":
        raise UserError(f"{file}: the name must end in .npy; give a file of embed.py")
    paths = paths_of(file)
    if not paths["json"].exists():
        if paths_of(file, ".part")["json"].exists():
            raise UserError(f"{file}: is unfinished; run embed.py again")
        raise UserError(f"{paths['json']}: no such file; make it with embed.py")
    return open_files(paths)


def open_files(paths: dict[str, Path]) -> Embeddings:
    """Open files of embeddings; of unfinished ones the part that is safe on the disk."""
    facts = read_facts(paths["json"])
    n_rows = facts["progress"][1] if "progress" in facts else facts.get("rows")
    try:
        rows = np.asarray(np.load(paths["npy"], mmap_mode="r", allow_pickle=False))
        if "progress" in facts:
            rows = rows[:n_rows]  # a kill may have come before the last number was written
    except (ValueError, EOFError):
        raise UserError(f"{paths['npy']}: not a .npy array, or truncated; embed again") from None
    with open(paths["csv"], **CSV_FORMAT) as lines:
        table = csv.reader(lines)
        columns: dict[str, list[str]] = {name: [] for name in next(table, [])}
        is_whole = "path" in columns
        for texts in islice(table, n_rows):
            is_whole &= len(texts) == len(columns)
            for column, text in zip(columns.values(), texts, strict=False):
                column.append(text)
    shape = (len(columns.get("path", ())), facts.get("dimension"))
    if not is_whole or rows.shape != shape:
        raise UserError(f"{paths['npy']}: does not match its .csv and .json; embed again")
    return Embeddings(rows, columns, facts)


def check_apart(outputs: Sequence[str | None], embeddings: Embeddings) -> None:
    """Raise UserError if a file to write is one of the embedded images."""
    for output in filter(os.path.exists, filter(None, outputs)):
        name = os.path.basename(os.path.realpath(output))
        namesakes = (p for p in embeddings.columns["path"] if os.path.basename(p) == name)
        if any(os.path.exists(path) and os.path.samefile(path, output) for path in namesakes):
            raise UserError(f"{output}: is one of the embedded images; choose another name")


def count_equal(rows: np.ndarray) -> int:
    """Return how many rows (N, D) are equal to another one, to three digits."""
    counts: Counter[int] = Counter()
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK].astype(np.float32).round(3) + 0.0  # no negative zero
        counts.update(hash(row.tobytes()) for row in block)
    return sum(count for count in counts.values() if count > 1)


def paths_of(file: Path, ending: str = "") -> dict[str, Path]:
    """Return the three files that belong together, by kind: npy, csv and json."""
    return {kind: file.with_suffix(f".{kind}{ending}") for kind in ("npy", "csv", "json")}


def read_facts(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(f"{path}: was not written by embed.py; choose another name") from None
