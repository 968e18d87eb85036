"""Small raw folders in the layouts of the official data sets, and ways to spoil them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet
from scipy.io import savemat

ROOT = Path(__file__).resolve().parents[1]


def save_photo(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> Path:
    """Save a picture of smooth random colors in the format of its ending; returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    photo = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    photo.save(path, quality=95)
    return path


def replace_line(file: Path, number: int, line: str) -> None:
    """Replace a line of a text file, counted from 1."""
    lines = file.read_text().splitlines()
    lines[number - 1] = line
    file.write_text("\n".join(lines) + "\n")


def make_cub(folder: Path, extra: int = 0) -> Path:
    """Make six images of CUB, and `extra` more of class 4 to train on.

    Ids do not begin at 1, images are not ordered by class, and the two lists differ in order.
    """
    listed = [(7, 150), (3, 1), (12, 100), (5, 101), (9, 2), (20, 200)]
    listed += [(image_id, 4) for image_id in range(1000, 1000 + extra)]
    for image_id, label in listed:
        photo = folder / "images" / name_of(image_id, label)
        save_photo(photo, seed=image_id, size=(30 + image_id % 50, 40))
    images = [f"{image_id} {name_of(image_id, label)}\n" for image_id, label in listed]
    classes = [f"{image_id} {label}\n" for image_id, label in sorted(listed)]
    (folder / "images.txt").write_text("".join(images))
    (folder / "image_class_labels.txt").write_text("".join(classes))
    return folder


def name_of(image_id: int, label: int) -> str:
    """Return the path of an image in images/ of CUB."""
    return f"{label:03d}.Some_Bird/Some_Bird_{image_id:04d}.jpg"


def make_cars(folder: Path, rows: Sequence[tuple[object, object]] | None = None) -> Path:
    """Make five images of Cars196 with cars_annos.mat; `rows` are other (path, class) to list."""
    if rows is None:
        classes = enumerate((196, 1, 98, 99, 1), 1)
        rows = [(f"car_ims/{number:06d}.jpg", label) for number, label in classes]
    for number in range(1, 6):
        photo = folder / "car_ims" / f"{number:06d}.jpg"
        save_photo(photo, seed=number, size=(50, 20 + number))
    save_annotations(folder / "cars_annos.mat", rows, ("relative_im_path", "class"))
    return folder


def save_annotations(
    file: Path, rows: Sequence[tuple[object, ...]], fields: Sequence[str] = ("fname", "class")
) -> None:
    """Save the struct `annotations` of a MATLAB file of Cars196."""
    file.parent.mkdir(parents=True, exist_ok=True)
    annotations = np.empty((1, len(rows)), dtype=[(name, object) for name in ("bbox_x1", *fields)])
    for number, row in enumerate(rows):
        annotations[0, number] = (7, *row)
    savemat(file, {"annotations": annotations})


# Copies of Cars196 in folders of classes hold these images: (part, number, class).
CAR_COPY = [
    ("train", 1, 99),
    ("train", 2, 1),
    ("train", 3, 174),
    ("test", 1, 98),
    ("test", 2, 196),
    ("test", 3, 1),
]
CAR_NAMES = {
    1: "AM General Hummer SUV 2000",
    98: "Eagle Talon Hatchback 1998",
    99: "FIAT 500 Abarth 2012",
    174: "Ram C/V Cargo Van Minivan 2012",
    196: "smart fortwo Convertible 2012",
}


def car_photo(part: str, number: int, file: Path) -> Path:
    """Save the image `number` of a part, the same in every copy."""
    return save_photo(file, seed=100 * (part == "test") + number, size=(40, 20 + number))


def make_cars_classes(
    folder: Path, ram: str = "Ram C-V Cargo Van Minivan 2012", inside: str = "car_data/car_data"
) -> Path:
    """Make train/ and test/ with a folder for each class; `ram` is the one with the slash."""
    for part, number, label in CAR_COPY:
        name = ram if label == 174 else CAR_NAMES[label]
        car_photo(part, number, folder / inside / part / name / f"{number:05d}.jpg")
    return folder


def make_cars_parquet(folder: Path, names: str = "official") -> list[Path]:
    """Make parquet files of the training part, in two pieces, and the test part.

    names: "official", "alphabetical", or "" if none are stored beside the labels.
    """
    official = (ROOT / "pre_process" / "car196_classes.txt").read_text().splitlines()
    listed = sorted(official, key=str.lower) if names == "alphabetical" else official
    features = {"label": {"names": listed, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pieces = {
        "train-00000-of-00002.parquet": CAR_COPY[:2],
        "train-00001-of-00002.parquet": CAR_COPY[2:3],
        "test-00000-of-00001.parquet": CAR_COPY[3:],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in pieces.items():
        photos = [
            car_photo(part, number, folder / "x.jpg").read_bytes() for part, number, _ in rows
        ]
        images = [{"bytes": photo, "path": None} for photo in photos]
        labels = [listed.index(official[label - 1]) for _, _, label in rows]
        table = pyarrow.table({"image": images, "label": labels})
        if names:
            table = table.replace_schema_metadata(metadata)
        parquet.write_table(table, folder / name)
    (folder / "x.jpg").unlink()
    return [folder / name for name in pieces]


def make_sop(folder: Path, each: int = 2) -> Path:
    """Make `each` images of 3 classes in either list of Stanford Online Products, mixed."""
    image_id = 0
    halves = {"Ebay_train.txt": (11318, 1, 40), "Ebay_test.txt": (22634, 11319, 12000)}
    for name, classes in halves.items():
        lines = ["image_id class_id super_class_id path"]
        for number, label in enumerate(classes * each):
            image_id += 1
            kind = label % 2
            folder_name = ("bicycle", "chair")[kind]
            path = f"{folder_name}_final/{100000 + label}_{number // 3}.JPG"
            save_photo(folder / path, seed=image_id, size=(30 + image_id, 40))
            lines.append(f"{image_id} {label} {kind + 1} {path}")
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def make_inshop(folder: Path, each: int = 2, images: str = "Img/img", listed: str = "Eval") -> Path:
    """Make `each` images of 2 items to train on, and queries and gallery images of 3 others.

    Their roles take turns in the list, whose columns are padded.
    """
    items = [(2, "train"), (7982, "train")]
    items += [(item, role) for item in (5, 1, 90) for role in ("query", "gallery")]
    lines = []
    for number in range(each):
        for item, status in items:
            name = f"WOMEN/Dresses/id_{item:08d}/{number + 1:02d}_{len(lines)}_{status}.jpg"
            save_photo(folder / images / name, seed=len(lines), size=(30, 40 + len(lines)))
            lines.append(f"{f'img/{name}':<75}{f'id_{item:08d}':<12} {status}")
    (folder / listed).mkdir(exist_ok=True)
    head = [str(len(lines)), "image_name item_id evaluation_status"]
    (folder / listed / "list_eval_partition.txt").write_text("\n".join([*head, *lines]) + "\n")
    return folder
