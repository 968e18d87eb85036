"""Raw lists of images that are incomplete or wrong: one line that says what and where."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from raw_folders import make_cars, make_cub, make_inshop, make_sop, name_of, replace_line
from scipy.io import savemat
from scripts import failed, run_in_process
from synthetic import Malicious

MAKE = {"cub200": make_cub, "car196": make_cars, "sop": make_sop, "inshop": make_inshop}
IMAGES, CLASSES = "images.txt", "image_class_labels.txt"
TRAIN, TEST = "Ebay_train.txt", "Ebay_test.txt"
LIST = "Eval/list_eval_partition.txt"
MAT = "cars_annos.mat"
DRESS = "img/WOMEN/Dresses/id_00000002/01_0_train.jpg"  # line 3 of the list
GOOD_CAR = ("car_ims/000001.jpg", 1)


def line(file: str, number: int, text: str) -> Callable[[Path], None]:
    return lambda raw: replace_line(raw / file, number, text)


def without(file: str) -> Callable[[Path], None]:
    return lambda raw: (raw / file).unlink()


def cars(*rows: tuple[object, object]) -> Callable[[Path], object]:
    return lambda raw: make_cars(raw, rows)


FAULTS = {  # data set: fault -> what is done to a good raw folder, what the message must name
    "cub200: no folder": (shutil.rmtree, ["images.txt: not found", "download.py cub200"]),
    "cub200: no classes": (without(CLASSES), [f"{CLASSES}: not found", "CUB_200_2011.tgz"]),
    "cub200: no text": (
        lambda raw: (raw / IMAGES).write_bytes(b"\xff\xfe1 a.jpg"),
        ["images.txt: is not a text file"],
    ),
    "cub200: short line": (line(IMAGES, 2, "3"), [f"{IMAGES}: line 2", "'3' is not of the form"]),
    "cub200: image without class": (line(IMAGES, 2, "4 a.jpg"), [f"{IMAGES}: line 2", "image 4"]),
    "cub200: class 0": (line(CLASSES, 1, "3 0"), [f"{CLASSES}: line 1", "'0' is not one of 1-200"]),
    "cub200: class 201": (line(CLASSES, 6, "20 201"), [f"{CLASSES}: line 6", "'201'"]),
    "cub200: class no number": (line(CLASSES, 1, "3 1.5"), [f"{CLASSES}: line 1", "'1.5'"]),
    "cub200: path up": (line(IMAGES, 2, "3 ../a.jpg"), [f"{IMAGES}: line 2", "'../a.jpg' leaves"]),
    "cub200: absolute path": (line(IMAGES, 2, "3 /etc/hostname"), ["line 2", "leaves"]),
    "cub200: path of Windows": (line(IMAGES, 2, r"3 C:\a.jpg"), ["line 2", "leaves"]),
    "cub200: Windows path up": (line(IMAGES, 2, r"3 a\..\..\b.jpg"), ["line 2", "leaves"]),
    "cub200: image missing": (
        without(f"images/{name_of(7, 150)}"),
        [name_of(7, 150), "no such file", "1 of 6 are missing"],
    ),
    "cub200: empty list": (lambda raw: (raw / IMAGES).write_text(""), ["0 images in the training"]),
    "car196: no folder": (shutil.rmtree, [f"{MAT}: not found", "download.py car196"]),
    "car196: no .mat": (
        lambda raw: (raw / MAT).write_text("<html>gone</html>" * 50),
        [f"{MAT}: is not the original"],
    ),
    "car196: no struct": (lambda raw: savemat(raw / MAT, {"x": 1}), [MAT, "'annotations'"]),
    "car196: class 197": (cars(("car_ims/6.jpg", 197), GOOD_CAR), ["annotation 1", "'197'"]),
    "car196: path up": (cars(GOOD_CAR, ("../a.jpg", 1)), ["annotation 2", "'../a.jpg' leaves"]),
    "car196: no test class": (cars(GOOD_CAR, GOOD_CAR), ["0 images in the validation half"]),
    "sop: no test list": (without(TEST), [f"{TEST}: not found", "download.py sop"]),
    "sop: class 22635": (line(TEST, 2, "1 22635 1 bicycle_final/1_0.JPG"), [f"{TEST}: line 2"]),
    "sop: a class in both halves": (
        line(TEST, 3, "9 40 1 bicycle_final/111319_0.JPG"),
        [TEST, "class 40 is in both halves"],
    ),
    "inshop: no folder": (shutil.rmtree, ["list_eval_partition.txt: not found", "DeepFashion"]),
    "inshop: torn": (line(LIST, 1, "17"), ["line 1", "says 17 images, 16 are listed"]),
    "inshop: unknown status": (line(LIST, 3, f"{DRESS} id_00000002 val"), ["line 3", "'val'"]),
    "inshop: item no number": (line(LIST, 3, f"{DRESS} id_0000000x train"), ["line 3", "0000000x"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_list_that_will_not_do(fault, tmp_path):
    spoil, words = FAULTS[fault]
    dataset = fault.partition(":")[0]
    spoil(MAKE[dataset](tmp_path / dataset))
    options = ("--data_dir", tmp_path, "--out_dir", tmp_path / "out", "--workers", 1)
    done = run_in_process(f"pre_process_{dataset}.py", *options)
    failed(done, *words, script=f"pre_process_{dataset}.py")
    assert done.out == ""
    assert not (tmp_path / "out").exists()


PICKLED = [("cub200", IMAGES), ("cub200", f"images/{name_of(7, 150)}"), ("car196", MAT)]


@pytest.mark.parametrize(("dataset", "name"), PICKLED)
def test_a_pickle_in_the_place_of_a_file_does_not_run(dataset, name, tmp_path):
    raw = MAKE[dataset](tmp_path / dataset)
    (raw / name).write_bytes(pickle.dumps(Malicious(tmp_path / "executed")))
    options = ("--data_dir", tmp_path, "--workers", 1)
    failed(run_in_process(f"pre_process_{dataset}.py", *options), raw / name)
    assert not (tmp_path / "executed").exists()
