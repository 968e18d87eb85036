"""Small raw folders in the official layouts of the data sets, and ways to spoil their lists."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat


def save_photo(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> None:
    """A JPEG of smooth random colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path, quality=95)


def make_cub(folder: Path) -> Path:
    """Six images; ids not from 1, order not by class, labels listed in another order than images."""
    listed = [(7, 150), (3, 1), (12, 100), (5, 101), (9, 2), (20, 200)]
    for image_id, label in listed:
        save_photo(folder / "images" / name_of(image_id, label), seed=image_id, size=(30 + image_id, 40))
    (folder / "images.txt").write_text("".join(f"{i} {name_of(i, c)}\n" for i, c in listed))
    (folder / "image_class_labels.txt").write_text("".join(f"{i} {c}\n" for i, c in sorted(listed)))
    return folder


def name_of(image_id: int, label: int) -> str:
    return f"{label:03d}.Some_Bird/Some_Bird_{image_id:04d}.jpg"


def make_cars(folder: Path, rows: list[tuple[str, object]] | None = None) -> Path:
    """Five images in the struct of the official file; the `test` flag contradicts the classes on purpose."""
    if rows is None:
        rows = [(f"car_ims/{n:06d}.jpg", label) for n, label in enumerate((196, 1, 98, 99, 1), 1)]
    for n in range(1, 6):
        save_photo(folder / "car_ims" / f"{n:06d}.jpg", seed=n, size=(50, 20 + n))
    fields = [(name, object) for name in ("relative_im_path", "bbox_x1", "class", "test")]
    annotations = np.empty((1, len(rows)), dtype=fields)
    for n, (path, label) in enumerate(rows):
        annotations[0, n] = (path, 10, label, n % 2)
    savemat(folder / "cars_annos.mat", {"annotations": annotations, "class_names": "x"})
    return folder


def make_sop(folder: Path, each: int = 2) -> Path:
    """`each` images of 3 classes in either list of Stanford Online Products, not in the order of the classes."""
    image_id = 0
    for name, classes in (("Ebay_train.txt", (11318, 1, 40)), ("Ebay_test.txt", (22634, 11319, 12000))):
        lines = ["image_id class_id super_class_id path"]
        for number, label in enumerate(classes * each):
            kind, image_id = 1 + label % 2, image_id + 1
            path = f"{('bicycle', 'chair')[kind - 1]}_final/{100000 + label}_{number // 3}.JPG"
            save_photo(folder / path, seed=image_id, size=(30 + image_id, 40))
            lines.append(f"{image_id} {label} {kind} {path}")
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def make_inshop(folder: Path, each: int = 2, images: str = "Img/img", listed: str = "Eval") -> Path:
    """`each` images of 2 items to train on, `each` queries and gallery images of 3 others, in turns, columns padded."""
    lines = []
    listed_as = [(2, "train"), (7982, "train"), *((item, role) for item in (5, 1, 90) for role in ("query", "gallery"))]
    for number in range(each):
        for item, status in listed_as:
            name = f"WOMEN/Dresses/id_{item:08d}/{number + 1:02d}_{len(lines)}_{status}.jpg"
            save_photo(folder / images / name, seed=len(lines), size=(30, 40 + len(lines)))
            lines.append(f"{f'img/{name}':<75}{f'id_{item:08d}':<12} {status}")
    (folder / listed).mkdir(exist_ok=True)
    head = [str(len(lines)), "image_name item_id evaluation_status"]
    (folder / listed / "list_eval_partition.txt").write_text("\n".join([*head, *lines]) + "\n")
    return folder


def replace_line(file: Path, number: int, line: str) -> None:
    lines = file.read_text().splitlines()
    lines[number - 1] = line
    file.write_text("\n".join(lines) + "\n")


# the copies of Cars196 that are in use hold these images: (part, number, class); both halves and both parts
CAR_COPY = [("train", 1, 99), ("train", 2, 1), ("train", 3, 174), ("test", 1, 98), ("test", 2, 196), ("test", 3, 1)]
CAR_NAMES = {
    1: "AM General Hummer SUV 2000", 98: "Eagle Talon Hatchback 1998", 99: "FIAT 500 Abarth 2012",
    174: "Ram C/V Cargo Van Minivan 2012", 196: "smart fortwo Convertible 2012",
}  # fmt: skip


def car_photo(part: str, number: int, file: Path) -> Path:
    """The image `number` of a part, the same in every layout."""
    save_photo(file, seed=100 * (part == "test") + number, size=(40, 20 + number))
    return file


def save_annotations(file: Path, rows: list[tuple[str, object]], fields: tuple[str, ...] = ("fname", "class")) -> None:
    """The struct `annotations` of the development kit's files."""
    file.parent.mkdir(parents=True, exist_ok=True)
    annotations = np.empty((1, len(rows)), dtype=[(name, object) for name in ("bbox_x1", *fields)])
    for n, row in enumerate(rows):
        annotations[0, n] = (7, *row[: len(fields)])
    savemat(file, {"annotations": annotations})


def make_cars_devkit(folder: Path, inner: bool = True, kit: str = "car_devkit/devkit") -> Path:
    """cars_train/ and cars_test/, doubled as on Kaggle (`inner`), and the development kit's annotations."""
    for part in ("train", "test"):
        images = folder / f"cars_{part}" / f"cars_{part}" if inner else folder / f"cars_{part}"
        rows = [(f"{n:05d}.jpg", label) for of, n, label in CAR_COPY if of == part]
        for name, _ in rows:
            car_photo(part, int(name[:5]), images / name)
        save_annotations(folder / kit / f"cars_{part}_annos.mat", rows, ("fname", "class")[: 1 + (part == "train")])
    save_annotations(folder / "cars_test_annos_withlabels.mat", rows)
    return folder


def make_cars_classes(
    folder: Path, ram: str = "Ram C-V Cargo Van Minivan 2012", inside: str = "car_data/car_data"
) -> Path:
    """train/ and test/ with a folder for each class."""
    for part, n, label in CAR_COPY:
        car_photo(part, n, folder / inside / part / (ram if label == 174 else CAR_NAMES[label]) / f"{n:05d}.jpg")
    (folder / "names.csv").write_text("AM General Hummer SUV 2000\n")
    return folder


def make_cars_parquet(
    folder: Path, names: str = "official", in_text: bool = False, inside: str = "data", plain: bool = False
) -> Path:
    """Parquet files as Hugging Face's library writes them: train in two pieces, test, and a distorted test.

    names: beside the labels, "official", "alphabetical" or "" for none; in_text: labels are names of classes;
    plain: the image column holds bytes, not structs.
    """
    import json

    import pyarrow
    import pyarrow.parquet

    official = (Path(__file__).parents[1] / "pre_process" / "car196_classes.txt").read_text().splitlines()
    listed = sorted(official, key=str.lower) if names == "alphabetical" else official
    (folder / inside).mkdir(parents=True, exist_ok=True)
    train, test = ([item for item in CAR_COPY if item[0] == part] for part in ("train", "test"))
    pieces = {"train-00000-of-00002": train[:2], "train-00001-of-00002": train[2:], "test-00000-of-00001": test,
              "contrast-00000-of-00001": test}  # fmt: skip
    for name, rows in pieces.items():
        images = [car_photo(part, n, folder / "made.jpg").read_bytes() for part, n, _ in rows]
        labels = [official[label - 1] if in_text else listed.index(official[label - 1]) for _, _, label in rows]
        cells = images if plain else [{"bytes": image, "path": f"{n}.jpg"} for n, image in enumerate(images)]
        table = pyarrow.table({"image": cells, "label": labels})
        if names and not in_text:
            features = {"image": {"_type": "Image"}, "label": {"names": listed, "_type": "ClassLabel"}}
            table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pyarrow.parquet.write_table(table, folder / inside / f"{name}.parquet", row_group_size=2)
    (folder / "made.jpg").unlink()
    return folder
