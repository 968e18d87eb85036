"""In-shop Clothes -> data/inshop/*.npy: items to train on, queries and gallery of other items.

python pre_process/pre_process_inshop.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, if run as a script

from datasets.arrays import QUERY
from pre_process import raw_lists
from pre_process.raw_lists import Half
from pre_process.script import option_parser, write
from utils.errors import UserError, run_script

LIST = "list_eval_partition.txt"
LARGEST_ITEM = 99_999_999  # items are written id_00000001
COLUMNS = "image_name item_id evaluation_status"
ROLES = {"query": QUERY, "gallery": QUERY + 1}
ADVICE = (
    "get the In-shop Clothes Retrieval Benchmark "
    "(https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion.html), unpack img.zip, and have "
    f"Eval/{LIST} and Img/img/ in data/inshop/, or give --data_dir"
)


def main() -> None:
    """Read the options and the list, write the five files."""
    args = option_parser("inshop", __doc__.splitlines()[0]).parse(sys.argv[1:])
    patterns = (f"Eval/{LIST}", LIST, f"*/Eval/{LIST}", f"*/{LIST}")
    home, file = raw_lists.find_raw(args.data_dir, "inshop", patterns, ADVICE)
    splits = read_list(file, images_of(file))
    raw_lists.check_disjoint(splits, file)
    raw_lists.check_images_exist([path for split in splits for path in split.sources])
    write("inshop", splits, home, args)


def images_of(file: Path) -> Path:
    """Return the folder that holds img/, for the list `file` in Eval/ or beside Img/ or img/."""
    raw = file.parent.parent if file.parent.name == "Eval" else file.parent
    return raw / "Img" if (raw / "Img" / "img").is_dir() else raw


def read_list(file: Path, images: Path) -> list[Half]:
    """Read the training half, and the test half with its roles, each in the order of the list.

    Labels are the numbers of the items. Raises UserError that names file and line for a malformed
    list, and for another number of images than its first line says.
    """
    training = Half("training", [], [])
    test = Half("validation", [], [], roles=[])
    lines = raw_lists.read_lines(file, ADVICE)
    rows = raw_lists.read_columns(lines[1:], COLUMNS)
    for (name, item, status), place in rows:
        half = training if status == "train" else test
        half.sources.append(raw_lists.image_path(images, name, place))
        half.labels.append(raw_lists.read_class(item.removeprefix("id_"), LARGEST_ITEM, place))
        if half is test:
            half.roles.append(read_role(status, place))
    if lines and lines[0][0].strip() != str(len(rows)):
        count, place = lines[0]
        raise UserError(f"{place}: says {count} images, {len(rows)} are listed; {raw_lists.MEND}")
    return [training, test]


def read_role(status: str, place: str) -> int:
    """Return the role of a test image; raises UserError for an unknown status."""
    if status not in ROLES:
        raise UserError(f"{place}: status {status!r} is not train, query or gallery")
    return ROLES[status]


if __name__ == "__main__":
    run_script(main)
