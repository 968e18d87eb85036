"""The two halves of a data set -> its .npy files, in constant memory, all of them or none."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datasets.images import UnreadableError, decode_image
from pre_process.raw_lists import Half, check_sizes
from utils.errors import UserError
from utils.files import NpyWriter, check_writable, disk_faults, made_folder, written_whole
from utils.progress import progress
from utils.read_ahead import ReadAhead
from utils.signals import StopRequest
from utils.tables import write_table

ELSEWHERE = "make room there or choose another folder"

MakeRow = Callable[[Any, int], np.ndarray]
"""(source, image_size) -> uint8 (image_size, image_size, 3)."""


class Written(NamedTuple):
    """A half that was written."""

    file: Path  # of the images
    split: Half  # without the rows that were left out
    unreadable: list[tuple[Any, str]]  # source and reason of each row that was left out
    seconds: float
    n_equal: int  # rows that have the same pixels as another one


def read_image(path: Path, image_size: int) -> np.ndarray:
    """Decode an image of an archive as it is stored, see `datasets.images.decode_image`.

    Raises UserError if it cannot be read whole.
    """
    try:
        return decode_image(path, image_size, as_stored=True)
    except UnreadableError as error:
        raise UserError(f"{path}: {error}; unpack it again from the archive") from None


def write_splits(
    dataset: str,
    splits: Sequence[Half],
    out_dir: Path,
    make_row: MakeRow,
    image_size: int,
    workers: int = 1,
    skip_bad: bool = False,
) -> list[Written]:
    """Write images, labels and, if a split has them, paths and roles of all splits.

    The files are `<split>_<dataset>_<size>resized_img.npy`, uint8 (N, S, S, 3), `..._label.npy` and
    `..._role.npy`, int64 (N,), and `..._paths.csv` with path and class. They appear together when
    all are complete; a failure or a signal leaves the older ones as they were and nothing else.

    Args:
        workers: threads that make rows. The files do not depend on it.
        skip_bad: leave out the rows for which `make_row` raises `UnreadableError` and list them in
            `<dataset>_<size>resized_unreadable.csv`.

    Raises:
        UserError: `out_dir` is not writable, the disk is full, or what `make_row`
            raises.
    """
    check_writable(out_dir, ELSEWHERE)
    with StopRequest() as stop, made_folder(out_dir), ExitStack() as files:
        n_rows = sum(len(split.sources) for split in splits)
        check_space(out_dir, n_rows * (image_size**2 * 3 + 8))
        with stop.at_once():
            written = []
            for split in splits:
                make = partial(checked_row, make_row, image_size, skip_bad)
                rows = ReadAhead(make, split.sources, workers)
                stem = out_dir / f"{split.name}_{dataset}_{image_size}resized"
                written.append(write_split(files, stem, split, image_size, rows))
            name = out_dir / f"{dataset}_{image_size}resized_unreadable.csv"
            if not skip_bad:
                files.callback(name.unlink, missing_ok=True)  # what an earlier run left out
            else:
                table = [row for half in written for row in half.unreadable]
                write_table(files.enter_context(written_whole(name)), ("path", "reason"), table)
        # Leaving `files` renames all of them; a signal is only noted by now.
    return written


def write_split(
    files: ExitStack, stem: Path, split: Half, image_size: int, rows: Iterable[np.ndarray | str]
) -> Written:
    """Write the files of one split, which appear when `files` is left.

    Args:
        stem: the beginning of their paths.
        rows: of each source its pixels, or the reason why it is unreadable.
    """

    def beside(ending: str) -> Path:
        return files.enter_context(written_whole(Path(f"{stem}_{ending}")))

    started = time.perf_counter()
    file = Path(f"{stem}_img.npy")
    with disk_faults(file, ELSEWHERE):
        unreadable, n_equal = write_images(beside("img.npy"), split, image_size, rows)
        left_out = [(split.sources[row], reason) for row, reason in unreadable.items()]
        if left_out:
            split = split.keep([row for row in range(len(split.sources)) if row not in unreadable])
            check_sizes([split], stem.parent)
        write_integers(beside("label.npy"), split.labels)
        if split.roles:
            write_integers(beside("role.npy"), split.roles)
        if split.paths:
            write_table(beside("paths.csv"), ("path", "class"), path_rows(split))
    return Written(file, split, left_out, time.perf_counter() - started, n_equal)


def write_images(
    path: Path, split: Half, image_size: int, rows: Iterable[np.ndarray | str]
) -> tuple[dict[int, str], int]:
    """Write the readable rows into an .npy file.

    Returns number and reason of the others, and how many rows have the pixels of another one.
    """
    unreadable = {}
    contents: Counter[int] = Counter()
    with NpyWriter(path, "uint8", (image_size, image_size, 3)) as out:
        for number, row in enumerate(progress(rows, split.name, len(split.sources))):
            if isinstance(row, str):
                unreadable[number] = row
            else:
                out.write(row[None])
                contents[hash(row.tobytes())] += 1
    return unreadable, sum(count for count in contents.values() if count > 1)


def write_integers(path: Path, values: Sequence[int]) -> None:
    """Write an .npy file of int64."""
    with open(path, "wb") as out:  # np.save would add .npy to the path
        np.save(out, np.asarray(values, np.int64))


def path_rows(split: Half) -> Iterator[tuple[str, str]]:
    """Give path and class name of every row; the name is empty if there are no classes."""
    for path, label in zip(split.paths, split.labels, strict=True):
        yield path, split.classes[label - 1] if split.classes else ""


def check_space(folder: Path, needed: int) -> None:
    """Raise UserError if the disk of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: {needed / 1e6:,.1f} MB are to be written, {free / 1e6:,.1f} MB are free; "
            f"{ELSEWHERE}"
        )


def checked_row(
    make_row: MakeRow, image_size: int, skip_bad: bool, source: Any
) -> np.ndarray | str:
    """Make the row of a source; with `skip_bad` a text says why there is none."""
    try:
        row = make_row(source, image_size)
    except UnreadableError as error:
        if not skip_bad:
            raise
        return str(error)
    if row.shape != (image_size, image_size, 3) or row.dtype != np.uint8:
        raise ValueError(f"{source!r} made a row of shape {row.shape} and type {row.dtype}")
    return row
