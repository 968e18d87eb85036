"""Raw lists of images and their classes -> the two halves of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

from utils.errors import UserError

MEND = "restore the list from the original archive"


class Half(NamedTuple):
    """One half of a data set: row i of its arrays is made from `sources[i]`."""

    name: str  # "training" or "validation"
    sources: Sequence[Any]
    labels: Sequence[int]  # classes from 1 on; -1: not labeled
    paths: Sequence[str] = ()  # of the image files, for a list beside the arrays
    classes: Sequence[str] = ()  # names of the classes for that list, class 1 first
    roles: Sequence[int] = ()  # query 0, gallery 1; none: every image searches all others

    def keep(self, rows: Sequence[int], name: str = "") -> Half:
        """Return the split of these rows alone, under another name if that is not empty."""
        chosen = {
            field: [values[row] for row in rows]
            for field in ("sources", "labels", "paths", "roles")
            if (values := getattr(self, field))
        }
        return self._replace(name=name or self.name, **chosen)


def find_raw(
    data_dir: Path, dataset: str, patterns: Sequence[str], advice: str
) -> tuple[Path, Path]:
    """Find the list of a data set, such as images.txt, where its archive may have put it.

    Args:
        data_dir: the folder that holds `<dataset>/`, or the data set's folder itself.
        patterns: glob patterns of the list, below the data set's folder.
        advice: where to get the raw files, for the message if they are missing.

    Returns:
        The data set's folder and the list. Raises UserError if there is no list.
    """
    for home in (data_dir / dataset, data_dir):
        for pattern in patterns:
            for file in sorted(home.glob(pattern)):
                return home, file
    raise UserError(f"{data_dir / dataset / patterns[0]}: not found; {advice}")


def read_lines(file: Path, advice: str) -> list[tuple[str, str]]:
    """Read the lines of a list that are not empty, each with the place where it stands.

    Raises UserError, ending in `advice`, if the file is missing, and UserError if it is no text.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise UserError(f"{file}: not found; {advice}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: is not a text file; {MEND}") from None
    numbered = enumerate(lines, 1)
    return [(line, f"{file}: line {number}") for number, line in numbered if line.strip()]


def read_columns(lines: Sequence[tuple[str, str]], columns: str) -> list[tuple[list[str], str]]:
    """Split the lines of `read_lines` into columns; the last column takes the rest of its line.

    Args:
        columns: their names with blanks between them; a line of just these names is left out.

    Returns:
        The texts of each line and its place. Raises UserError for a line with too few columns.
    """
    names = columns.split()
    rows = []
    for line, place in lines:
        texts = line.strip().split(maxsplit=len(names) - 1)
        if len(texts) < len(names):
            raise UserError(f"{place}: {line!r} is not of the form {columns!r}; {MEND}")
        if texts != names:
            rows.append((texts, place))
    return rows


def read_class(text: str, n_classes: int, place: str) -> int:
    """Return the class that a list names; raises UserError unless it is one of 1..`n_classes`."""
    if not text.isdecimal() or not 1 <= int(text) <= n_classes:
        raise UserError(f"{place}: class {text!r} is not one of 1-{n_classes}; {MEND}")
    return int(text)


def image_path(folder: Path, name: str, place: str) -> Path:
    """Return the path of a listed image; raises UserError unless it lies below `folder`."""
    listed = PureWindowsPath(name)  # knows both kinds of slash and drive letters on every system
    if not listed.parts or listed.drive or listed.root or ".." in listed.parts:
        raise UserError(f"{place}: the path {name!r} leaves {folder}; list paths below it alone")
    return folder / name


def check_images_exist(paths: Sequence[Path]) -> None:
    """Raise UserError for the first of `paths` that is no file."""
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"{missing[0]}: listed, but no such file ({len(missing)} of {len(paths)} are missing); "
            "unpack the archive's images again"
        )


def check_sizes(splits: Sequence[Half], source: Path) -> None:
    """Raise UserError that names `source` unless each half has two images."""
    for split in splits:
        count = len(split.sources)
        if count < 2:
            raise UserError(f"{source}: {count} images in the {split.name} half; 2 are needed")


def check_disjoint(splits: Sequence[Half], source: Path) -> None:
    """Raise UserError that names `source` for too few images, and for a class in both halves."""
    check_sizes(splits, source)
    shared = set.intersection(*(set(split.labels) for split in splits))
    if shared:
        raise UserError(f"{source}: class {min(shared)} is in both halves; {MEND}")


def halves_by_class(
    sources: Sequence[Any], labels: Sequence[int], n_training: int, source: Path
) -> list[Half]:
    """Split a data set zero-shot: classes 1..`n_training` train, the others are never seen.

    Order is kept. Raises UserError that names `source` unless each half has two images.
    """
    everything = Half("", sources, labels)
    training = [row for row, label in enumerate(labels) if label <= n_training]
    validation = [row for row, label in enumerate(labels) if label > n_training]
    splits = [everything.keep(training, "training"), everything.keep(validation, "validation")]
    check_sizes(splits, source)
    return splits
