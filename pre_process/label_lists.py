"""Classes of a person's images: from the folders that they are in, or from a CSV file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from utils.errors import UserError
from utils.tables import clean, read_rows


def folder_classes(paths: Sequence[Path], images: Path) -> list[str]:
    """Return the names of the folders directly below `images` that the images are in."""
    for path in paths:
        if path.parent == images:
            raise UserError(
                f"{path}: lies directly in --images; with --labels subfolders every image is in "
                "the folder of its class"
            )
    return [path.relative_to(images).parts[0] for path in paths]


def read_labels(file: Path, images: Path, files: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Read the images below `images` that a CSV file lists, in its order, and their classes.

    Args:
        files: the image files below `images`.

    Raises UserError that names file and line for what is missing or listed twice.
    """
    places = {clean(str(path.relative_to(images))): path for path in files}
    classes: dict[Path, str] = {}
    missing = []
    n_rows = 0
    try:
        for place, (name, label) in read_rows(file, ("path", "class")):
            if not name and not label:  # a row of separators alone
                continue
            n_rows += 1
            if not clean(label):
                raise UserError(f"{place}: no class; give every image one, or remove the line")
            path = listed_path(name, images, places)
            if path is None:
                missing.append(f"{place}: {name!r} is no image below {images}")
            elif path in classes:
                raise UserError(f"{place}: {name} is listed twice; remove one line")
            else:
                classes[path] = label
    except FileNotFoundError as error:
        raise UserError(f"--labels: {error}; give a CSV file, or subfolders") from None
    if missing:
        count = f"{len(missing)} of {n_rows} rows have no image"
        raise UserError(f"{missing[0]} ({count}); correct the paths, or give another --images")
    return list(classes), list(classes.values())


def listed_path(name: str, images: Path, places: dict[str, Path]) -> Path | None:
    """Find the image that a list names: as written, or but for blanks, slashes and Unicode form.

    places: the images by their cleaned path below `images`.
    """
    of_windows = os.fsencode(name).decode("cp1252", "replace")  # as Excel saves CSV
    for spelling in (name, clean(name), name.replace("\\", "/"), of_windows):
        below = os.path.relpath(os.path.abspath(images / spelling), images)
        is_below = not below.startswith(os.pardir)
        if is_below and "\0" not in spelling and (images / below).is_file():
            return images / below
        if clean(below) in places:
            return places[clean(below)]
    return None


def clean_classes(classes: Sequence[str]) -> tuple[list[str], int]:
    """Return class names in one form (see `clean`), and how many changed."""
    cleaned = [clean(name) for name in classes]
    return cleaned, sum(old != new for old, new in zip(classes, cleaned, strict=True))
