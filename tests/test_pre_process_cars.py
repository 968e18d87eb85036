"""The layouts in which copies of Cars196 survive: each gives the arrays that its images and official classes say."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from raw_folders import (
    CAR_COPY,
    CAR_NAMES,
    car_photo,
    make_cars,
    make_cars_classes,
    make_cars_devkit,
    make_cars_parquet,
    save_annotations,
    save_photo,
)
from scipy.io import loadmat
from scripts import ROOT, Outcome, failed, run_in_process

from pre_process import image_arrays, parquet_images
from pre_process import pre_process_car196 as cars
from utils.errors import UserError

SIZE = 16
BY_CLASS = [("test", 3, 1), ("test", 1, 98)]  # CAR_COPY's first class has its train image first
BY_CLASS = [("train", 2, 1), *BY_CLASS, ("train", 1, 99), ("train", 3, 174), ("test", 2, 196)]


def script(data: Path, *options: object) -> Outcome:
    return run_in_process("pre_process_car196.py", "--data_dir", data, "--image_size", SIZE, "--workers", 1, *options)


def check(home: Path, order: list[tuple[str, int, int]], scratch: Path) -> None:
    """The arrays in `home` hold these images and official classes, in this order, whatever their part."""
    for half, classes in (("training", range(1, 99)), ("validation", range(99, 197))):
        rows = [item for item in order if item[2] in classes]
        labels = np.load(home / f"{half}_car196_{SIZE}resized_label.npy")
        assert labels.tolist() == [label for _, _, label in rows]
        images = np.load(home / f"{half}_car196_{SIZE}resized_img.npy")
        expected = [image_arrays.read_image(car_photo(part, n, scratch / "x.jpg"), SIZE) for part, n, _ in rows]
        np.testing.assert_array_equal(images, np.stack(expected))
        assert len(rows) == 3


MAKE = {
    "devkit": (make_cars_devkit, CAR_COPY),
    "devkit, single folders": (lambda f: make_cars_devkit(f, inner=False, kit="devkit"), CAR_COPY),
    "devkit beside cars_annos.mat": (lambda f: save_annotations(make_cars_devkit(f) / "cars_annos.mat", []), CAR_COPY),
    "devkit one folder down": (lambda f: make_cars_devkit(f / "stanford_cars"), CAR_COPY),
    "classes": (make_cars_classes, BY_CLASS),
    "classes, here": (lambda f: make_cars_classes(f, inside=""), BY_CLASS),
    "classes, a slash": (lambda f: make_cars_classes(f, ram="Ram C/V Cargo Van Minivan 2012"), BY_CLASS),
    "classes, small letters": (lambda f: make_cars_classes(f, ram="ram_c_v_cargo_van_minivan_2012"), BY_CLASS),
    "parquet": (make_cars_parquet, CAR_COPY),
    "parquet, here": (lambda f: make_cars_parquet(f, inside=""), CAR_COPY),
    "parquet, other order": (lambda f: make_cars_parquet(f, names="alphabetical"), CAR_COPY),
    "parquet, no names": (lambda f: make_cars_parquet(f, names=""), CAR_COPY),
    "parquet, texts": (lambda f: make_cars_parquet(f, in_text=True), CAR_COPY),
    "parquet, plain bytes": (lambda f: make_cars_parquet(f, plain=True), CAR_COPY),
}


@pytest.mark.parametrize("given", ["above", "itself"])
@pytest.mark.parametrize("layout", MAKE)
def test_each_layout_gives_the_same_images_and_classes(layout, given, tmp_path):
    make, order = MAKE[layout]
    home = tmp_path / "downloads" / "car196"
    make(home)
    done = script(home.parent if given == "above" else home)
    assert done.code == 0, done
    check(home, order, tmp_path)
    assert done.err.startswith("note: ") and "6 images of 5 classes; Cars196 has 16,185 of 196" in done.err
    assert ("label 0 is taken for class 1" in done.out) == (layout == "parquet, no names")
    assert ("left out, neither train nor test: contrast-00000-of-00001.parquet" in done.out) == ("parquet" in layout)


@pytest.mark.parametrize("layout", ["classes", "parquet"])
def test_workers_write_the_same_bytes(layout, tmp_path):
    MAKE[layout][0](tmp_path / "car196")
    for workers in (1, 3):
        assert script(tmp_path, "--out_dir", tmp_path / str(workers), "--workers", workers).code == 0
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "3" / path.name).read_bytes()


def test_a_folder_of_all_classes_without_parts(tmp_path):
    make_cars_classes(tmp_path, inside="x")
    (tmp_path / "x" / "test" / CAR_NAMES[1] / "00003.jpg").rename(tmp_path / "x" / "test" / CAR_NAMES[1] / "00009.jpg")
    for part in ("train", "test"):
        shutil.copytree(tmp_path / "x" / part, tmp_path / "car196", dirs_exist_ok=True)
    assert script(tmp_path).code == 0
    check(tmp_path / "car196", BY_CLASS, tmp_path)


def test_the_names_are_the_official_ones_and_their_order_matters(shared):
    """Of the original file; sorted by the alphabet the numbers would be others, though the halves the same."""
    names = [str(name) for name in loadmat(shared / "data/car196/cars_annos.mat", squeeze_me=True)["class_names"]]
    assert cars.CLASSES.read_text().splitlines() == names
    assert sorted(names, key=str.lower) != names
    assert set(sorted(names, key=str.lower)[:98]) == set(names[:98])


def test_names_of_classes_are_told_apart():
    names = cars.CLASSES.read_text().splitlines()
    assert len(names) == len(cars.class_of()) == 196 and names[173] == CAR_NAMES[174]
    for name in ("Ram C/V Cargo Van Minivan 2012", "Ram C-V Cargo Van Minivan 2012", "ram c_v cargo van minivan 2012"):
        assert cars.named_class(name, "x") == 174
    assert cars.named_class("Acura TL Type-S 2008", "x") == 4  # 5 by the alphabet
    with pytest.raises(UserError, match="x: 'Ram' is none of the 196 classes"):
        cars.named_class("Ram", "x")


# ------------------------------------------------------------------------------------------------ what is wrong


def remove(path: str):
    return lambda f: (f / path).unlink() if (f / path).is_file() else shutil.rmtree(f / path)


def only_annos(folder: Path) -> None:
    """As in the copy on Kaggle that has no development kit."""
    shutil.rmtree(folder / "car_devkit")
    (folder / "cars_test_annos_withlabels.mat").rename(folder / "cars_annos.mat")


def write_parquet(folder: Path, columns: dict, name: str = "data/test-00000-of-00001.parquet") -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / name, use_dictionary=False, write_statistics=False)


WRONG = {
    "two copies": (make_cars, make_cars_classes, ["more than one copy", "car_ims/ with cars_annos.mat", "car_data"]),
    "two in one folder": (make_cars, make_cars_devkit, ["more than one copy", "cars_train/ and cars_test/"]),
    "no test labels": (
        make_cars_devkit, remove("cars_test_annos_withlabels.mat"),
        ["cars_test_annos.mat: has no struct", "`class`", "get cars_test_annos_withlabels.mat"],
    ),
    "no kit": (make_cars_devkit, only_annos, ["cars_train_annos.mat: not found", "car_devkit.tgz", "cars_annos.mat"]),
    "an image of the kit": (
        make_cars_devkit, remove("cars_test/cars_test/00002.jpg"), ["00002.jpg: listed, but no such file"],
    ),
    "kit with a path": (
        make_cars_devkit, lambda f: save_annotations(f / "cars_test_annos_withlabels.mat", [("../../x.jpg", 3)]),
        ["annotation 1", "leaves the data folder"],
    ),
    "kit with a class": (
        make_cars_devkit, lambda f: save_annotations(f / "cars_test_annos_withlabels.mat", [("1.jpg", 197)]),
        ["annotation 1", "class 197 is not one of 1-196"],
    ),
    "another class": (
        make_cars_classes, lambda f: save_photo(f / "car_data/car_data/test/Tesla Cybertruck 2024/1.jpg", 1),
        ["Tesla Cybertruck 2024/1.jpg: 'Tesla Cybertruck 2024' is none of the 196 classes"],
    ),
    "an image without a class": (
        make_cars_classes, lambda f: save_photo(f / "car_data/car_data/test/1.jpg", 1), ["test/1.jpg: '' is none of"],
    ),
    "a link out": (
        make_cars_classes, lambda f: (f / "car_data/car_data/test" / CAR_NAMES[1] / "l.jpg").symlink_to(f / "../x.jpg"),
        ["l.jpg", "is a link out of the data folder"],
    ),
    "a class folder that is a link out": (
        make_cars_classes, lambda f: (f / "car_data/car_data/test" / CAR_NAMES[99]).symlink_to(f / ".." / "out"),
        ["FIAT 500 Abarth 2012", "is a link out of the data folder"],
    ),
    "a damaged image": (
        make_cars_classes,
        lambda f: (f / "car_data/car_data/test" / CAR_NAMES[1] / "00003.jpg").write_bytes(b"GIF"),
        ["00003.jpg: is not an image"],
    ),
    "a piece": (
        make_cars_parquet, remove("data/train-00001-of-00002.parquet"),
        ["train-00001-of-00002.parquet: missing, one of 2 pieces"],
    ),
    "no parquet": (
        make_cars_parquet, lambda f: (f / "data/test-00000-of-00001.parquet").write_bytes(b"PAR1 <html>" * 9),
        ["test-00000-of-00001.parquet: cannot be read as a parquet file", "download it again"],
    ),
    "cut parquet": (
        make_cars_parquet,
        lambda f: (f / "data/test-00000-of-00001.parquet").write_bytes(
            (f / "data/train-00000-of-00002.parquet").read_bytes()[:-20]
        ), ["test-00000-of-00001.parquet: cannot be read as a parquet file"],
    ),
    "no label": (make_cars_parquet, lambda f: write_parquet(f, {"image": [b"x"]}), ["has no column 'label' (image)"]),
    "no image": (make_cars_parquet, lambda f: write_parquet(f, {"label": [1]}), ["has no column 'image' (label)"]),
    "label 196": (
        make_cars_parquet, lambda f: write_parquet(f, {"image": [b"x"], "label": [196]}),
        ["row 0: label 196 is none of 0-195"],
    ),
    "label none": (
        make_cars_parquet, lambda f: write_parquet(f, {"image": [b"x"], "label": pyarrow.array([None], "int64")}),
        ["row 0: label None is none of"],
    ),
    "label another name": (
        make_cars_parquet, lambda f: write_parquet(f, {"image": [b"x"], "label": ["a car"]}),
        ["row 0: 'a car' is none"],
    ),
    "cell no image": (
        make_cars_parquet, lambda f: write_parquet(f, {"image": [b"x"], "label": [7]}),
        ["row 0 of row group 0: is not an image"],
    ),
    "cell a number": (
        make_cars_parquet, lambda f: write_parquet(f, {"image": [1], "label": [7]}), ["row group 0: holds no image"],
    ),
    "cell a page": (
        make_cars_parquet, lambda f: write_parquet(f, {"image": [{"bytes": None, "path": "/etc/x"}], "label": [7]}),
        ["row group 0: holds no image"],
    ),
    "parquet a link out": (
        make_cars_parquet, lambda f: (f / "data" / "test-1.parquet").symlink_to("/etc/passwd"),
        ["is a link out of the data folder"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_a_copy_that_will_not_do(fault, tmp_path):
    make, spoil, words = WRONG[fault]
    save_photo(tmp_path / "x.jpg", seed=1)
    save_photo(tmp_path / "out" / "x.jpg", seed=1)
    make(tmp_path / "car196")
    spoil(tmp_path / "car196")
    done = script(tmp_path, "--out_dir", tmp_path / "arrays")
    lines = done.err.splitlines(keepends=True)
    failed(done._replace(err=lines[-1]), *words, script="pre_process_car196.py")
    assert all(line.startswith("note: ") for line in lines[:-1])
    assert not (tmp_path / "arrays").exists()


def test_cells_are_read_forwards_and_back(tmp_path):
    write_parquet(tmp_path, {"image": [b"%d" % n for n in range(40)], "label": list(range(40))}, "a.parquet")
    cells = parquet_images.Cells(tmp_path / "a.parquet", 0)
    for row in (0, 39, 20, 21, 0):
        assert cells.get(row) == b"%d" % row


def test_pyarrow_is_asked_for_only_where_it_is_needed(tmp_path, monkeypatch):
    make_cars_parquet(tmp_path / "a" / "car196")
    make_cars_classes(tmp_path / "b" / "car196")
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.setitem(sys.modules, name, None)
    failed(script(tmp_path / "a"), "parquet files are read by pyarrow: pip install pyarrow, or use another copy")
    assert script(tmp_path / "b").code == 0


def test_a_parquet_file_that_claims_a_huge_page_is_refused(tmp_path):
    """One of 3 MB; its header is changed to say that it unpacks to 134 MB, of which 50 MB are allowed."""
    make_cars_parquet(tmp_path / "car196")
    write_parquet(tmp_path / "car196", {"image": [b"x" * 3_000_000], "label": [7]})
    path = tmp_path / "car196" / "data" / "test-00000-of-00001.parquet"
    content, size = path.read_bytes(), varint(2 * 3_000_010)  # as Thrift's compact protocol writes it
    assert content.startswith(b"PAR1\x15\x00\x15" + size)
    path.write_bytes(content.replace(size, varint(2 * (2**27 - 1)), 1))
    code = "import sys; from pre_process import image_arrays, parquet_images, pre_process_car196; "
    code += "parquet_images.MOST_MEMORY = 50 * 10**6; image_arrays.run(pre_process_car196.main)"
    argv = [sys.executable, "-c", code, "--data_dir", tmp_path, "--workers", "1"]  # with memory of its own
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and f"{path}: claims more than 50 MB; download it again" in done.stderr, done


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])
