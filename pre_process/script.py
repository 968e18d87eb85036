"""What the scripts of this folder share: their options, and what they print."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from datasets.arrays import DEFAULT_IMAGE_SIZE, QUERY, SMALLEST_IMAGE_SIZE, UNLABELED
from pre_process.raw_lists import Half
from pre_process.writer import MakeRow, Written, read_image, write_splits
from utils.options import Parser, path_name, usable_cores, whole

LARGEST_IMAGE_SIZE = 4096


def option_parser(dataset: str, description: str, image_size: int = DEFAULT_IMAGE_SIZE) -> Parser:
    """Make the parser of the options that all scripts have; a script adds its own.

    Args:
        dataset: its name, which is that of its folder, too.
        image_size: default side of the images in pixels.
    """
    parser = Parser(description)
    add = parser.add_argument_group("files").add_argument
    home = f"the {dataset} folder of --data_dir"
    add("--data_dir", type=folder, default=Path("data"), help=f"folder of {dataset}/, or itself")
    add("--out_dir", type=folder, help=f"folder for the .npy files (default: {home})")
    add = parser.add_argument_group("work").add_argument
    size = whole(SMALLEST_IMAGE_SIZE, LARGEST_IMAGE_SIZE)
    add("--image_size", type=size, default=image_size, help="side of the images that are written")
    add("--workers", type=whole(1, 1024), default=usable_cores(), help="threads")
    return parser


def folder(text: str) -> Path:
    """Argparse type: the path of a folder, there or not."""
    return Path(path_name(text))


def home_of(dataset: str, data_dir: Path) -> Path:
    """Return the folder of a data set: below `data_dir`, or `data_dir` if that has its name."""
    return data_dir if data_dir.resolve().name == dataset else data_dir / dataset


def write(
    dataset: str,
    splits: Sequence[Half],
    home: Path,
    args: argparse.Namespace,
    make_row: MakeRow = read_image,
    skip_bad: bool = False,
) -> list[Written]:
    """Write the files of a data set as the options say, and print a line for each split.

    Args:
        home: where the files go without --out_dir.
        args: the options of `option_parser`.
        make_row: see `pre_process.writer.write_splits`; `skip_bad`, too.
    """
    out_dir = args.out_dir or home
    for path in sorted(out_dir.glob(f".*_{dataset}_*.part")):  # large, and nobody sees it
        print(f"note: {path} is of another run; delete it if that has ended", file=sys.stderr)
    written = write_splits(
        dataset, splits, out_dir, make_row, args.image_size, args.workers, skip_bad
    )
    for half in written:
        print(summary(half, args.image_size))
    return written


def summary(half: Written, image_size: int) -> str:
    """Describe a split that was written: file, shape, roles, classes and speed."""
    count = len(half.split.labels)
    parts = [f"{half.file}: {(count, image_size, image_size, 3)}"]
    if half.split.roles:
        n_queries = half.split.roles.count(QUERY)
        parts.append(f"{n_queries} queries, {count - n_queries} gallery")
    classes = set(half.split.labels)
    parts.append("no labels" if classes == {UNLABELED} else f"{len(classes)} classes")
    parts.append(f"{half.seconds:.1f} s, {count / half.seconds:.0f} images/s")
    return ", ".join(parts)
