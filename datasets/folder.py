"""Images to embed, as center crops: files of a folder, or rows of a pre-processed data set."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.arrays import Split, beside
from datasets.images import UnreadableError, decode_image
from datasets.views import center_crop, read_ahead


@dataclass(frozen=True)
class ImageBatch:
    """The center crops of a batch of images.

    Attributes:
        pixels: uint8 RGB (b, crop, crop, 3), of the images that can be read.
        listed: path and class of each of these.
        unreadable: path and reason of each image that cannot be read.
    """

    pixels: Tensor
    listed: list[tuple[str, str]]
    unreadable: list[tuple[str, str]]


class FileSource:
    """Image files, squashed to squares of `image_size` pixels as pre-processing does it."""

    def __init__(self, paths: Sequence[str | os.PathLike], image_size: int) -> None:
        self.paths = [os.path.abspath(path) for path in paths]
        self.image_size = image_size

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
        unreadable = []
        for path in self.paths[start:stop]:
            try:
                squares.append(decode_image(path, self.image_size))
                listed.append((path, ""))
            except UnreadableError as error:
                unreadable.append((path, str(error)))
        images = np.array(squares, np.uint8).reshape(-1, self.image_size, self.image_size, 3)
        return ImageBatch(torch.from_numpy(center_crop(images)), listed, unreadable)


class ArraySource:
    """The rows of the splits of a pre-processed data set, one split after the other."""

    def __init__(self, splits: Sequence[Split]) -> None:
        self.splits = splits
        self.image_size = splits[0].image_size
        self.listed = [row for split in splits for row in listed_paths(split)]

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
        return ImageBatch(torch.from_numpy(np.concatenate(parts)), self.listed[start:stop], [])


def _facts(source: FileSource | ArraySource, fingerprint: str) -> dict:
    return {"image_size": source.image_size, "images": len(source), "source": fingerprint}


def batches_of(
    source: FileSource | ArraySource, batch_size: int, workers: int, first: int = 0
) -> Iterator[ImageBatch]:
    """Iterate the crops of all images from number `first` on, in order, read ahead by threads."""
    starts = range(first, len(source), batch_size)
    return read_ahead(lambda start: source.crops(start, start + batch_size), starts, workers)


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
    with open(file, encoding="utf-8", errors="surrogateescape", newline="") as lines:
        return [(row["path"], row["class"]) for row in csv.DictReader(lines)]
