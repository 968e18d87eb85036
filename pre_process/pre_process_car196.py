"""Cars196 (Stanford Cars) -> data/car196/*.npy: classes 1-98 to train on, classes 99-196 to test on.

python pre_process/pre_process_car196.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, when this is run as a script

from pre_process import image_arrays
from utils.errors import UserError
from utils.process import memory_limited

N_CLASSES = 196
ADVICE = (
    "the Stanford links are dead: get a copy of Stanford Cars from Kaggle or Hugging Face (cars_annos.mat and "
    "car_ims.tgz) so that cars_annos.mat and car_ims/000001.jpg ... lie in data/car196/, or give --data_dir"
)
MOST_MEMORY = 5 * 10**8  # bytes to read the annotations with: fifty times what the original takes
MEND = "get the original cars_annos.mat"


def main() -> None:
    """Read the options and the annotations, write the four files."""
    args = image_arrays.option_parser("car196", __doc__.splitlines()[0]).parse(sys.argv[1:])
    home, raw = image_arrays.find_raw_folder(args.data_dir, "car196", "cars_annos.mat", [], ADVICE)
    paths, labels = read_annotations(raw / "cars_annos.mat")
    splits = image_arrays.halves_by_class(paths, labels, N_CLASSES, raw / "cars_annos.mat")
    image_arrays.check_images_exist(paths)
    image_arrays.write_splits(
        "car196",
        splits,
        getattr(args, "out_dir", home),
        image_size=args.image_size,
        make_row=image_arrays.read_image,
        workers=args.workers,
    )


def read_annotations(file: Path) -> tuple[list[Path], list[int]]:
    """The images and their classes (1..196) in the order of the annotations; their `test` flag plays no part here.

    Raises `UserError` naming the file and the entry for what is missing, malformed, double or out of range.
    """
    annotations = load_annotations(file)
    paths, labels = [], []
    first_entry: dict[Path, int] = {}
    for entry, (name, label) in enumerate(zip(annotations["relative_im_path"], annotations["class"], strict=True), 1):
        where = f"{file}: annotation {entry}"
        name, label = single_value(name), single_value(label)
        if not isinstance(name, str):
            raise UserError(f"{where}: relative_im_path is not one text; {MEND}")
        if isinstance(label, bool) or not isinstance(label, (int, float)) or label != label // 1:
            raise UserError(f"{where}: class {' '.join(repr(label).split())} is not one whole number; {MEND}")
        path = image_arrays.image_path(file.parent, name, where, linked="car_ims")
        if first_entry.setdefault(path, entry) != entry:
            raise UserError(f"{where}: {name!r} is already annotation {first_entry[path]}; {MEND}")
        paths.append(path)
        labels.append(image_arrays.checked_class(int(label), N_CLASSES, where))
    return paths, labels


def load_annotations(file: Path) -> np.ndarray:
    """The struct array `annotations` of the MATLAB file, shape (N,); `UserError` where it or a field is missing."""
    from scipy.io import loadmat  # here, since it takes longer to import than all the rest

    try:
        with memory_limited(MOST_MEMORY):
            variables = loadmat(file, squeeze_me=True, variable_names=["annotations"])
    except MemoryError:
        raise UserError(f"{file}: claims arrays of more than {MOST_MEMORY // 10**6} MB; {MEND}") from None
    except Exception as error:  # the reader raises almost anything for files of another kind
        what = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{file}: cannot be read as a MATLAB file ({what}); {MEND}") from None
    annotations = np.atleast_1d(variables.get("annotations", np.empty(0)))
    for field in ("relative_im_path", "class"):
        if field not in (annotations.dtype.names or ()):
            raise UserError(f"{file}: has no struct `annotations` with the field `{field}`; {MEND}")
    return annotations.reshape(-1)


def single_value(value: Any) -> Any:
    """The one element of an array of whatever shape, as a Python value; anything else as it is."""
    value = np.asarray(value)
    return value.item() if value.size == 1 else value


if __name__ == "__main__":
    image_arrays.run(main)
