"""Cars196 (Stanford Cars) -> data/car196/*.npy: classes 1-98 to train on, 99-196 to test on.

python pre_process/pre_process_car196.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from scipy.io import loadmat

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, if run as a script

from datasets.images import find_images
from pre_process import raw_lists
from pre_process.car196_classes import class_of_folder
from pre_process.script import home_of, option_parser, write
from utils.errors import UserError, run_script

N_CLASSES = 196
N_IMAGES = 16_185
LIST = "cars_annos.mat"
ADVICE = (
    "python pre_process/download.py car196, or put cars_annos.mat and car_ims/, or a copy in "
    "folders of classes, into data/car196/ (docs/data_sets.md), or give --data_dir"
)


def main() -> None:
    """Read the options, find the images and their classes, write the four files."""
    args = option_parser("car196", __doc__.splitlines()[0]).parse(sys.argv[1:])
    homes = [home_of("car196", args.data_dir)]
    if "data_dir" in args.given:
        homes.append(args.data_dir)
    home = next((place for place in homes if is_copy_in_folders(place)), None)
    if home:
        source = home
        paths, labels = read_class_folders(home)
    else:
        patterns = (LIST, f"*/{LIST}")
        home, source = raw_lists.find_raw(args.data_dir, "car196", patterns, ADVICE)
        paths, labels = read_annotations(source)
        raw_lists.check_images_exist(paths)
    splits = raw_lists.halves_by_class(paths, labels, N_CLASSES // 2, source)
    write("car196", splits, home, args)


def read_annotations(file: Path) -> tuple[list[Path], list[int]]:
    """Read cars_annos.mat: the images beside it and their classes (1-196), in its order.

    Raises UserError if it is another file, or for an annotation that cannot be.
    """
    try:
        content = loadmat(file, squeeze_me=True, variable_names=["annotations"])
        annotations = np.atleast_1d(content["annotations"])
        names = [str(name) for name in annotations["relative_im_path"]]
        classes = [str(label) for label in annotations["class"]]
    except Exception as error:  # the reader raises almost anything for other files
        raise UserError(f"{file}: is not the original {LIST} ({error}); get that") from None
    paths = []
    labels = []
    for number, (name, label) in enumerate(zip(names, classes, strict=True), 1):
        place = f"{file}: annotation {number}"
        paths.append(raw_lists.image_path(file.parent, name, place))
        labels.append(raw_lists.read_class(label, N_CLASSES, place))
    return paths, labels


def is_copy_in_folders(home: Path) -> bool:
    """Tell whether a folder below `home` is named after a class, and the official list is not
    there.
    """
    has_class = any(class_of_folder(path) for path in home.glob("**/") if path != home)
    return has_class and not any(home.glob(f"**/{LIST}"))


def read_class_folders(home: Path) -> tuple[list[Path], list[int]]:
    """Read a copy in folders named after the classes, wherever below `home` it lies.

    A note says if the copy is not complete.

    Returns:
        Images and classes (1-196), ordered by class, train/ before test/, and path. Raises
        UserError for an image in any other folder.
    """
    rows = []
    for path in find_images(home):
        label = class_of_folder(path.parent)
        if label is None:
            raise UserError(f"{path}: is not in a folder of one of the 196 classes; move it away")
        below = path.relative_to(home).parts
        rows.append((label, "test" in below, below, path))
    rows.sort()
    if len(rows) != N_IMAGES:
        print(
            f"note: {home}: {len(rows):,} images, Cars196 has {N_IMAGES:,}; scores will not "
            "compare with published ones",
            file=sys.stderr,
        )
    return [row[-1] for row in rows], [row[0] for row in rows]


if __name__ == "__main__":
    run_script(main)
