"""In-shop Clothes Retrieval (DeepFashion) -> data/inshop/*.npy: items to train on, queries and gallery of others.

python pre_process/pre_process_inshop.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, when this is run as a script

from pre_process import image_arrays
from pre_process.image_arrays import GALLERY, MEND, QUERY, Split
from utils.errors import UserError

LIST = "list_eval_partition.txt"
BENCHMARK = "In-shop Clothes Retrieval Benchmark"  # the folder of the download
COLUMNS = "image_name item_id evaluation_status"
ROLES = {"train": None, "query": QUERY, "gallery": GALLERY}
ADVICE = (
    "get the In-shop Clothes Retrieval Benchmark (https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion.html), unpack "
    f"img.zip, and have Eval/{LIST} and Img/img/ (or {LIST} and img/) in data/inshop/, or give --data_dir"
)


class Row(NamedTuple):
    """A line of the list."""

    path: Path
    item: int  # the number in id_00000001
    role: int | None  # QUERY, GALLERY; None: it trains
    where: str


def main() -> None:
    """Read the options and the list, write the five files."""
    args = image_arrays.option_parser("inshop", __doc__.splitlines()[0]).parse(sys.argv[1:])
    places = ["Eval", BENCHMARK, f"{BENCHMARK}/Eval"]
    home, folder = image_arrays.find_raw_folder(args.data_dir, "inshop", LIST, places, ADVICE)
    raw = folder.parent if folder.name == "Eval" else folder
    rows = read_list(folder / LIST, raw / "Img" if (raw / "Img" / "img").is_dir() else raw)
    splits = make_splits(rows, folder / LIST)
    image_arrays.check_images_exist([row.path for row in rows])
    image_arrays.write_splits(
        "inshop",
        splits,
        getattr(args, "out_dir", home),
        image_size=args.image_size,
        make_row=image_arrays.read_image,
        workers=args.workers,
    )


def read_list(file: Path, images: Path) -> list[Row]:
    """The rows of the list, in its order; the folder `images` holds img/.

    Raises `UserError` naming file and line for what is missing, malformed or double, and for another number of lines
    than the first one says.
    """
    lines = image_arrays.read_lines(file, ADVICE)
    count = lines[0][0] if lines else ""
    if not image_arrays.is_number(count):
        raise UserError(f"{file}: line 1: expected the number of images, found {count!r}; {MEND}")
    rows, listed = [], {}
    for (name, item, status), where in image_arrays.read_columns(lines[1:], file, COLUMNS):
        if not re.fullmatch(r"id_[0-9]{8}", item) or int(item[3:]) < 1:
            raise UserError(f"{where}: item {item!r} is not of the form id_00000001; {MEND}")
        if status not in ROLES:
            raise UserError(f"{where}: status {status!r} is none of {', '.join(ROLES)}; {MEND}")
        path = image_arrays.image_path(images, name, where, linked="img")
        if listed.setdefault(path, where) != where:
            raise UserError(f"{where}: {name!r} is listed already, in {listed[path]}; {MEND}")
        rows.append(Row(path, int(item[3:]), ROLES[status], where))
    if int(count) != len(rows):
        raise UserError(f"{file}: its first line says {count} images, {len(rows)} are listed; {MEND}")
    return rows


def make_splits(rows: list[Row], listed_in: Path) -> list[Split]:
    """Training images, and queries and gallery together, each in the order of the list.

    Raises `UserError` naming `listed_in` or a line of it for a class of both halves, a half without images, and a query
    whose item the gallery lacks.
    """
    training = [row for row in rows if row.role is None]
    test = [row for row in rows if row.role is not None]
    halves = (("training", training, []), ("validation", test, [row.role for row in test]))
    splits = [Split(n, [r.path for r in half], [r.item for r in half], roles=roles) for n, half, roles in halves]
    image_arrays.check_disjoint(splits, listed_in)
    if QUERY not in splits[1].roles:
        raise UserError(f"{listed_in}: no query; {MEND}")
    gallery = {row.item for row in test if row.role == GALLERY}
    for row in test:
        if row.item not in gallery:
            raise UserError(f"{row.where}: no image of item id_{row.item:08d} in the gallery; {MEND}")
    return splits


if __name__ == "__main__":
    image_arrays.run(main)
