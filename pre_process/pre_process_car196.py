"""Cars196 (Stanford Cars) -> data/car196/*.npy: classes 1-98 to train on, classes 99-196 to test on.

python pre_process/pre_process_car196.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, when this is run as a script

from pre_process import image_arrays, parquet_images
from utils.errors import UserError
from utils.images import find_images
from utils.process import memory_limited

N_CLASSES, N_IMAGES = 196, 16_185
CLASSES = Path(__file__).with_name("car196_classes.txt")  # the class_names of cars_annos.mat, class 1 first
PARTS = ("train", "test")  # of other copies; they play no part here but for the order of the images
PARQUET_PARTS = ("train", "valid", "test")  # tanganke/stanford_cars has distorted copies of its test part as well
DEPTH = 2  # folders below data/car196/ that are looked into
ADVICE = (
    "the Stanford links are dead: python pre_process/download.py car196, or get a copy of Stanford Cars from Kaggle or "
    "Hugging Face into data/car196/ (car_ims/ with cars_annos.mat, cars_train/ and cars_test/ with their annotations, "
    "folders of classes, or parquet files; see docs/data_sets.md), or give --data_dir"
)
MOST_MEMORY = 5 * 10**8  # bytes to read the annotations with: fifty times what the original takes
MEND = "get the original cars_annos.mat"
MEND_TRAIN = "get car_devkit.tgz (docs/data_sets.md), which holds cars_train_annos.mat"
MEND_TEST = "get cars_test_annos_withlabels.mat (docs/data_sets.md), which holds the classes of the test images"


class Copy(NamedTuple):
    """A copy of Cars196: its layout (a key of `READERS`), its folder, and the folders in there that belong to it."""

    layout: str
    folder: Path
    holds: frozenset[str]


def main() -> None:
    """Read the options and the list of images, write the four files."""
    args = image_arrays.option_parser("car196", __doc__.splitlines()[0]).parse(sys.argv[1:])
    home, copy = find_copy(args.data_dir)
    sources, labels = READERS[copy.layout](copy.folder)
    listed_in = copy.folder / "cars_annos.mat" if copy.layout == "official" else copy.folder
    splits = image_arrays.halves_by_class(sources, labels, N_CLASSES, listed_in)
    if copy.layout != "parquet":
        image_arrays.check_images_exist(sources)
    if copy.layout != "official":
        tell_what_is_missing(copy, labels)
    image_arrays.write_splits(
        "car196",
        splits,
        getattr(args, "out_dir", home),
        image_size=args.image_size,
        make_row=parquet_images.read_parquet_image if copy.layout == "parquet" else image_arrays.read_image,
        workers=args.workers,
    )


def tell_what_is_missing(copy: Copy, labels: Sequence[int]) -> None:
    """Say where the images came from, and warn of a copy with fewer (or more) than there are."""
    print(f"{copy.folder}: {len(labels):,} images, {LAYOUTS[copy.layout]}")
    classes = len(set(labels))
    if (len(labels), classes) != (N_IMAGES, N_CLASSES):
        print(
            f"note: {copy.folder}: {len(labels):,} images of {classes} classes; Cars196 has {N_IMAGES:,} of "
            f"{N_CLASSES}: scores will not compare with published ones",
            file=sys.stderr,
        )


# -------------------------------------------------------------------------------------------------- which layout


def find_copy(data_dir: Path) -> tuple[Path, Copy]:
    """The data set's folder, where the results go by default, and the copy in it.

    Raises `UserError` when there is none, or more than one.
    """
    for home in (data_dir / "car196", data_dir):
        found = copies_in(home, DEPTH) if home.is_dir() else []
        if len(found) > 1:
            named = " and ".join(f"{copy.folder} ({LAYOUTS[copy.layout]})" for copy in found)
            raise UserError(f"{home}: holds more than one copy of Cars196: {named}; move all but one away")
        if found:
            return home, found[0]
        if (home / "cars_annos.mat").is_file():  # its images are missing: say which
            return home, Copy("official", home, frozenset())
    raise UserError(f"{data_dir / 'car196' / 'cars_annos.mat'}: not found; {ADVICE}")


def copies_in(folder: Path, depth: int) -> list[Copy]:
    """The copies in a folder and, `depth` levels down, in those below it that belong to none; sorted by path."""
    below = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(".") and entry.is_dir())
    found = []
    if "car_ims" in below and (folder / "cars_annos.mat").is_file():
        found.append(Copy("official", folder, frozenset({"car_ims"})))
    own = {"cars_train", "cars_test"} & set(below)
    if own:
        found.append(Copy("devkit", folder, frozenset({*own, "devkit", "car_devkit"})))
    own = {name for name in below if name in PARTS and has_classes(folder / name)} or (
        set(below) if has_classes(folder) else set()
    )
    if own:
        found.append(Copy("classes", folder, frozenset(own)))
    if any(not path.name.startswith(".") for path in folder.glob("*.parquet")):
        found.append(Copy("parquet", folder, frozenset()))
    belonging = {name for copy in found for name in copy.holds}
    for name in below:
        if depth and name not in belonging:
            found += copies_in(folder / name, depth - 1)
    return found


def has_classes(folder: Path) -> bool:
    """Whether one of the folders in `folder` has the name of a class."""
    return any(key_of(entry.name) in class_of() and entry.is_dir() for entry in folder.iterdir())


@cache
def class_of() -> dict[str, int]:
    """The official number, 1 to 196, of each class, by the `key_of` its name."""
    names = CLASSES.read_text(encoding="utf-8").splitlines()
    return {key_of(name): number for number, name in enumerate(names, 1)}


def key_of(name: str) -> str:
    """A class name without what copies change: case, blanks, slashes, hyphens, dots ("Ram C/V", "ram_c_v")."""
    return "".join(c for c in name.casefold() if c.isalnum())


def named_class(name: str, where: str) -> int:
    """The official number of a class; `UserError` beginning with `where` for a name that is none."""
    number = class_of().get(key_of(name))
    if number is None:
        raise UserError(f"{where}: {name!r} is none of the {N_CLASSES} classes of {CLASSES.name}; correct or remove it")
    return number


# ------------------------------------------------------------------------------------------------ the four layouts


def read_official(folder: Path) -> tuple[list[Path], list[int]]:
    """car_ims/ and cars_annos.mat: in the order of the annotations; their `test` flag plays no part here."""
    return read_annotations(folder / "cars_annos.mat")


def read_devkit(folder: Path) -> tuple[list[Path], list[int]]:
    """cars_train/ and cars_test/ (or cars_train/cars_train/ ...) and their annotations, in the order of these.

    Raises `UserError` for images without annotations, and for annotations without classes.
    """
    paths, labels = [], []
    for part, names, mend in (
        ("cars_train", ("cars_train_annos.mat",), MEND_TRAIN),
        ("cars_test", ("cars_test_annos_withlabels.mat", "cars_test_annos_withlabels (1).mat", "cars_test_annos.mat"),
         MEND_TEST),
    ):  # fmt: skip
        if not (folder / part).is_dir():
            continue
        places = [folder / name for name in ("", "devkit", "car_devkit", "car_devkit/devkit", "car_devkit/car_devkit")]
        found = [place / name for name in names for place in places if (place / name).is_file()]
        if not found:
            raise UserError(
                f"{folder / names[0]}: not found, and the names in cars_annos.mat are not those of {part}; {mend}"
            )
        inner = folder / part / part
        images = inner if inner.is_dir() else folder / part
        more_paths, more_labels = read_annotations(found[0], images, "fname", mend)
        paths += more_paths
        labels += more_labels
    return paths, labels


def read_classes(folder: Path) -> tuple[list[Path], list[int]]:
    """train/ and test/, or just one folder, of folders named after the classes.

    Ordered by class, then train before test, then by name. Raises `UserError` for images in any other folder.
    """
    parts = [folder / part for part in PARTS if (folder / part).is_dir() and has_classes(folder / part)] or [folder]
    found = []
    for number, part in enumerate(parts):
        for path in find_images(part):
            inside = path.relative_to(part)
            label = named_class("/".join(inside.parts[:-1]), str(path))  # "Ram C/V ..." may be two folders
            image_arrays.image_path(part, str(inside), str(part))
            found.append((label, number, path))
    found.sort(key=lambda item: (item[0], item[1], item[2].parts))
    return [path for _, _, path in found], [label for label, _, _ in found]


def read_parquet(folder: Path) -> tuple[list[parquet_images.ParquetImage], list[int]]:
    """Parquet files with the columns image and label: train, then test; each by file name and row.

    Labels are texts (names of classes), numbers with names beside them, or numbers from 0 in the official order.
    """
    files, others = parquet_images.parquet_files(folder, PARQUET_PARTS)
    if others:
        print(f"{folder}: left out, neither train nor test: {', '.join(path.name for path in others)}")
    places, labels = [], []
    for file in files:
        image_arrays.image_path(folder, file.name, str(folder))
        more, values, names = parquet_images.read_labels(file)
        numbers = [named_class(name, f"{file}: label names") for name in names]
        if not names and not any(isinstance(value, str) for value in values):
            print(f"{file}: does not name its classes; label 0 is taken for class 1 of the official order")
        places += more
        labels += [parquet_class(value, numbers, f"{file}: row {row}") for row, value in enumerate(values)]
    return places, labels


def parquet_class(value: object, numbers: Sequence[int], where: str) -> int:
    """The official number of a label in a parquet file; `numbers` are those of labels 0, 1, ..., if known."""
    if isinstance(value, str):
        return named_class(value, where)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < (len(numbers) or N_CLASSES):
        raise UserError(f"{where}: label {value!r} is none of 0-{(len(numbers) or N_CLASSES) - 1}; use another copy")
    return numbers[value] if numbers else value + 1


READERS: dict[str, Callable[[Path], tuple[list[Any], list[int]]]] = {
    "official": read_official,
    "devkit": read_devkit,
    "classes": read_classes,
    "parquet": read_parquet,
}
LAYOUTS = {
    "official": "car_ims/ with cars_annos.mat",
    "devkit": "cars_train/ and cars_test/ with their annotations",
    "classes": "folders of classes",
    "parquet": "parquet files",
}


# ------------------------------------------------------------------------------------------------ annotations


def read_annotations(
    file: Path, images: Path | None = None, field: str = "relative_im_path", mend: str = MEND
) -> tuple[list[Path], list[int]]:
    """The images and their classes (1..196) in the order of the annotations.

    Args:
        images: the folder that the names in `field` lie in; None: that of the file, where car_ims/ may be a link.
        mend: what to do about a file that is not as it should be.

    Raises `UserError` naming the file and the entry for what is missing, malformed, double or out of range.
    """
    annotations = load_annotations(file, field, mend)
    paths, labels = [], []
    first_entry: dict[Path, int] = {}
    for entry, (name, label) in enumerate(zip(annotations[field], annotations["class"], strict=True), 1):
        where = f"{file}: annotation {entry}"
        name, label = single_value(name), single_value(label)
        if not isinstance(name, str):
            raise UserError(f"{where}: {field} is not one text; {mend}")
        if isinstance(label, bool) or not isinstance(label, (int, float)) or label != label // 1:
            raise UserError(f"{where}: class {' '.join(repr(label).split())} is not one whole number; {mend}")
        path = image_arrays.image_path(images or file.parent, name, where, linked="" if images else "car_ims")
        if first_entry.setdefault(path, entry) != entry:
            raise UserError(f"{where}: {name!r} is already annotation {first_entry[path]}; {mend}")
        paths.append(path)
        labels.append(image_arrays.checked_class(int(label), N_CLASSES, where))
    return paths, labels


def load_annotations(file: Path, field: str = "relative_im_path", mend: str = MEND) -> np.ndarray:
    """The struct array `annotations` of the MATLAB file, shape (N,); `UserError` where it or a field is missing."""
    from scipy.io import loadmat  # here, since it takes longer to import than all the rest

    try:
        with memory_limited(MOST_MEMORY):
            variables = loadmat(file, squeeze_me=True, variable_names=["annotations"])
    except MemoryError:
        raise UserError(f"{file}: claims arrays of more than {MOST_MEMORY // 10**6} MB; {mend}") from None
    except Exception as error:  # the reader raises almost anything for files of another kind
        what = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{file}: cannot be read as a MATLAB file ({what}); {mend}") from None
    annotations = np.atleast_1d(variables.get("annotations", np.empty(0)))
    for name in (field, "class"):
        if name not in (annotations.dtype.names or ()):
            raise UserError(f"{file}: has no struct `annotations` with the field `{name}`; {mend}")
    return annotations.reshape(-1)


def single_value(value: Any) -> Any:
    """The one element of an array of whatever shape, as a Python value; anything else as it is."""
    value = np.asarray(value)
    return value.item() if value.size == 1 else value


if __name__ == "__main__":
    image_arrays.run(main)
