"""Images to embed: the files of a folder, or the rows of a pre-processed data set, as the same centre crops."""

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

from datasets.arrays import Split
from datasets.views import _ahead, center_crop
from pre_process.image_arrays import UnreadableError, decode_image
from utils.errors import UserError


@dataclass(frozen=True)
class Crops:
    """Centre crops uint8 (b, crop, crop, 3) of the readable ones of some images; their numbers; the others' faults."""

    pixels: Tensor
    rows: list[int]
    unreadable: list[tuple[int, str]]  # number and reason


class FileSource:
    """Image files, squashed to `image_size` and cropped as pre-processing and evaluation do."""

    def __init__(self, paths: Sequence[Path], image_size: int) -> None:
        self.paths = [os.path.abspath(path) for path in paths]
        self.classes = [""] * len(self.paths)
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.paths)

    def fingerprint(self) -> str:
        """SHA-256 of paths, sizes and times of the last change of all files."""
        digest = hashlib.sha256()
        for path in self.paths:
            entry = os.stat(path)
            digest.update(os.fsencode(f"{path}\0{entry.st_size}\0{entry.st_mtime_ns}\0"))
        return digest.hexdigest()

    def batches(self, batch_size: int, workers: int, first: int = 0) -> Iterator[Crops]:
        """The crops of all images from number `first` on, in order, read ahead by threads."""

        def batch(start: int) -> Crops:
            squares, rows, unreadable = [], [], []
            for row in range(start, min(start + batch_size, len(self))):
                try:
                    squares.append(decode_image(self.paths[row], self.image_size))
                    rows.append(row)
                except UnreadableError as error:
                    unreadable.append((row, str(error)))
            images = np.stack(squares) if squares else np.empty((0, self.image_size, self.image_size, 3), np.uint8)
            return Crops(torch.from_numpy(center_crop(images)), rows, unreadable)

        yield from _ahead(batch, range(first, len(self), batch_size), workers, lambda: None)


class ArraySource:
    """The rows of some splits of a pre-processed data set, one split after the other."""

    def __init__(self, splits: Sequence[Split]) -> None:
        self.splits = list(splits)
        self.image_size = splits[0].image_size
        listed = [row for split in splits for row in listed_paths(split)]
        self.paths, self.classes = [path for path, _ in listed], [name for _, name in listed]

    def __len__(self) -> int:
        return sum(map(len, self.splits))

    def fingerprint(self) -> str:
        """The fingerprints of the images of all splits."""
        return "; ".join(split.fingerprint()["images"] for split in self.splits)

    def batches(self, batch_size: int, workers: int, first: int = 0) -> Iterator[Crops]:
        """The crops of all rows from number `first` on, in order; a batch holds rows of one split alone."""
        before = 0
        for split in self.splits:
            images = split.images

            def batch(start: int, images: np.ndarray = images, before: int = before) -> Crops:
                pixels = center_crop(images[start : start + batch_size])
                rows = range(before + start, before + start + len(pixels))
                return Crops(torch.from_numpy(pixels), list(rows), [])

            numbers = range(max(0, first - before), len(split), batch_size)
            yield from _ahead(batch, numbers, workers, split.check_unchanged)
            before += len(split)


def listed_paths(split: Split) -> list[tuple[str, str]]:
    """Path and class of every row: of the list beside the arrays; without one `<image file>#<row>` and the label."""
    table = split.path.with_name(split.path.name.replace("_img.npy", "_paths.csv"))
    if not table.is_file():
        labels = map(str, split.labels.tolist()) if split.labelled else [""] * len(split)
        return [(f"{os.path.abspath(split.path)}#{row}", label) for row, label in enumerate(labels)]
    rows = read_table(table, ("path", "class"))
    if len(rows) != len(split):
        raise UserError(f"{table}: lists {len(rows)} images, {split.path} holds {len(split)}; pre-process again")
    return rows


def read_table(file: Path, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Some columns of a CSV file, a row each. Raises UserError where the file or a column is missing."""
    try:
        with open(file, encoding="utf-8", errors="surrogateescape", newline="") as lines:
            table = csv.DictReader(lines)
            missing = [column for column in columns if column not in (table.fieldnames or ())]
            if missing:
                raise UserError(f"{file}: has no column {missing[0]}; make it again")
            return [tuple(row[column] or "" for column in columns) for row in table]
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; it belongs beside the arrays, make them again") from None
