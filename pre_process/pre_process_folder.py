"""A folder of your own images -> data/<name>/*.npy, with or without labels.

python pre_process/pre_process_folder.py --images photos --name my_set
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, when this is run as a script

from pre_process import image_arrays
from utils.arguments import Parser, folder_name, name_of, real, whole
from utils.errors import UserError
from utils.images import find_images

OFFICIAL = ("cub200", "car196", "sop", "inshop", "glyphs")  # the names of other scripts' data sets
UNLABELLED = -1  # the label of every image where none are known
SUBFOLDERS = "subfolders"
COLUMNS = ("path", "class")  # of a file of labels


def make_parser() -> Parser:
    """The options that all scripts have, and those about the folder."""
    parser = image_arrays.option_parser("<name>", __doc__.splitlines()[0])
    own = parser.add_argument_group("your images")
    own.add_argument("--images", type=image_arrays.folder, metavar="DIR",
                     help="the folder; those below it count, hidden ones do not")  # fmt: skip
    own.add_argument("--name", type=folder_name,
                     help="of the data set: train.py --dataset NAME")  # fmt: skip
    own.add_argument("--labels", metavar="subfolders|FILE.csv",
                     help="subfolders: the class of an image is its folder directly below --images; or a CSV file with "
                     "the columns path (below --images) and class; without labels nothing can be scored")  # fmt: skip
    own.add_argument("--split_by", type=name_of(("classes", "images")), default=argparse.SUPPRESS,
                     help="classes: those of the test half are never seen in training, as in the paper; images: drawn "
                     "at random, whatever their class (default: classes with --labels, images without)")  # fmt: skip
    own.add_argument("--train_share", type=real(0, above=True), default=argparse.SUPPRESS, metavar="SHARE",
                     help="of the classes (the first ones by number or name) or of the images that train; above 0 and "
                     "below 1 (default: 0.5 of the classes, 0.9 of the images)")  # fmt: skip
    own.add_argument("--seed", type=whole(0), default=0, metavar="N",
                     help="draws the images of --split_by images")  # fmt: skip
    own.add_argument("--skip_bad", action="store_true",
                     help="leave unreadable images out and list them in <name>_<size>resized_unreadable.csv; without "
                     "it they are an error")  # fmt: skip
    return parser


def main() -> None:
    """Read the options, find the images and their classes, write the files."""
    parser = make_parser()
    args = parser.parse(sys.argv[1:])
    if args.images is None or args.name is None:
        parser.error("give --images DIR and --name NAME")
    split_by = getattr(args, "split_by", "classes" if args.labels else "images")
    share = getattr(args, "train_share", 0.5 if split_by == "classes" else 0.9)
    if args.name in OFFICIAL:
        parser.error(f"--name {args.name}: is the data set that pre_process_{args.name}.py makes; choose another name")
    if share >= 1:
        parser.error(f"--train_share {share:g}: must be below 1, some are kept to look at what was learnt")
    if split_by == "classes" and not args.labels:
        parser.error("--split_by classes: needs the classes; give --labels")
    found = find_images(args.images)
    paths, classes = (found, []) if args.labels is None else labelled(args.images, found, args.labels)
    splits = make_splits(paths, classes, split_by, share, args)
    home = args.data_dir if args.data_dir.resolve().name == args.name else args.data_dir / args.name
    bad = image_arrays.write_splits(
        args.name,
        splits,
        getattr(args, "out_dir", home),
        image_size=args.image_size,
        make_row=image_arrays.decode_image,
        workers=args.workers,
        skip_bad=args.skip_bad,
    )
    if len(paths) < len(found):
        print(f"{len(found) - len(paths)} images of {args.images} are not listed in {args.labels} and were left out")
    if bad:
        print(f"{len(bad)} unreadable images were left out: {args.name}_{args.image_size}resized_unreadable.csv")


def labelled(folder: Path, found: Sequence[Path], labels: str) -> tuple[list[Path], list[str]]:
    """The images that have a class and their classes; every image has one with `labels` "subfolders".

    Raises `UserError` for an image without a folder of its own, and for what is wrong in a CSV file.
    """
    if labels != SUBFOLDERS:
        return read_labels(folder, Path(labels))
    for path in found:
        if path.parent == folder:
            raise UserError(f"{path}: lies directly in --images; with --labels subfolders every image is in the folder "
                            "of its class")  # fmt: skip
    return list(found), [path.relative_to(folder).parts[0] for path in found]


def read_labels(folder: Path, file: Path) -> tuple[list[Path], list[str]]:
    """The images below `folder` that a CSV file lists, in its order, and their classes.

    Raises `UserError` naming file and line for what is missing, malformed or double.
    """
    paths: dict[Path, str] = {}
    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            table = csv.DictReader(lines, strict=True)
            missing = [column for column in COLUMNS if column not in (table.fieldnames or ())]
            if missing:
                raise UserError(f"{file}: has no column {missing[0]} in its first line; name its columns path,class")
            for row in table:
                where = f"{file}: line {table.line_num}"
                if not row["class"]:
                    raise UserError(f"{where}: no class; give every image one, or leave its line out")
                path = image_arrays.image_path(folder, row["path"] or "", where)
                if path in paths:
                    raise UserError(f"{where}: {row['path']} is listed twice")
                paths[path] = row["class"]
    except FileNotFoundError:
        raise UserError(f"--labels {file}: no such file; give a CSV file, or subfolders") from None
    except (csv.Error, IsADirectoryError) as error:
        raise UserError(f"--labels {file}: not a CSV file ({error})") from None
    if not paths:
        raise UserError(f"{file}: lists no image")
    image_arrays.check_images_exist(list(paths))
    return list(paths), list(paths.values())


def make_splits(
    paths: Sequence[Path], classes: Sequence[str], split_by: str, share: float, args: argparse.Namespace
) -> list[image_arrays.Split]:
    """Both halves, in the order of `paths`; classes are numbered from 1 by number or name, none is `UNLABELLED`."""
    names = sorted(set(classes), key=(lambda c: (int(c), c)) if all(c.isdecimal() for c in classes) else None)
    number_of = {name: number for number, name in enumerate(names, 1)}
    labels = [number_of[name] for name in classes] or [UNLABELLED] * len(paths)
    if split_by == "classes":
        n_training = max(1, min(len(names) - 2, round(share * len(names))))
        if len(names) < 3:
            raise UserError(f"--labels {args.labels}: {len(names)} classes; 3 are needed, 2 of them to test on; or "
                            "give --split_by images")  # fmt: skip
        halves = image_arrays.halves_by_class(paths, labels, len(names), args.images, n_training)
    else:
        halves = halves_by_chance(paths, labels, share, args)
    for half in halves:
        if len(half.sources) < 2:
            raise UserError(f"{args.images}: {len(half.sources)} images would be in the {half.name} half, not 2; "
                            "give more images or another --train_share")  # fmt: skip
    return [half._replace(paths=[os.path.abspath(path) for path in half.sources], classes=names) for half in halves]


def halves_by_chance(
    paths: Sequence[Path], labels: Sequence[int], share: float, args: argparse.Namespace
) -> list[image_arrays.Split]:
    """A share of the images, drawn by --seed, trains; the others are the test half. Order is kept."""
    n_training = max(2, min(len(paths) - 2, round(share * len(paths))))
    trains = np.zeros(len(paths), dtype=bool)
    trains[np.random.default_rng(args.seed).permutation(len(paths))[:n_training]] = True
    halves = (("training", np.flatnonzero(trains)), ("validation", np.flatnonzero(~trains)))
    return [image_arrays.Split(name, [paths[i] for i in rows], [labels[i] for i in rows]) for name, rows in halves]


if __name__ == "__main__":
    image_arrays.run(main)
