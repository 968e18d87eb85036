"""Stanford Online Products -> data/sop/*.npy: Ebay_train.txt to train on, Ebay_test.txt to test on.

python pre_process/pre_process_sop.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, if run as a script

from pre_process import raw_lists
from pre_process.raw_lists import Half
from pre_process.script import option_parser, write
from utils.errors import run_script

N_CLASSES = 22634
TRAINING = "Ebay_train.txt"
VALIDATION = "Ebay_test.txt"
COLUMNS = "image_id class_id super_class_id path"
ADVICE = (
    "python pre_process/download.py sop, or unpack Stanford_Online_Products.zip "
    "(https://cvgl.stanford.edu/projects/lifted_struct) in data/sop/, or give --data_dir"
)


def main() -> None:
    """Read the options and the lists, write the four files."""
    args = option_parser("sop", __doc__.splitlines()[0]).parse(sys.argv[1:])
    patterns = (TRAINING, f"Stanford_Online_Products/{TRAINING}")
    home, training = raw_lists.find_raw(args.data_dir, "sop", patterns, ADVICE)
    validation = training.with_name(VALIDATION)
    splits = [read_half("training", training), read_half("validation", validation)]
    raw_lists.check_disjoint(splits, validation)
    raw_lists.check_images_exist([path for split in splits for path in split.sources])
    write("sop", splits, home, args)


def read_half(name: str, file: Path) -> Half:
    """Read the images of a list and their official classes (1-22634), in its order.

    Any subset of the images will do. Raises UserError that names file and line for a list that is
    missing or malformed.
    """
    paths = []
    labels = []
    for (_, label, _, image), place in raw_lists.read_columns(
        raw_lists.read_lines(file, ADVICE), COLUMNS
    ):
        paths.append(raw_lists.image_path(file.parent, image, place))
        labels.append(raw_lists.read_class(label, N_CLASSES, place))
    return Half(name, paths, labels)


if __name__ == "__main__":
    run_script(main)
