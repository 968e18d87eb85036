"""Images to embed, as center crops: files of a folder, or rows of a pre-processed data set."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from datasets.arrays import Split, beside
from datasets.images import UnreadableError, decode_image
from datasets.views import center_crop
from utils.embeddings import KnownRows
from utils.read_ahead import ReadAhead
from utils.tables import CSV_FORMAT


@dataclass(frozen=True)
class ImageBatch:
    """The center crops of a batch of images.

    Attributes:
        pixels: uint8 RGB (b, crop, crop, 3), of the readable images that have no known row.
        listed: path, class, size in bytes, time of change in ns and SHA-256 of each readable
            image; of a row of an array path and class alone.
        known_rows: the known row of each of these; None: its crop is among the pixels.
        unreadable: path and reason of each image that cannot be read.
        is_unchanged: whether all images are known by their paths.
    """

    pixels: Tensor
    listed: list[tuple[str, str, int | str, int | str, str]]
    known_rows: list[np.ndarray | None]
    unreadable: list[tuple[str, str]]
    is_unchanged: bool

    def rows(self, embed: Callable[[Tensor], np.ndarray] | None, dimension: int) -> np.ndarray:
        """Return all rows (b, D): known ones, and those that `embed` makes of pixels."""
        rows = np.empty((len(self.listed), dimension), np.float32)
        is_new = np.array([row is None for row in self.known_rows], bool)
        if is_new.any():
            rows[is_new] = embed(self.pixels)
        for number in np.flatnonzero(~is_new):
            rows[number] = self.known_rows[number]
        return rows


class _Image(NamedTuple):
    """What is read of an image file: `listed` and a row or pixels, or why it cannot be read."""

    listed: tuple = ()
    row: np.ndarray | None = None
    square: np.ndarray | None = None
    is_unchanged: bool = False
    fault: str = ""


class FileSource:
    """Image files, squashed to squares of `image_size` pixels as pre-processing does it.

    known_rows: rows of images that need no crop.
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
        self.known_rows = KnownRows([])

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
        paths = self.paths[start:stop]
        with ThreadPoolExecutor(self.workers) as pool:
            images = list(pool.map(self._read, paths))
        readable = [image for image in images if not image.fault]
        squares = [image.square for image in readable if image.row is None]
        pixels = np.array(squares, np.uint8).reshape(-1, self.image_size, self.image_size, 3)
        return ImageBatch(
            pixels=torch.from_numpy(center_crop(pixels)),
            listed=[image.listed for image in readable],
            known_rows=[image.row for image in readable],
            unreadable=[(p, i.fault) for p, i in zip(paths, images, strict=True) if i.fault],
            is_unchanged=all(image.is_unchanged for image in readable),
        )

    def part(self, number: int, count: int, batch_size: int) -> FileSource:
        """Return every `count`-th batch, from batch `number` on, as a source of its own."""
        starts = range(number * batch_size, len(self), count * batch_size)
        paths = [path for start in starts for path in self.paths[start : start + batch_size]]
        return FileSource(paths, self.image_size, self.workers)

    def _read(self, path: str) -> _Image:
        try:
            entry = os.stat(path)
            columns = (path, "", entry.st_size, entry.st_mtime_ns)
            same = self.known_rows.unchanged(path, entry.st_size, entry.st_mtime_ns)
            if same:
                return _Image((*columns, same[0]), same[1], is_unchanged=True)
            content = Path(path).read_bytes()
            sha256 = hashlib.sha256(content).hexdigest()
            row = self.known_rows.of_content(sha256)
            square = decode_image(content, self.image_size) if row is None else None
        except (OSError, UnreadableError) as error:
            return _Image(fault=getattr(error, "strerror", None) or str(error))
        return _Image((*columns, sha256), row, square)


class ArraySource:
    """The rows of the splits of a pre-processed data set, one split after the other."""

    def __init__(self, splits: Sequence[Split]) -> None:
        self.splits = splits
        self.known_rows = KnownRows([])
        self.image_size = splits[0].image_size
        self.listed = [(*row, "", "", "") for split in splits for row in listed_paths(split)]

    def __len__(self) -> int:
        return len(self.listed)

    def facts(self) -> dict:
        """Return size, number and fingerprint, of the pixels."""
        pixels = "; ".join(split.fingerprint()["images"] for split in self.splits)
        return _facts(self, pixels) | {"pixels": pixels}  # rows of other pixels are never known

    def crops(self, start: int, stop: int) -> ImageBatch:
        """Read the images from number `start` to before `stop`; they may lie in two splits."""
        listed = self.listed[start:stop]
        same = [self.known_rows.unchanged(path) for path, *_ in listed]
        known_rows = [None if match is None else match[1] for match in same]
        if None not in same:
            return ImageBatch(torch.empty(0, dtype=torch.uint8), listed, known_rows, [], True)
        parts = []
        first = 0
        for split in self.splits:
            rows = split.rows[max(0, start - first) : max(0, stop - first)]
            parts.append(center_crop(split.images)[rows])
            first += len(split)
        pixels = np.concatenate(parts)[[row is None for row in known_rows]]
        return ImageBatch(torch.from_numpy(pixels), listed, known_rows, [], False)


def _facts(source: FileSource | ArraySource, fingerprint: str) -> dict:
    return {"image_size": source.image_size, "images": len(source), "source": fingerprint}


def batches_of(source: FileSource | ArraySource, batch_size: int) -> ReadAhead:
    """Iterate crops (`ImageBatch`) in order, one batch ahead."""
    starts = range(0, len(source), batch_size)
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
