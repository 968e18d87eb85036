"""Images to embed, as center crops: files of a folder, or rows of a pre-processed data set."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.arrays import Split, beside
from datasets.images import UnreadableError, decode_image
from datasets.views import center_crop
from utils.embeddings import KnownRows
from utils.read_ahead import ReadAhead
from utils.tables import CSV_FORMAT

LEAST_SHARED = 0.25  # of known rows, or else a folder is another one
FILES_THAT_TELL = 20  # whether a folder is one that was embedded under another name


@dataclass(frozen=True)
class ImageBatch:
    """The center crops of a batch of images.

    Attributes:
        pixels: uint8 RGB (b, crop, crop, 3), of the readable images that have no earlier row.
        listed: path, class, size in bytes, time of change in ns and SHA-256 of each image that
            has a row; of a row of an array path and class alone.
        earlier: the row of each of these that an earlier file has; None: its crop is among the
            pixels.
        unreadable: path and reason of each image that cannot be read.
    """

    pixels: Tensor
    listed: list[tuple[str, str, int | str, int | str, str]]
    earlier: list[np.ndarray | None]
    unreadable: list[tuple[str, str]]

    def rows(self, embed: Callable[[Tensor], np.ndarray] | None, dimension: int) -> np.ndarray:
        """Return all rows (b, D): earlier ones, and those that `embed` makes of pixels."""
        rows = np.empty((len(self.listed), dimension), np.float32)
        is_new = np.array([row is None for row in self.earlier], bool)
        if is_new.any():
            rows[is_new] = embed(self.pixels)
        for number in np.flatnonzero(~is_new):
            rows[number] = self.earlier[number]
        return rows


class FileSource:
    """Image files, squashed to squares of `image_size` pixels as pre-processing does it.

    earlier_rows: rows that need no crop, if set.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike],
        image_size: int,
        workers: int = 1,
    ) -> None:
        """workers: threads that decode."""
        self.paths = [os.path.abspath(path) for path in paths]
        self.image_size = image_size
        self.workers = max(1, workers)
        self.earlier_rows: KnownRows | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def facts(self) -> dict:
        """Return size, number and fingerprint, of paths, file sizes and times of change."""
        digest = hashlib.sha256()
        for path in self.paths:
            entry = os.stat(path)
            digest.update(os.fsencode(f"{path}\0{entry.st_size}\0{entry.st_mtime_ns}\0"))
        return _facts(self, digest.hexdigest())

    def crops(self, start: int, stop: int) -> ImageBatch:
        """Read the images from number `start` to before `stop`."""
        squares = []
        listed = []
        earlier = []
        unreadable = []
        paths = self.paths[start:stop]
        with ThreadPoolExecutor(self.workers) as pool:
            images = zip(paths, pool.map(self._read, paths), strict=True)
            for path, (columns, row, square) in images:
                if isinstance(square, str):
                    unreadable.append((path, square))
                    continue
                listed.append((path, "", *columns))
                earlier.append(row)
                if row is None:
                    squares.append(square)
        pixels = np.array(squares, np.uint8).reshape(-1, self.image_size, self.image_size, 3)
        return ImageBatch(torch.from_numpy(center_crop(pixels)), listed, earlier, unreadable)

    def part(self, number: int, count: int, batch_size: int) -> FileSource:
        """Return every `count`-th batch, from batch `number` on, as a source of its own."""
        starts = range(number * batch_size, len(self), count * batch_size)
        paths = [path for start in starts for path in self.paths[start : start + batch_size]]
        return FileSource(paths, self.image_size, self.workers)

    def shares_images(self, earlier_rows: KnownRows) -> bool:
        """Return whether a quarter of the known rows, or more, are of these images.

        How many of the others are renamed is told by the content of a few that have a known size.
        """
        least = earlier_rows.count_paths() * LEAST_SHARED
        others = [path for path in self.paths if path not in earlier_rows]
        n_same = len(self) - len(others)
        if n_same >= least:
            return True
        of_size = [p for p in others if str(os.path.getsize(p)) in earlier_rows.sizes]
        contents = list(map(file_hash, of_size[:FILES_THAT_TELL]))
        n_renamed = sum(earlier_rows.of_content(sha256) is not None for sha256 in contents)
        return n_same + n_renamed * len(of_size) / max(1, len(contents)) >= least

    def _read(self, path: str) -> tuple[tuple, np.ndarray | None, np.ndarray | str | None]:
        """Return columns, known row and pixels of an image, or a text why it cannot be read."""
        try:
            entry = os.stat(path)
            columns = (entry.st_size, entry.st_mtime_ns)
            same = self.earlier_rows.unchanged(path, entry) if self.earlier_rows else None
            if same:
                return (*columns, same[0]), same[1], None
            content = Path(path).read_bytes()
            sha256 = hashlib.sha256(content).hexdigest()
            row = self.earlier_rows.of_content(sha256) if self.earlier_rows else None
            square = None if row is not None else decode_image(content, self.image_size)
        except (OSError, UnreadableError) as error:
            return (), None, getattr(error, "strerror", None) or str(error)
        return (*columns, sha256), row, square


class ArraySource:
    """The rows of the splits of a pre-processed data set, one split after the other."""

    def __init__(self, splits: Sequence[Split]) -> None:
        self.splits = splits
        self.earlier_rows: KnownRows | None = None  # of whole data sets no row is taken over
        self.image_size = splits[0].image_size
        self.listed = [(*row, "", "", "") for split in splits for row in listed_paths(split)]

    def __len__(self) -> int:
        return len(self.listed)

    def facts(self) -> dict:
        """Return size, number and fingerprint, of the pixels."""
        return _facts(self, "; ".join(split.fingerprint()["images"] for split in self.splits))

    def crops(self, start: int, stop: int) -> ImageBatch:
        """Read the images from number `start` to before `stop`; they may lie in two splits."""
        parts = []
        first = 0
        for split in self.splits:
            rows = split.rows[max(0, start - first) : max(0, stop - first)]
            parts.append(center_crop(split.images)[rows])
            first += len(split)
        listed = self.listed[start:stop]
        pixels = torch.from_numpy(np.concatenate(parts))
        return ImageBatch(pixels, listed, [None] * len(listed), [])

    def shares_images(self, earlier_rows: KnownRows) -> bool:
        """Return whether some of the images are listed among known rows."""
        return any(row[0] in earlier_rows for row in self.listed)


def file_hash(path: str) -> str:
    """Return the SHA-256 of a file, "" if it cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return ""


def _facts(source: FileSource | ArraySource, fingerprint: str) -> dict:
    return {"image_size": source.image_size, "images": len(source), "source": fingerprint}


def batches_of(source: FileSource | ArraySource, batch_size: int, first: int = 0) -> ReadAhead:
    """Iterate crops (`ImageBatch`) from image number `first` on, in order, one batch ahead."""
    starts = range(first, len(source), batch_size)
    return ReadAhead(lambda start: source.crops(start, start + batch_size), starts, workers=1)


def listed_paths(split: Split) -> list[tuple[str, str]]:
    """Return path and class of each image, from the list beside the arrays.

    Without such a list the path is `<image file>#<row>`, and the class is the label.
    """
    table = beside(split.path, "paths.csv")
    if table.is_file():
        listed = _read_list(table)
        return [listed[row] for row in split.rows]
    file = os.path.abspath(split.path)
    classes = map(str, split.labels) if split.labeled else [""] * len(split)
    return [(f"{file}#{row}", name) for row, name in zip(split.rows, classes, strict=True)]


def _read_list(file: Path) -> list[tuple[str, str]]:
    with open(file, **CSV_FORMAT) as lines:
        return [(row["path"], row["class"]) for row in csv.DictReader(lines)]
