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
