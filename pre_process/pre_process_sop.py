"""Stanford Online Products -> data/sop/*.npy: the list Ebay_train.txt to train on, Ebay_test.txt to test on.

python pre_process/pre_process_sop.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, when this is run as a script

from pre_process import image_arrays
from pre_process.image_arrays import MEND, Split
from utils.errors import UserError

N_CLASSES = 22634
HALVES = {"training": "Ebay_train.txt", "validation": "Ebay_test.txt"}
COLUMNS = "image_id class_id super_class_id path"
ADVICE = (
    "unpack Stanford_Online_Products.zip (https://cvgl.stanford.edu/projects/lifted_struct) so that Ebay_train.txt, "
    "Ebay_test.txt and the folders *_final/ lie in data/sop/ or data/sop/Stanford_Online_Products/, or give --data_dir"
)


def main() -> None:
    """Read the options and the lists, write the four files."""
    args = image_arrays.option_parser("sop", __doc__.splitlines()[0]).parse(sys.argv[1:])
    home, raw = image_arrays.find_raw_folder(
        args.data_dir, "sop", HALVES["training"], ["Stanford_Online_Products"], ADVICE
    )
    listed: dict[Path, str] = {}
    splits = [read_half(raw, half, file, listed) for half, file in HALVES.items()]
    image_arrays.check_disjoint(splits, raw / HALVES["validation"])
    image_arrays.check_images_exist(list(listed))
    image_arrays.write_splits(
        "sop",
        splits,
        getattr(args, "out_dir", home),
        image_size=args.image_size,
        make_row=image_arrays.read_image,
        workers=args.workers,
    )


def read_half(raw: Path, half: str, name: str, listed: dict[Path, str]) -> Split:
    """The images of a list and their official classes (1..22634), in its order; any subset of the classes will do.

    `listed` gets every image and where it was listed. Raises `UserError` naming file and line for what is missing,
    malformed, double or out of range.
    """
    file = raw / name
    paths, labels = [], []
    lines = image_arrays.read_lines(file, ADVICE)
    for (_, class_id, _, image), where in image_arrays.read_columns(lines, file, COLUMNS):
        if not image_arrays.is_number(class_id):
            raise UserError(f"{where}: class {class_id!r} is not a whole number; {MEND}")
        path = image_arrays.image_path(raw, image, where)
        if listed.setdefault(path, where) != where:
            raise UserError(f"{where}: {image!r} is listed already, in {listed[path]}; {MEND}")
        paths.append(path)
        labels.append(image_arrays.checked_class(int(class_id), N_CLASSES, where))
    return Split(half, paths, labels)


if __name__ == "__main__":
    image_arrays.run(main)
