"""The official classes of Cars196, under the names that copies of it give them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

FILE = Path(__file__).with_name("car196_classes.txt")  # class_names of cars_annos.mat, in order


def class_names() -> list[str]:
    """Read the names of the 196 classes, class 1 first."""
    return FILE.read_text(encoding="utf-8").splitlines()


@cache
def class_numbers() -> dict[str, int]:
    """Return the number of each class, 1-196, by the letters and digits of its name."""
    return {_letters(name): number for number, name in enumerate(class_names(), 1)}


def class_of_folder(folder: Path) -> int | None:
    """Return the number of the class that a folder is named after; None if it is no class.

    Copies change case, blanks, hyphens and dots, and "Ram C/V ..." may have become two folders.
    """
    for name in (folder.name, folder.parent.name + folder.name):
        number = class_numbers().get(_letters(name))
        if number:
            return number
    return None


def _letters(name: str) -> str:
    return "".join(c for c in name.casefold() if c.isalnum())
