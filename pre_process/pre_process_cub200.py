"""CUB-200-2011 -> data/cub200/*.npy: classes 1-100 to train on, classes 101-200 to test on.

python pre_process/pre_process_cub200.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, if run as a script

from pre_process import raw_lists
from pre_process.script import option_parser, write
from utils.errors import UserError, run_script

N_CLASSES = 200
ADVICE = (
    "python pre_process/download.py cub200, or unpack CUB_200_2011.tgz "
    "(https://data.caltech.edu/records/65de6-vp158) in data/cub200/, or give --data_dir"
)


def main() -> None:
    """Read the options and the lists, write the four files."""
    args = option_parser("cub200", __doc__.splitlines()[0]).parse(sys.argv[1:])
    patterns = ("images.txt", "CUB_200_2011/images.txt")
    home, images = raw_lists.find_raw(args.data_dir, "cub200", patterns, ADVICE)
    paths, labels = read_lists(images.parent)
    raw_lists.check_images_exist(paths)
    splits = raw_lists.halves_by_class(paths, labels, N_CLASSES // 2, images)
    write("cub200", splits, home, args)


def read_lists(raw: Path) -> tuple[list[Path], list[int]]:
    """Read the images and their classes (1-200), both in the order of images.txt.

    Any subset of the images will do. Raises UserError that names file and line for a list that is
    missing or malformed.
    """
    classes = raw / "image_class_labels.txt"
    label_of = {}
    for (image_id, label), place in read_list(classes, "image_id class"):
        label_of[image_id] = raw_lists.read_class(label, N_CLASSES, place)
    paths = []
    labels = []
    for (image_id, name), place in read_list(raw / "images.txt", "image_id path"):
        if image_id not in label_of:
            raise UserError(f"{place}: no class of image {image_id}; restore {classes}")
        paths.append(raw_lists.image_path(raw / "images", name, place))
        labels.append(label_of[image_id])
    return paths, labels


def read_list(file: Path, columns: str) -> list[tuple[list[str], str]]:
    """Read the columns of a list, see `raw_lists.read_columns`."""
    return raw_lists.read_columns(raw_lists.read_lines(file, ADVICE), columns)


if __name__ == "__main__":
    run_script(main)
