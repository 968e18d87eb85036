"""A folder of your own images -> data/<name>/*.npy, with or without labels.

python pre_process/pre_process_folder.py --images photos --name my_set
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from glob import escape
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, if run as a script

from datasets.arrays import SCRIPTS, UNLABELED
from datasets.images import UnreadableError, allow_pixels, decode_image, find_images, warn_of_equal
from pre_process import raw_lists
from pre_process.label_lists import clean_classes, folder_classes, read_labels
from pre_process.raw_lists import Half
from pre_process.script import folder, home_of, option_parser, write
from utils.errors import UserError, run_script
from utils.options import Parser, add_max_pixels, folder_name, name_of, real, whole
from utils.tables import read_rows

SUBFOLDERS = "subfolders"


def make_parser() -> Parser:
    """Make the parser: the options that all scripts have, and those about the folder."""
    parser = option_parser("<name>", __doc__.splitlines()[0])
    group = parser.add_argument_group("your images")
    add = group.add_argument
    add("--images", type=folder, metavar="DIR", help="the folder; folders below it count, too")
    add("--name", type=folder_name, help="name of the data set: train.py --dataset NAME")
    add(
        "--labels",
        metavar="subfolders|FILE.csv",
        help="subfolders: an image's class is its folder directly below --images; or a CSV file "
        "with the columns path (below --images) and class; without labels there are no scores",
    )
    add(
        "--split_by",
        type=name_of(("classes", "images")),
        help="classes: those of the test half are never seen in training, as in the paper; "
        "images: drawn at random, whatever their class (default: classes if there are labels)",
    )
    add(
        "--train_share",
        type=real(0, above=True),
        metavar="SHARE",
        help="share of the classes (the first ones by number or name) or of the images that "
        "train; below 1 (default: 0.5 of the classes, 0.9 of the images)",
    )
    add("--seed", type=whole(0), default=0, help="draws the images of --split_by images")
    add(
        "--skip_bad",
        action="store_true",
        help="leave unreadable images out and list them in <name>_<size>resized_unreadable.csv; "
        "without it they are an error",
    )
    text = "replace a data set of this name, made of another folder"
    add("--overwrite", action="store_true", help=text)
    add_max_pixels(group)
    return parser


def main() -> None:
    """Read the options, find the images and their classes, write the files."""
    args = read_options()
    allow_pixels(args.max_pixels)
    images = find_images(args.images)
    paths = images
    classes: list[str] = []
    if args.labels == SUBFOLDERS:
        classes = folder_classes(images, args.images)
    elif args.labels:
        paths, classes = read_labels(Path(args.labels), args.images, images)
    classes, n_cleaned = clean_classes(classes)
    if n_cleaned:
        print(f"{n_cleaned} names of classes have needless blanks or another Unicode form:")
        print(f"cleaned, there are {len(set(classes))} classes")
    splits = make_splits(paths, classes, args)
    make_row = decode_image if args.skip_bad else read_photo
    home = home_of(args.name, args.data_dir)
    written = write(args.name, splits, home, args, make_row, args.skip_bad)
    if len(paths) < len(images):
        left_out = len(images) - len(paths)
        print(f"{left_out} images of {args.images} are not listed in {args.labels}: left out")
    warn_of_equal(sum(half.n_equal for half in written), len(paths), "pixels")
    n_bad = sum(len(half.unreadable) for half in written)
    if n_bad:
        table = f"{args.name}_{args.image_size}resized_unreadable.csv"
        print(f"{n_bad} unreadable images were left out: {table}")


def read_options() -> argparse.Namespace:
    """Read the options, fill in the defaults that depend on --labels, refuse what cannot be."""
    parser = make_parser()
    args = parser.parse(sys.argv[1:])
    if args.images is None or args.name is None:
        parser.error("give --images DIR and --name NAME")
    if args.name in SCRIPTS:
        parser.error(f"--name {args.name}: pre_process_{args.name}.py makes it; choose another")
    home = args.out_dir or home_of(args.name, args.data_dir)
    if args.labels and Path(args.labels).resolve().parent == home.resolve():
        parser.error(
            f"--labels {args.labels}: lies where the data set is written; copy it elsewhere"
        )
    if not args.overwrite and is_of_another_folder(home, args.name, args.images):
        parser.error(
            f"--name {args.name}: holds images of another folder; choose another name, or "
            "give --overwrite"
        )
    if args.split_by is None:
        args.split_by = "classes" if args.labels else "images"
    if args.split_by == "classes" and not args.labels:
        parser.error("--split_by classes: needs the classes; give --labels")
    if args.train_share is None:
        args.train_share = 0.5 if args.split_by == "classes" else 0.9
    if args.train_share >= 1:
        parser.error(f"--train_share {args.train_share:g}: must be below 1")
    return args


def is_of_another_folder(home: Path, name: str, images: Path) -> bool:
    """Return whether there is a data set of that name whose first image lies elsewhere."""
    for table in home.glob(f"training_{escape(name)}_*_paths.csv"):
        _, (first,) = next(read_rows(table, ["path"]))
        if not Path(first).is_relative_to(os.path.abspath(images)):
            return True
    return False


def read_photo(path: Path, image_size: int) -> np.ndarray:
    """Decode an image; raises UserError if it cannot be read whole."""
    try:
        return decode_image(path, image_size)
    except UnreadableError as error:
        raise UserError(
            f"{path}: {error}; mend or remove it, or leave such images out with --skip_bad"
        ) from None


def make_splits(
    paths: Sequence[Path], classes: Sequence[str], args: argparse.Namespace
) -> list[Half]:
    """Make both halves in the order of `paths`.

    Classes are numbered from 1 on by number or name; without classes every label is `UNLABELED`.
    """
    numeric = all(name.isdecimal() for name in classes)
    names = sorted(set(classes), key=(lambda name: (int(name), name)) if numeric else None)
    number_of = {name: number for number, name in enumerate(names, 1)}
    labels = [number_of[name] for name in classes] or [UNLABELED] * len(paths)
    if args.split_by == "images":
        halves = halves_by_chance(paths, labels, args)
    elif len(names) < 3:
        way = "give --split_by images" if len(names) > 1 else "leave out --labels"
        raise UserError(
            f"--labels {args.labels}: {len(names)} classes; 3 are needed, 2 of them to test on; "
            f"or {way}"
        )
    else:
        n_training = max(1, min(len(names) - 2, round(args.train_share * len(names))))
        halves = raw_lists.halves_by_class(paths, labels, n_training, args.images)
    return [
        half._replace(paths=[os.path.abspath(path) for path in half.sources], classes=names)
        for half in halves
    ]


def halves_by_chance(
    paths: Sequence[Path], labels: Sequence[int], args: argparse.Namespace
) -> list[Half]:
    """Draw the images that train by --seed; the others are the test half. Order is kept."""
    n_training = max(2, min(len(paths) - 2, round(args.train_share * len(paths))))
    order = np.random.default_rng(args.seed).permutation(len(paths))
    everything = Half("", paths, labels)
    training = everything.keep(sorted(order[:n_training]), "training")
    halves = [training, everything.keep(sorted(order[n_training:]), "validation")]
    raw_lists.check_sizes(halves, args.images)
    return halves


if __name__ == "__main__":
    run_script(main)
