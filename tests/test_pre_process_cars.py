"""Copies of Cars196 in folders of classes, and in parquet files, which unpack to such folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from raw_folders import (
    CAR_NAMES,
    car_photo,
    make_cars,
    make_cars_classes,
    make_cars_parquet,
    save_photo,
)
from scipy.io import loadmat
from scripts import Outcome, failed, run_in_process

from pre_process.archives import UnusableError, unpack
from pre_process.car196_classes import class_names, class_of_folder
from pre_process.writer import read_image

SIZE = 16
RAM = "Ram C-V Cargo Van Minivan 2012"
ORDER = {  # by class, train before test: (part, number, class)
    "training": [("train", 2, 1), ("test", 3, 1), ("test", 1, 98)],
    "validation": [("train", 1, 99), ("train", 3, 174), ("test", 2, 196)],
}


def script(data: Path) -> Outcome:
    options = ("--data_dir", data, "--image_size", SIZE, "--workers", 1)
    return run_in_process("pre_process_car196.py", *options)


def check(home: Path, scratch: Path) -> None:
    """Check that the arrays in `home` hold the images and official classes of `ORDER`."""
    for half, rows in ORDER.items():
        stem = home / f"{half}_car196_{SIZE}resized"
        photos = [car_photo(*row[:2], scratch / f"{row[:2]}.jpg") for row in rows]
        pixels = np.stack([read_image(photo, SIZE) for photo in photos])
        np.testing.assert_array_equal(np.load(f"{stem}_img.npy"), pixels)
        assert np.load(f"{stem}_label.npy").tolist() == [label for _, _, label in rows]


@pytest.mark.parametrize("ram", [RAM, CAR_NAMES[174], "ram_c_v_cargo_van_minivan_2012"])
@pytest.mark.parametrize("inside", ["car_data/car_data", ""])
def test_folders_of_classes(ram, inside, tmp_path):
    """The name with a slash makes two folders."""
    make_cars_classes(tmp_path / "car196", ram, inside)
    done = script(tmp_path)
    assert done.code == 0, done
    check(tmp_path / "car196", tmp_path)
    assert done.err.startswith("note: ")
    assert "6 images, Cars196 has 16,185" in done.err


def test_folders_of_classes_in_a_folder_of_another_name(tmp_path):
    make_cars_classes(tmp_path / "cars", RAM)
    assert script(tmp_path / "cars").code == 0
    check(tmp_path / "cars", tmp_path)


@pytest.mark.parametrize("names", ["official", "alphabetical", ""])
def test_parquet_files(names, tmp_path):
    archives = make_cars_parquet(tmp_path / "car196", names)
    tops = unpack(archives, tmp_path / "car196")
    assert [top.name for top in tops] == ["test", "train"]
    assert script(tmp_path).code == 0
    check(tmp_path / "car196", tmp_path)


def test_another_parquet_file(tmp_path):
    table = pyarrow.table({"picture": [b"x"], "label": [7]})
    parquet.write_table(table, tmp_path / "train-1.parquet")
    with pytest.raises(UnusableError, match=r"train-1.parquet: cannot be unpacked \('image'\)"):
        unpack([tmp_path / "train-1.parquet"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["train-1.parquet"]


def test_the_original_comes_first(tmp_path):
    make_cars_classes(make_cars(tmp_path / "car196"))
    assert script(tmp_path).err == ""
    labels = np.load(tmp_path / "car196" / f"training_car196_{SIZE}resized_label.npy")
    assert labels.tolist() == [1, 98, 1]


def test_an_image_outside_the_folders_of_classes(tmp_path):
    make_cars_classes(tmp_path / "car196")
    stranger = tmp_path / "car196" / "car_data" / "Tesla Cybertruck 2024" / "1.jpg"
    save_photo(stranger, 1)
    failed(script(tmp_path), f"{stranger}: is not in a folder of one of the 196 classes")


def test_names_of_classes():
    names = class_names()
    assert len(names) == 196
    assert [class_of_folder(Path(name)) for name in names] == [*range(1, 197)]
    assert class_of_folder(Path("x", "Acura TL Type-S 2008")) == 4  # 5 by the alphabet
    assert class_of_folder(Path("x", "Ram")) is None


@pytest.mark.shared
def test_the_names_are_the_official_ones(shared):
    content = loadmat(shared / "data" / "car196" / "cars_annos.mat", squeeze_me=True)
    assert class_names() == [str(name) for name in content["class_names"]]
