"""CUB-200-2011 -> data/cub200/*.npy: classes 1-100 to train on, classes 101-200 to test on.

python pre_process/pre_process_cub200.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, when this is run as a script

from pre_process import image_arrays
from utils.errors import UserError

N_CLASSES = 200
ADVICE = (
    "unpack CUB_200_2011.tgz (https://data.caltech.edu/records/65de6-vp158) so that images.txt, "
    "image_class_labels.txt and images/ lie in data/cub200/ or data/cub200/CUB_200_2011/, or give --data_dir"
)


def main() -> None:
    """Read the options and the lists, write the four files."""
    args = image_arrays.option_parser("cub200", __doc__.splitlines()[0]).parse(sys.argv[1:])
    home, raw = image_arrays.find_raw_folder(args.data_dir, "cub200", "images.txt", ["CUB_200_2011"], ADVICE)
    paths, labels = read_lists(raw)
    splits = image_arrays.halves_by_class(paths, labels, N_CLASSES, raw / "image_class_labels.txt")
    image_arrays.check_images_exist(paths)
    image_arrays.write_splits(
        "cub200",
        splits,
        getattr(args, "out_dir", home),
        image_size=args.image_size,
        make_row=image_arrays.read_image,
        workers=args.workers,
    )


def read_lists(raw: Path) -> tuple[list[Path], list[int]]:
    """The images and their classes (1..200), both in the order of `images.txt`; any subset of the classes will do.

    Raises `UserError` naming file and line for what is missing, malformed, double or out of range.
    """
    label_file = raw / "image_class_labels.txt"
    label_of = {}
    for image_id, text, where in numbered_lines(label_file):
        if not image_arrays.is_number(text):
            raise UserError(f"{where}: class {text!r} is not a whole number; {image_arrays.MEND}")
        label_of[image_id] = image_arrays.checked_class(int(text), N_CLASSES, where)

    paths, labels = [], []
    for image_id, name, where in numbered_lines(raw / "images.txt"):
        paths.append(image_arrays.image_path(raw / "images", name, where))
        if image_id not in label_of:
            raise UserError(f"{label_file}: image {image_id} of images.txt has no class; {image_arrays.MEND}")
        labels.append(label_of[image_id])
    return paths, labels


def numbered_lines(file: Path) -> list[tuple[int, str, str]]:
    """The lines "id text" of a list as (id, text, where it stands); empty lines do not count.

    Raises `UserError` for a file that is missing or no text, a line of another form, or an id that comes twice.
    """
    found: dict[int, tuple[int, str, str]] = {}
    for line, where in image_arrays.read_lines(file, ADVICE):
        words = line.split(maxsplit=1)
        if len(words) != 2 or not image_arrays.is_number(words[0]):
            raise UserError(f"{where}: {line!r} is not of the form 'number text'; {image_arrays.MEND}")
        image_id = int(words[0])
        if image_id in found:
            raise UserError(f"{where}: image {image_id} is listed twice; {image_arrays.MEND}")
        found[image_id] = (image_id, words[1], where)
    return list(found.values())


if __name__ == "__main__":
    image_arrays.run(main)
