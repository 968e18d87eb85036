"""A file of embeddings as it lies on the disk, and what is known of its rows.

`FILE.npy` holds the rows, `FILE.csv` what each row was made from (see `COLUMNS`), `FILE.json` the
facts: what was embedded, and by which network. `utils.embedding_store` writes the three; until all
is embedded, `FILE.parts` holds what there is.
"""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.tables import CSV_FORMAT

BLOCK = 1 << 14  # rows
COLUMNS = ("path", "class", "bytes", "modified_ns", "sha256")
NOT_COMPARED = ("checkpoint", "weights", "seed")  # the hash of the network says more
MOST_OPEN = 64  # arrays of known rows; each takes a file handle


@dataclass(frozen=True)
class Embeddings:
    """A file of embeddings.

    Attributes:
        file: FILE.npy.
        columns: of FILE.csv, each with N texts.
        facts: of FILE.json.
    """

    file: Path
    columns: dict[str, Sequence[str]]
    facts: dict

    @cached_property
    def rows(self) -> np.ndarray:
        """The rows (N, D), memory-mapped."""
        return open_rows(self.file)


class KnownRows:
    """Rows of files of embeddings, by image: by path, size and time of change, or by content."""

    def __init__(self, files: Sequence[Embeddings]) -> None:
        """Later files stand above earlier ones."""
        files = [file for file in files if set(COLUMNS) <= set(file.columns)]
        self._open_rows = lru_cache(MOST_OPEN)(open_rows)
        self._places: dict[str, dict] = {"path": {}, "sha256": {}}
        for file in files:
            places_in_file = [(file, row) for row in range(len(file.columns["path"]))]
            for name, places in self._places.items():
                places.update(zip(file.columns[name], places_in_file, strict=True))

    def __len__(self) -> int:
        """Return the number of paths."""
        return len(self._places["path"])

    def unchanged(
        self, path: str, size: int | str = "", modified_ns: int | str = ""
    ) -> tuple[str, np.ndarray] | None:
        """Return content hash and row of an image that is as it was, None if it is not."""
        if path not in self._places["path"]:
            return None
        file, row = self._places["path"][path]
        columns = file.columns
        before = (columns["bytes"][row], columns["modified_ns"][row])
        if before != (str(size), str(modified_ns)):
            return None
        return columns["sha256"][row], self._open_rows(file.file)[row]

    def of_content(self, sha256: str) -> np.ndarray | None:
        """Return the row of an image with these bytes, wherever it lay."""
        if sha256 not in self._places["sha256"]:
            return None
        file, row = self._places["sha256"][sha256]
        return self._open_rows(file.file)[row]


def open_rows(file: Path) -> np.ndarray:
    """Map an array. Raises UserError if it is none."""
    try:
        return np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
    except (ValueError, EOFError):
        raise UserError(
            f"{file}: not a .npy array, or truncated; overwrite it by embed.py"
        ) from None


def open_embeddings(file: Path) -> Embeddings:
    """Open a finished file of embeddings.

    Raises UserError if the file is missing, unfinished or not of embed.py.
    """
    if file.suffix != ".npy":
        raise UserError(f"{file}: the name must end in .npy; give a file of embed.py")
    paths = paths_of(file)
    if not paths["json"].exists():
        if parts_of(file).exists():
            raise UserError(f"{file}: is unfinished; run embed.py again")
        raise UserError(f"{paths['json']}: no such file; make it with embed.py")
    return open_files(paths)


def open_files(paths: dict[str, Path]) -> Embeddings:
    """Open three files that belong together. Raises UserError if they do not."""
    facts = read_facts(paths["json"])
    with open(paths["csv"], **CSV_FORMAT) as lines:
        table = csv.reader(lines)
        columns: dict[str, list[str]] = {name: [] for name in next(table, [])}
        is_whole = "path" in columns
        for texts in table:
            is_whole &= len(texts) == len(columns)
            for column, text in zip(columns.values(), texts, strict=False):
                column.append(text)
    shape = (len(columns.get("path", ())), facts.get("dimension"))
    if not is_whole or open_rows(paths["npy"]).shape != shape:
        raise UserError(
            f"{paths['npy']}: does not match its .csv and .json; overwrite it by embed.py"
        )
    return Embeddings(paths["npy"], columns, facts)


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


def paths_of(file: Path) -> dict[str, Path]:
    """Return the three files that belong together, by kind: npy, csv and json."""
    return {kind: file.with_suffix(f".{kind}") for kind in ("npy", "csv", "json")}


def parts_of(file: Path) -> Path:
    """Return the folder of what is embedded of an unfinished file."""
    return file.with_suffix(".parts")


def read_facts(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(f"{path}: was not written by embed.py; choose another name") from None
