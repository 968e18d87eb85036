"""What every pre-processing script shares: lists of images -> two splits -> rows of the final .npy files.

The order of this file is the order of a run: options, raw files, splits, one image, all images.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from multiprocessing import get_context, parent_process
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from utils.arguments import Parser, path_name, whole
from utils.errors import UserError, run_script
from utils.files import check_writable, made_folder, written_whole

IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")  # none of these starts another program
ROWS_PER_TASK = 16  # small: the last worker is never busy for long, and Ctrl-C waits for one task at most
SMALLEST_IMAGE_SIZE, LARGEST_IMAGE_SIZE = 8, 4096
FIRST_UNREADABLE = 3  # unreadable images that an error names
MEND = "restore the list from the original archive"

QUERY, GALLERY = 0, 1  # roles: the queries search the gallery alone

MakeRow = Callable[[Any, int], np.ndarray]


# ---------------------------------------------------------------------------------------------------- options


def option_parser(dataset: str, description: str, image_size: int = 256) -> Parser:
    """The options that all scripts have; a script adds its own. `image_size` is the default side in pixels."""
    parser = Parser(description=description)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--data_dir", type=folder, default=Path("data"), help=f"the folder that holds {dataset}/, or that folder itself"
    )
    files.add_argument(
        "--out_dir",
        type=folder,
        default=argparse.SUPPRESS,
        help=f"where the .npy files go; created where it is missing (default: the {dataset} folder of --data_dir)",
    )
    work = parser.add_argument_group("work")
    work.add_argument(
        "--image_size",
        type=whole(SMALLEST_IMAGE_SIZE, LARGEST_IMAGE_SIZE),
        default=image_size,
        metavar="PIXELS",
        help="side of the square images that are written; it is part of the files' names",
    )
    work.add_argument(
        "--workers",
        type=whole(1, 1024),
        default=usable_cores(),
        metavar="N",
        help="processes that make images at the same time; the files are the same for every number",
    )
    return parser


def folder(text: str) -> Path:
    """An argparse type: the path of a folder, there or not."""
    return Path(path_name(text))


def usable_cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(main: Callable[[], int | None]) -> None:
    """Run a script's `main`: a user's mistake exits 2 with one line, Ctrl-C 130 and SIGTERM 143, all tidied up."""

    def stop(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # a shell's background job ignores Ctrl-C: leave it so
            signal.signal(number, stop)
    run_script(main)


# -------------------------------------------------------------------------------------------------- raw files


def find_raw_folder(data_dir: Path, dataset: str, marker: str, below: Sequence[str], advice: str) -> tuple[Path, Path]:
    """Find the raw files of `dataset`: the folder that holds the file `marker`.

    Args:
        data_dir: the folder that holds `<dataset>/`, or the data set's folder itself.
        below: names of folders that the archive may have unpacked to, looked into one level down.
        advice: where to get the raw files and how they lie, for the message when they are missing.

    Returns the data set's folder, where the results go by default, and the folder with the raw files.
    Raises `UserError` when no folder holds the file.
    """
    for home in (data_dir / dataset, data_dir):
        for folder in (home, *(home / name for name in below)):
            if (folder / marker).is_file():
                return home, folder
    raise UserError(f"{data_dir / dataset / marker}: not found; {advice}")


def read_lines(file: Path, advice: str) -> list[tuple[str, str]]:
    """The lines of a list, without their ends, and where each stands; empty lines do not count.

    Raises `UserError` for a file that is missing, ending in `advice`, or no text.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise UserError(f"{file}: not found; {advice}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: is not a text file; {MEND}") from None
    return [(line.strip(), f"{file}: line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def read_columns(lines: Sequence[tuple[str, str]], file: Path, columns: str) -> list[tuple[list[str], str]]:
    """The words of each of some lines (`read_lines`) of `file`, the first of which names the columns, and its place.

    Raises `UserError` for another first line, and for a line of another number of words.
    """
    names = columns.split()
    if not lines or lines[0][0].split() != names:
        where = lines[0][1] if lines else file
        raise UserError(f"{where}: expected the column names {columns!r}; {MEND}")
    rows = [(line.split(), where) for line, where in lines[1:]]
    for words, where in rows:
        if len(words) != len(names):
            raise UserError(f"{where}: {' '.join(words)!r} is not of the form {columns!r}; {MEND}")
    return rows


def is_number(text: str) -> bool:
    """Whether `text` is a whole number as the lists write them: digits, perhaps after a minus."""
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdigit() and len(digits) < 10


def image_path(folder: Path, name: str, where: str, linked: str = "") -> Path:
    """The path of a listed image, `name` under `folder`; `UserError` beginning with `where` if it leaves the folder.

    `folder`, and in it the folder `linked`, may be links that the user made. No other link may lead out of them.
    """
    listed = PureWindowsPath(name)  # knows both kinds of slash and drive letters, on every system
    if not listed.parts or not name.isprintable():
        raise UserError(f"{where}: {name!r} is no path of an image; {MEND}")
    if listed.drive or listed.root or ".." in listed.parts:
        raise UserError(f"{where}: the path {name!r} leaves the data folder; list paths below {folder} alone")
    path = folder / name
    real = Path(os.path.realpath(path)) if path.is_symlink() else real_folder(path.parent)
    if not any(real.is_relative_to(home) for home in (real_folder(folder), real_folder(folder / linked))):
        raise UserError(f"{where}: {name!r} is a link out of the data folder; put the image itself at {path}")
    return path


@lru_cache(maxsize=1024)
def real_folder(folder: Path) -> Path:
    """The folder behind all links; asked for every image that lies in it."""
    return Path(os.path.realpath(folder))


def checked_class(label: int, n_classes: int, where: str) -> int:
    """`label` itself if it is one of the classes 1..`n_classes`; else `UserError` beginning with `where`."""
    if not 1 <= label <= n_classes:
        raise UserError(f"{where}: class {label} is not one of 1-{n_classes}; {MEND}")
    return label


def check_images_exist(paths: Sequence[Path]) -> None:
    """Raise `UserError` for the first of `paths` that is no file, before any work is done."""
    missing = [path for path in paths if not path.is_file()]
    if missing:
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"{missing[0]}: listed, but no such file{others}; unpack the archive's images again")


# ----------------------------------------------------------------------------------------------------- splits


class Split(NamedTuple):
    """One half of a data set: `sources[i]` is made into row i, which belongs to class `labels[i]` (1-based)."""

    name: str  # "training" or "validation"
    sources: Sequence[Any]
    labels: Sequence[int]
    paths: Sequence[str] = ()  # of the image files, written beside the arrays; none: no such list
    classes: Sequence[str] = ()  # the names of the classes, class 1 first, for that list
    roles: Sequence[int] = ()  # QUERY or GALLERY, written beside the arrays; none: every image searches all others


def check_disjoint(splits: Sequence[Split], listed_in: Path) -> None:
    """Raise `UserError` naming `listed_in` for a class of both halves, and for a half without images."""
    for split in splits:
        if len(split.sources) < 2:
            raise UserError(f"{listed_in}: {len(split.sources)} images of the {split.name} half; 2 are needed; {MEND}")
    both = set.intersection(*(set(split.labels) for split in splits))
    if both:
        others = f" (and {len(both) - 1} more)" if len(both) > 1 else ""
        raise UserError(f"{listed_in}: class {min(both)}{others} is in both halves; {MEND}")


def halves_by_class(
    sources: Sequence[Any], labels: Sequence[int], n_classes: int, listed_in: Path, n_training: int | None = None
) -> list[Split]:
    """The zero-shot split: the first classes train (`n_training`, or half of them), the others are never seen.

    Order is kept. Raises `UserError` naming `listed_in` when a half has no image.
    """
    half = n_classes // 2 if n_training is None else n_training
    splits = []
    for name, first, last in (("training", 1, half), ("validation", half + 1, n_classes)):
        rows = [row for row, label in enumerate(labels) if first <= label <= last]
        if not rows:
            raise UserError(
                f"{listed_in}: no image of the {name} classes {first}-{last}; list some classes of both halves"
            )
        splits.append(Split(name, [sources[row] for row in rows], [labels[row] for row in rows]))
    return splits


# -------------------------------------------------------------------------------------------------- one image


class UnreadableError(ValueError):
    """An image file that cannot be read whole; the text says why, without the file's name."""


def read_image(path: Path, image_size: int) -> np.ndarray:
    """`decode_image` of a file from an archive, as it is stored, whatever its EXIF data say of turning it.

    Raises `UserError` for what cannot be read whole.
    """
    try:
        return decode_image(path, image_size, upright=False)
    except UnreadableError as error:
        raise UserError(f"{path}: {error}; unpack it again from the archive") from None


def decode_image(path: Path | str, image_size: int, upright: bool = True) -> np.ndarray:
    """Read an image, squash all of it to a square with Lanczos.

    The first frame, turned as its EXIF data say (`upright`) or as it is stored; not cropped, on no background.

    Returns: uint8 RGB, shape (image_size, image_size, 3). Raises `UnreadableError` for what cannot be read whole, and
    for more pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    return np.asarray(open_rgb(path, upright).resize((image_size, image_size), Image.Resampling.LANCZOS))


def open_rgb(path: Path | str, upright: bool = True) -> Image.Image:
    """An image file in RGB, at its own size; raises as `decode_image`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on metadata
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
                if limit and pixels > limit:  # Pillow itself refuses twice as many, and warns of these
                    raise ValueError(f"its size of {pixels} pixels exceeds limit of {limit}: decompression bomb?")
                return as_rgb(ImageOps.exif_transpose(image) if upright else image)
    except Image.UnidentifiedImageError:
        raise UnreadableError("is not an image") from None
    except Exception as error:  # Pillow's decoders raise almost anything for damaged files
        what = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableError(f"cannot be read as an image ({what})") from None


def as_rgb(image: Image.Image) -> Image.Image:
    """`image` of any mode in RGB: grey to three equal channels, a palette to its colours, alpha dropped."""
    if image.mode.startswith("I"):  # 16-bit grey; the high byte, as Pillow itself takes for 16-bit colour
        grey = np.asarray(image).clip(0, 65535) >> 8
        image = Image.fromarray(grey.astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")
    if image.mode == "P":
        image = image.convert("RGBA")  # the colours of transparent entries are kept only this way round
    return image.convert("RGB")


# ------------------------------------------------------------------------------------------------- all images


class Task(NamedTuple):
    """Some neighbouring rows for one worker: where they go and what they are made from."""

    file: Path  # the final file, for messages
    beside: Path  # the file that is written now
    offset: int  # of the first row, in bytes
    make_row: MakeRow
    sources: Sequence[Any]
    image_size: int


class Unreadable(NamedTuple):
    """A row that could not be made: which of its task or split, from what, and why."""

    row: int
    source: Any
    reason: str


def write_splits(
    dataset: str,
    splits: Sequence[Split],
    out_dir: Path,
    *,
    image_size: int,
    make_row: MakeRow,
    workers: int,
    skip_bad: bool = False,
) -> list[Unreadable]:
    """Write `<split>_<dataset>_<size>resized_img.npy` and `..._label.npy` of every split, and print a line for each.

    Images are uint8 (N, image_size, image_size, 3), labels int64 (N,). A split that knows its paths gets
    `..._paths.csv` as well, with the columns path and class, in the order of the rows; one that has roles gets
    `..._role.npy`, int64 (N,). All files appear together once
    all are complete and on the disk; until then older ones stay, and a failure or a signal leaves nothing of this run
    behind, not even a new folder. Pixels go straight from the process that makes them to their place in the file: no
    process ever holds more than one row.

    Args:
        make_row: `(source, image_size) -> uint8 (image_size, image_size, 3)`; a module's function (it is sent by name).
        workers: processes; the result does not depend on it. With 1 everything happens in this process.
        skip_bad: leave out the rows for which `make_row` raises `UnreadableError`, and list them in
            `<dataset>_<size>resized_unreadable.csv` (columns path and reason); else the first few of them are an error.

    Returns the rows that were left out. Raises `UserError`: an unwritable folder, a full disk, a worker that died,
    unreadable images, and what `make_row` raises.
    """
    check_writable(out_dir, "choose another --out_dir")
    lines, left_out = [], []
    with ExitStack() as files:
        files.enter_context(made_folder(out_dir))
        row = image_size**2 * 3 + 8
        check_space(out_dir, sum(len(split.labels) * row + len(split.roles) * 8 for split in splits))
        warn_of_leftovers(out_dir, dataset)

        def beside(name: str) -> tuple[Path, Path]:
            return out_dir / name, files.enter_context(written_whole(out_dir / name))

        with worker_pool(workers, out_dir) as map_in_order:
            for split in splits:
                started = time.perf_counter()
                stem = f"{split.name}_{dataset}_{image_size}resized"
                images, images_beside = beside(f"{stem}_img.npy")
                bad = write_images(images, images_beside, split, image_size, make_row, map_in_order, skip_bad)
                left_out += bad
                split = without_rows(split, {row for row, _, _ in bad})
                write_labels(*beside(f"{stem}_label.npy"), split.labels)
                if split.roles:
                    write_labels(*beside(f"{stem}_role.npy"), split.roles)
                if split.paths:
                    write_table(*beside(f"{stem}_paths.csv"), ("path", "class"), path_rows(split))
                lines.append(summary(images, split, image_size, time.perf_counter() - started))
        if skip_bad:
            table = ((bad.source, bad.reason) for bad in left_out)
            write_table(*beside(f"{dataset}_{image_size}resized_unreadable.csv"), ("path", "reason"), table)
        with signals_deferred():  # all files are complete and flushed: rename every one or none
            files.close()
    print("\n".join(lines))
    return left_out


def without_rows(split: Split, rows: set[int]) -> Split:
    """A split without some of its rows; `UserError` where fewer than two are left."""
    kept = [row for row in range(len(split.sources)) if row not in rows]
    if rows and len(kept) < 2:
        raise UserError(
            f"{split.sources[min(rows)]}: {len(kept)} images of the {split.name} half are readable; 2 are needed"
        )
    by_row = {"sources": split.sources, "labels": split.labels, "paths": split.paths, "roles": split.roles}
    return split._replace(**{name: [values[row] for row in kept] for name, values in by_row.items() if values})


def path_rows(split: Split) -> Iterator[tuple[str, str]]:
    """Path and name of the class (empty where it is not known) of every row."""
    for path, label in zip(split.paths, split.labels, strict=True):
        yield path, split.classes[label - 1] if label > 0 else ""


def summary(images: Path, split: Split, image_size: int, seconds: float) -> str:
    """The line that is printed for a finished split."""
    n = len(split.labels)
    shape = (n, image_size, image_size, 3)
    roles = f" ({split.roles.count(QUERY)} queries, {split.roles.count(GALLERY)} gallery)" if split.roles else ""
    classes = "no labels" if set(split.labels) == {-1} else f"{len(set(split.labels))} classes"
    return f"{images}: {shape}{roles}, {classes}, {seconds:.1f} s, {n / seconds:.0f} images/s"


def write_labels(file: Path, beside: Path, labels: Sequence[int]) -> None:
    """Save `labels`, or roles, as int64 (N,) at `beside`, flushed; `file` is the name for messages."""
    with writing(file), open(beside, "wb") as out:
        np.save(out, np.asarray(labels, dtype=np.int64))
        flush(out)


def write_table(file: Path, beside: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Save a CSV file at `beside`, flushed; a file name that is no UTF-8 keeps its bytes."""
    with writing(file), open(beside, "w", encoding="utf-8", errors="surrogateescape", newline="") as out:
        table = csv.writer(out, lineterminator="\n")
        table.writerow(columns)
        table.writerows(rows)
        flush(out)


def write_images(
    file: Path,
    beside: Path,
    split: Split,
    image_size: int,
    make_row: MakeRow,
    map_in_order: Callable,
    skip_bad: bool = False,
) -> list[Unreadable]:
    """Fill `beside` with the uint8 (N, image_size, image_size, 3) array of a split, flushed, with a progress bar.

    Returns the rows that are unreadable, with `skip_bad`: the array is without them. Raises `UserError` without it.
    """
    n = len(split.sources)
    with writing(file), open(beside, "wb") as out:
        start = write_header(out, n, image_size)
    tasks = (
        Task(
            file,
            beside,
            start + first * image_size**2 * 3,
            make_row,
            split.sources[first : first + ROWS_PER_TASK],
            image_size,
        )
        for first in range(0, n, ROWS_PER_TASK)
    )
    bad: list[Unreadable] = []
    # disable=None: no bar where stderr is not a terminal
    with tqdm(total=n, desc=split.name, unit=" images", leave=False, disable=None) as bar:
        for number, found in enumerate(map_in_order(write_rows, tasks)):
            first = number * ROWS_PER_TASK
            bad += [Unreadable(first + row, source, reason) for row, source, reason in found]
            if len(bad) >= FIRST_UNREADABLE and not skip_bad:
                break
            bar.update(min(ROWS_PER_TASK, n - first))
    if bad and not skip_bad:
        named = ", ".join(f"{source} ({reason})" for _, source, reason in bad[:FIRST_UNREADABLE])
        raise UserError(
            f"unreadable, perhaps among others: {named}; mend or remove them, or leave such images out with --skip_bad"
        )
    with writing(file), open(beside, "rb+") as out:
        drop_rows(out, start, n, image_size, [row for row, _, _ in bad])
        flush(out)
    return bad


def write_header(out: Any, n: int, image_size: int) -> int:
    """Write the header of the .npy file of n images; its length, which is the same for every n."""
    shape = (n, image_size, image_size, 3)
    np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return out.tell()


def drop_rows(out: Any, start: int, n: int, image_size: int, rows: Sequence[int]) -> None:
    """Take some of the n rows (ascending) out of the open .npy file, whose first row is at `start`."""
    if not rows:
        return
    size = image_size**2 * 3
    for gone, (row, following) in enumerate(zip(rows, (*rows[1:], n), strict=True), 1):
        for moved in range(row + 1, following):
            out.seek(start + moved * size)
            pixels = out.read(size)
            out.seek(start + (moved - gone) * size)
            out.write(pixels)
    out.truncate(start + (n - len(rows)) * size)
    out.seek(0)
    write_header(out, n - len(rows), image_size)


def write_rows(task: Task) -> list[Unreadable]:
    """Make the rows of a task and write each at its place; those that are unreadable, by number in the task.

    Plain writes: a full disk is an error here, where a memory map would end the process, and memory does not grow with
    the file.
    """
    bad = []
    with writing(task.file), open(task.beside, "rb+") as out:
        for number, source in enumerate(task.sources):
            try:
                row = task.make_row(source, task.image_size)
            except UnreadableError as error:
                bad.append(Unreadable(number, source, str(error)))
                continue
            if row.shape != (task.image_size, task.image_size, 3) or row.dtype != np.uint8:
                raise ValueError(f"a row of shape {row.shape} and type {row.dtype} was made from {source!r}")
            out.seek(task.offset + number * row.nbytes)
            out.write(row.tobytes())
    return bad


@contextmanager
def worker_pool(workers: int, out_dir: Path) -> Iterator[Callable[[Callable, Iterable], Iterator]]:
    """Give `map(function, tasks)` that runs in `workers` processes; results come in the order of the tasks."""
    if workers == 1:
        yield map
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=start_worker)
    try:
        yield partial(map_in_processes, pool, 4 * workers)
    except BrokenProcessPool:
        raise UserError(
            f"{out_dir}: a worker process died, perhaps killed for want of memory; try again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def map_in_processes(pool: ProcessPoolExecutor, ahead: int, function: Callable, tasks: Iterable) -> Iterator:
    """`map` in a pool, with `ahead` tasks handed out at most, so that an early error stops the rest early."""
    pending: deque = deque()
    for task in tasks:
        with signals_deferred():  # this may start a process: half a start would leave an orphan
            pending.append(pool.submit(function, task))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def start_worker() -> None:
    """Leave Ctrl-C to the parent, and end when the parent is gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow_parent() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait until the block is done; a process started in it never sees Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    wait = {number: signal.signal(number, lambda n, _: caught.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    if hasattr(signal, "pthread_sigmask"):  # inherited by what is started here, unlike the handlers
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for number, handler in wait.items():
            signal.signal(number, handler)
        for number in caught[:1]:
            signal.raise_signal(number)


# ----------------------------------------------------------------------------------------------------- the disk


def check_space(folder: Path, needed: int) -> None:
    """Raise `UserError` where the disk of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: {needed / 1e6:,.1f} MB are to be written and {free / 1e6:,.1f} MB are free; "
            "make room or choose another --out_dir"
        )


def warn_of_leftovers(folder: Path, dataset: str) -> None:
    """Say which hidden files a run left that was killed outright: they are large and nobody sees them."""
    for path in sorted(folder.glob(f".*_{dataset}_*.npy.*.part")):
        print(f"note: {path} is of another run; delete it unless that run still goes on", file=sys.stderr)


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Turn a fault of the disk in the block into a `UserError` that names the final `file`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{file}: cannot be written ({error.strerror}); make room there or choose another --out_dir"
        ) from None


def flush(out: Any) -> None:
    """Bring an open file to the disk, where late faults (a full remote disk) show."""
    out.flush()
    os.fsync(out.fileno())
