"""The pre-processing of CUB-200-2011 and Cars196, on small raw folders in the official layouts."""

from __future__ import annotations

import importlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from raw_folders import make_cars, make_cub, name_of, replace_line, save_photo
from scipy.io import loadmat, savemat
from scripts import Outcome, failed, run_in_process

from pre_process import image_arrays, pre_process_car196, pre_process_cub200

SCRIPTS = {"cub200": pre_process_cub200, "car196": pre_process_car196}
SIZE = 16  # side of the images that the tests write, unless a test says otherwise


# ------------------------------------------------------------------------------------------------ raw folders


def make_raw(dataset: str, folder: Path) -> Path:
    return {"cub200": make_cub, "car196": make_cars}[dataset](folder)


def official_list(dataset: str, raw: Path) -> list[tuple[Path, int]]:
    """Images and classes in official order, read in the plainest way."""
    if dataset == "cub200":
        label = dict(line.split() for line in (raw / "image_class_labels.txt").read_text().splitlines())
        lines = [line.split() for line in (raw / "images.txt").read_text().splitlines()]
        return [(raw / "images" / name, int(label[image_id])) for image_id, name in lines]
    entries = loadmat(raw / "cars_annos.mat")["annotations"][0]
    return [(raw / entry["relative_im_path"].item(), int(entry["class"].item())) for entry in entries]


def reference(path: Path, size: int) -> np.ndarray:
    """The literal rule: all of the image, RGB, squashed with Lanczos."""
    return np.array(Image.open(path).convert("RGB").resize((size, size), Image.Resampling.LANCZOS))


# ------------------------------------------------------------------------------------------------ running


def script(dataset: str, *arguments: object) -> Outcome:
    return run_in_process(f"pre_process_{dataset}.py", *arguments)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def command(root: Path, dataset: str, *arguments: object) -> list[str]:
    return [sys.executable, str(root / "pre_process" / f"pre_process_{dataset}.py"), *map(str, arguments)]


def outputs(folder: Path, dataset: str, size: int = SIZE) -> list[Path]:
    names = [
        f"{half}_{dataset}_{size}resized_{kind}.npy" for half in ("training", "validation") for kind in ("img", "label")
    ]
    return [folder / name for name in names]


def put_old_files(folder: Path, dataset: str, size: int = SIZE) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in outputs(folder, dataset, size):
        path.write_bytes(b"an older run's " + path.name.encode())


def assert_only_old_files(folder: Path, dataset: str, size: int = SIZE) -> None:
    """Nothing half-written is left, hidden or not, and the older files are as they were."""
    assert sorted(folder.iterdir()) == sorted(outputs(folder, dataset, size))
    for path in folder.iterdir():
        assert path.read_bytes() == b"an older run's " + path.name.encode()


# ------------------------------------------------------------------------------------------------ what is written


@pytest.mark.parametrize("dataset", ["cub200", "car196"])
def test_arrays_are_the_literal_reference_in_official_order(dataset, tmp_path):
    raw = make_raw(dataset, tmp_path / dataset)
    done = script(dataset, "--data_dir", tmp_path, "--image_size", SIZE, "--workers", 1)
    assert (done.code, done.err) == (0, "")

    last_training_class = {"cub200": 100, "car196": 98}[dataset]
    halves = {"training": [], "validation": []}
    for path, label in official_list(dataset, raw):
        halves["training" if label <= last_training_class else "validation"].append((path, label))
    for half, listed in halves.items():
        images = np.load(raw / f"{half}_{dataset}_{SIZE}resized_img.npy")
        labels = np.load(raw / f"{half}_{dataset}_{SIZE}resized_label.npy")
        assert (images.dtype, images.shape) == (np.uint8, (len(listed), SIZE, SIZE, 3))
        assert (labels.dtype, labels.tolist()) == (np.int64, [label for _, label in listed])
        np.testing.assert_array_equal(images, np.stack([reference(path, SIZE) for path, _ in listed]))
    assert len(halves["training"]) == 3  # both sides of the border between the halves were tried

    lines = done.out.splitlines()
    assert len(lines) == 2
    assert f"training_{dataset}_{SIZE}resized_img.npy: (3, {SIZE}, {SIZE}, 3), " in lines[0]
    assert f"{len({c for _, c in halves['training']})} classes" in lines[0]
    assert sorted(p.name for p in raw.glob("*.npy")) == sorted(p.name for p in outputs(raw, dataset))
    assert not list(raw.glob(".*"))


def test_files_are_those_that_numpy_saves(tmp_path):
    raw = make_cub(tmp_path / "cub200")
    script("cub200", "--data_dir", tmp_path, "--image_size", SIZE, "--workers", 1)
    for path in outputs(raw, "cub200"):
        np.save(tmp_path / "again.npy", np.load(path))
        assert path.read_bytes() == (tmp_path / "again.npy").read_bytes()


def test_default_size_is_256(tmp_path):
    raw = make_cub(tmp_path / "cub200")
    assert script("cub200", "--data_dir", tmp_path, "--workers", 1)[0] == 0
    assert np.load(raw / "training_cub200_256resized_img.npy").shape == (3, 256, 256, 3)


def test_large_photo_is_decoded_in_full(tmp_path):
    """The JPEG decoder's draft mode would be faster here, and other pixels."""
    save_photo(tmp_path / "large.jpg", seed=0, size=(1200, 900))
    with Image.open(tmp_path / "large.jpg") as image:
        image.draft("RGB", (150, 150))
        drafted = np.array(image.resize((32, 32), Image.Resampling.LANCZOS))
    ours = image_arrays.read_image(tmp_path / "large.jpg", 32)
    assert (drafted != ours).any()  # so the next line can tell
    np.testing.assert_array_equal(ours, reference(tmp_path / "large.jpg", 32))


@pytest.mark.parametrize("place", ["", "CUB_200_2011"])
@pytest.mark.parametrize("given", ["above", "itself"])
def test_cub_is_found_where_it_was_unpacked(place, given, tmp_path):
    home = tmp_path / "downloads" / "cub200"
    make_cub(home / place)
    data_dir = home.parent if given == "above" else home
    assert script("cub200", "--data_dir", data_dir, "--image_size", SIZE, "--workers", 1)[0] == 0
    assert all(path.is_file() for path in outputs(home, "cub200"))


def test_out_dir_is_created_and_raw_folder_left_alone(tmp_path):
    raw = make_cars(tmp_path / "car196")
    before = sorted(raw.rglob("*"))
    target = tmp_path / "new" / "folder"
    assert script("car196", "--data_dir", raw, "--out_dir", target, "--image_size", SIZE, "--workers", 1)[0] == 0
    assert sorted(raw.rglob("*")) == before
    assert sorted(target.iterdir()) == sorted(outputs(target, "car196"))


def test_image_behind_a_link_of_the_users(tmp_path):
    raw = make_cub(tmp_path / "cub200")
    (raw / "images").rename(tmp_path / "elsewhere")
    (raw / "images").symlink_to(tmp_path / "elsewhere")
    assert script("cub200", "--data_dir", tmp_path, "--image_size", SIZE, "--workers", 1)[0] == 0


def test_lists_with_windows_line_ends_and_empty_lines(tmp_path):
    raw = make_cub(tmp_path / "cub200")
    for name in ("images.txt", "image_class_labels.txt"):
        text = (raw / name).read_text()
        (raw / name).write_bytes(("\ufeff" + text + "\n\n").replace("\n", "\r\n").encode())
    assert script("cub200", "--data_dir", tmp_path, "--image_size", SIZE, "--workers", 1)[0] == 0
    assert np.load(outputs(raw, "cub200")[1]).tolist() == [1, 100, 2]


@pytest.mark.parametrize("dataset", ["cub200", "car196"])
def test_every_number_of_workers_writes_the_same_bytes(dataset, root, tmp_path):
    raw = make_raw(dataset, tmp_path / dataset)
    if dataset == "cub200":  # enough images for several tasks
        for n in range(100, 160):
            save_photo(raw / "images" / name_of(n, 4), seed=n, size=(20, 20 + n))
        extra = range(100, 160)
        (raw / "images.txt").open("a").write("".join(f"{n} {name_of(n, 4)}\n" for n in extra))
        (raw / "image_class_labels.txt").open("a").write("".join(f"{n} 4\n" for n in extra))
    for workers in (1, 3):
        options = [
            "--data_dir",
            tmp_path,
            "--out_dir",
            tmp_path / str(workers),
            "--image_size",
            SIZE,
            "--workers",
            workers,
        ]
        done = subprocess.run(command(root, dataset, *options), capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")  # no progress bar either: stderr is no terminal
    for one, three in zip(outputs(tmp_path / "1", dataset), outputs(tmp_path / "3", dataset), strict=True):
        assert one.read_bytes() == three.read_bytes()


# ------------------------------------------------------------------------------------------------ colours


def random_pixels(*shape: int, high: int = 256, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(3).integers(0, high, shape, dtype=dtype)


def grey(values: np.ndarray) -> np.ndarray:
    return np.stack([values] * 3, axis=-1)


def read_8x8(image: Image.Image, path: Path, **options) -> np.ndarray:
    """What is read of an 8x8 image at size 8: its very pixels, since nothing is resized."""
    image.save(path, **options)
    return image_arrays.read_image(path, 8)


def test_grey_becomes_three_channels(tmp_path):
    values = random_pixels(8, 8)
    np.testing.assert_array_equal(read_8x8(Image.fromarray(values), tmp_path / "a.png"), grey(values))


def test_black_and_white(tmp_path):
    bits = random_pixels(8, 8, high=2).astype(bool)
    np.testing.assert_array_equal(read_8x8(Image.fromarray(bits), tmp_path / "a.png"), grey(bits * np.uint8(255)))


@pytest.mark.parametrize("transparency", [None, 2, bytes([0, 255, 90, 0])])
def test_palette_becomes_its_colours_even_where_transparent(tmp_path, transparency):
    palette, places = random_pixels(4, 3), random_pixels(8, 8, high=4)
    paletted = Image.new("P", (8, 8))
    paletted.putdata(places.reshape(-1).tolist())
    paletted.putpalette(palette.reshape(-1).tolist())
    options = {} if transparency is None else {"transparency": transparency}
    np.testing.assert_array_equal(read_8x8(paletted, tmp_path / "a.png", **options), palette[places])
    assert Image.open(tmp_path / "a.png").mode == "P"


def test_alpha_is_dropped_not_composed(tmp_path):
    rgba = random_pixels(8, 8, 4)
    rgba[0, :, 3] = 0
    np.testing.assert_array_equal(read_8x8(Image.fromarray(rgba, "RGBA"), tmp_path / "a.png"), rgba[:, :, :3])


def test_alpha_does_not_weigh_in_when_resizing(tmp_path):
    rgba = random_pixels(20, 30, 4)
    Image.fromarray(rgba, "RGBA").save(tmp_path / "a.png")
    Image.fromarray(rgba[:, :, :3].copy(), "RGB").save(tmp_path / "b.png")
    np.testing.assert_array_equal(
        image_arrays.read_image(tmp_path / "a.png", 8), image_arrays.read_image(tmp_path / "b.png", 8)
    )


def test_grey_with_alpha(tmp_path):
    values = random_pixels(8, 8, 2)
    np.testing.assert_array_equal(read_8x8(Image.fromarray(values, "LA"), tmp_path / "a.png"), grey(values[:, :, 0]))


def test_sixteen_bit_grey_keeps_its_high_byte(tmp_path):
    values = random_pixels(8, 8, high=65536, dtype=np.uint16)
    values[0, :3] = (0, 255, 65535)
    np.testing.assert_array_equal(
        read_8x8(Image.fromarray(values), tmp_path / "a.png"), grey((values // 256).astype(np.uint8))
    )


def test_cmyk(tmp_path):
    cmyk = random_pixels(8, 8, 4)
    ours = read_8x8(Image.fromarray(cmyk, "CMYK"), tmp_path / "a.tif")
    ink = 1 - cmyk.astype(float) / 255
    np.testing.assert_allclose(ours, 255 * ink[:, :, :3] * ink[:, :, 3:], atol=1.5)


def test_exif_rotation_is_not_applied_to_archives(tmp_path):
    photo = Image.fromarray(random_pixels(16, 24, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me by 90 degrees"
    photo.save(tmp_path / "plain.jpg")
    photo.save(tmp_path / "turned.jpg", exif=exif)
    assert Image.open(tmp_path / "turned.jpg").getexif()[0x0112] == 6
    np.testing.assert_array_equal(
        image_arrays.read_image(tmp_path / "turned.jpg", SIZE), reference(tmp_path / "plain.jpg", SIZE)
    )
    upright = image_arrays.decode_image(tmp_path / "turned.jpg", SIZE)  # of one's own photos it is
    with Image.open(tmp_path / "plain.jpg") as plain:
        right = plain.transpose(Image.Transpose.ROTATE_270).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(upright, np.asarray(right))


def test_first_frame_of_a_moving_image(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    ours = read_8x8(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (ours == (255, 0, 0)).all()


# ------------------------------------------------------------------------------------------------ bad input


FIRST = name_of(7, 150)  # the first image of the list, in the test half
CUB_FAULTS = {  # what is done to a good raw folder -> what the message must name
    "no folder": (lambda raw: shutil.rmtree(raw), ["images.txt", "data.caltech.edu/records/65de6-vp158"]),
    "no list": (lambda raw: (raw / "images.txt").unlink(), ["images.txt: not found", "CUB_200_2011"]),
    "no labels": (lambda raw: (raw / "image_class_labels.txt").unlink(), ["image_class_labels.txt: not found"]),
    "no text": (lambda raw: (raw / "images.txt").write_bytes(b"\xff\xfe1 a.jpg"), ["images.txt: "]),
    "short line": (lambda raw: replace_line(raw / "images.txt", 2, "3"), ["images.txt: line 2", "'3'"]),
    "id no number": (lambda raw: replace_line(raw / "images.txt", 2, "x a.jpg"), ["images.txt: line 2", "x a.jpg"]),
    "no label": (lambda raw: replace_line(raw / "images.txt", 2, "4 a.jpg"), ["image_class_labels.txt", "image 4"]),
    "id twice": (lambda raw: replace_line(raw / "images.txt", 2, f"7 {FIRST}"), ["images.txt: line 2", "7", "twice"]),
    "label twice": (
        lambda raw: replace_line(raw / "image_class_labels.txt", 2, "3 2"),
        ["image_class_labels.txt: line 2", "twice"],
    ),
    "class 0": (
        lambda raw: replace_line(raw / "image_class_labels.txt", 1, "3 0"),
        ["image_class_labels.txt: line 1", "class 0", "1-200"],
    ),
    "class 201": (
        lambda raw: replace_line(raw / "image_class_labels.txt", 6, "20 201"),
        ["image_class_labels.txt: line 6", "201"],
    ),
    "class no number": (
        lambda raw: replace_line(raw / "image_class_labels.txt", 1, "3 1.5"),
        ["image_class_labels.txt: line 1", "1.5"],
    ),
    "path up": (
        lambda raw: replace_line(raw / "images.txt", 2, "3 ../images.txt"),
        ["images.txt: line 2", "../images.txt"],
    ),
    "absolute path": (
        lambda raw: replace_line(raw / "images.txt", 2, "3 /etc/hostname"),
        ["images.txt: line 2", "/etc/hostname"],
    ),
    "missing image": (lambda raw: (raw / "images" / FIRST).unlink(), [FIRST, "no such file"]),
    "empty image": (lambda raw: (raw / "images" / FIRST).write_bytes(b""), [FIRST, "not an image"]),
    "text as image": (lambda raw: (raw / "images" / FIRST).write_text("<html>" * 99), [FIRST, "not an image"]),
    "truncated image": (
        lambda raw: os.truncate(raw / "images" / FIRST, (raw / "images" / FIRST).stat().st_size - 99),
        [FIRST, "truncated"],
    ),
    "no training class": (
        lambda raw: [replace_line(raw / "image_class_labels.txt", n, f"{i} 180") for n, i in ((1, 3), (4, 9), (5, 12))],
        ["image_class_labels.txt", "training classes 1-100"],
    ),
    "empty lists": (
        lambda raw: [(raw / name).write_text("") for name in ("images.txt", "image_class_labels.txt")],
        ["image_class_labels.txt", "training classes"],
    ),
}


@pytest.mark.parametrize("fault", CUB_FAULTS)
def test_bad_cub_folder(fault, tmp_path):
    spoil, named = CUB_FAULTS[fault]
    spoil(make_cub(tmp_path / "cub200"))
    put_old_files(tmp_path / "out", "cub200")
    done = script("cub200", "--data_dir", tmp_path, "--out_dir", tmp_path / "out", "--image_size", SIZE, "--workers", 1)
    failed(done, *named)
    assert done.out == ""
    assert_only_old_files(tmp_path / "out", "cub200")


GOOD = [(f"car_ims/{n:06d}.jpg", label) for n, label in enumerate((196, 1, 98, 99, 1), 1)]
CAR_FAULTS = {
    "no folder": (lambda raw: shutil.rmtree(raw), ["cars_annos.mat: not found", "Kaggle", "Hugging Face", "car_ims"]),
    "no mat": (
        lambda raw: (raw / "cars_annos.mat").write_text("<html>gone</html>" * 50),
        ["cars_annos.mat: cannot be"],
    ),
    "empty mat": (lambda raw: (raw / "cars_annos.mat").write_bytes(b""), ["cars_annos.mat"]),
    "cut mat": (lambda raw: os.truncate(raw / "cars_annos.mat", 300), ["cars_annos.mat"]),
    "other variable": (lambda raw: savemat(raw / "cars_annos.mat", {"x": 1}), ["cars_annos.mat", "annotations"]),
    "no struct": (lambda raw: savemat(raw / "cars_annos.mat", {"annotations": 1}), ["cars_annos.mat", "annotations"]),
    "no field": (
        lambda raw: savemat(raw / "cars_annos.mat", {"annotations": {"relative_im_path": "a"}}),
        ["cars_annos.mat", "`class`"],
    ),
    "class 0": (lambda raw: make_cars(raw, [*GOOD, ("car_ims/6.jpg", 0)]), ["cars_annos.mat: annotation 6", "class 0"]),
    "class 197": (lambda raw: make_cars(raw, [("car_ims/6.jpg", 197), *GOOD]), ["cars_annos.mat: annotation 1", "197"]),
    "class 1.5": (lambda raw: make_cars(raw, [("car_ims/6.jpg", 1.5), *GOOD]), ["cars_annos.mat: annotation 1", "1.5"]),
    "class nan": (lambda raw: make_cars(raw, [("car_ims/6.jpg", np.nan), *GOOD]), ["annotation 1", "nan"]),
    "class list": (
        lambda raw: make_cars(raw, [("car_ims/6.jpg", np.ones((9, 9))), *GOOD]),
        ["annotation 1", "not one whole number"],
    ),
    "class text": (lambda raw: make_cars(raw, [("car_ims/6.jpg", "BMW"), *GOOD]), ["annotation 1", "BMW"]),
    "path no text": (lambda raw: make_cars(raw, [(3, 1), *GOOD]), ["cars_annos.mat: annotation 1", "relative_im_path"]),
    "path up": (lambda raw: make_cars(raw, [("../a.jpg", 1), *GOOD]), ["cars_annos.mat: annotation 1", "../a.jpg"]),
    "absolute path": (lambda raw: make_cars(raw, [("/a.jpg", 1), *GOOD]), ["cars_annos.mat: annotation 1", "/a.jpg"]),
    "line break": (lambda raw: make_cars(raw, [("car_ims/a\nb.jpg", 1), *GOOD]), ["annotation 1", "a\\nb.jpg"]),
    "twice": (lambda raw: make_cars(raw, [*GOOD, GOOD[1]]), ["cars_annos.mat: annotation 6", "annotation 2"]),
    "no test class": (lambda raw: make_cars(raw, GOOD[1:3]), ["cars_annos.mat", "validation classes 99-196"]),
    "missing images": (lambda raw: shutil.rmtree(raw / "car_ims"), ["000001.jpg", "4 more"]),
}


@pytest.mark.parametrize("fault", CAR_FAULTS)
def test_bad_car_folder(fault, tmp_path):
    spoil, named = CAR_FAULTS[fault]
    spoil(make_cars(tmp_path / "car196"))
    put_old_files(tmp_path / "out", "car196")
    done = script("car196", "--data_dir", tmp_path, "--out_dir", tmp_path / "out", "--image_size", SIZE, "--workers", 1)
    failed(done, *named)
    assert done.out == ""
    assert_only_old_files(tmp_path / "out", "car196")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--image_size", value) for value in ("7", "-8", "64.5", "big", "")),
        *(("--workers", value) for value in ("0", "-1", "two")),
        ("--wrokers", "2"),
    ],
)
def test_bad_option(option, value, tmp_path):
    make_cub(tmp_path / "cub200")
    done = script("cub200", "--data_dir", tmp_path, option, value)
    failed(done, option, value)


def test_bad_image_in_a_worker(root, tmp_path):
    raw = make_cub(tmp_path / "cub200")
    (raw / "images" / FIRST).write_text("no image")
    options = ["--data_dir", tmp_path, "--out_dir", tmp_path / "out", "--image_size", SIZE, "--workers", 2]
    put_old_files(tmp_path / "out", "cub200")
    done = subprocess.run(command(root, "cub200", *options), capture_output=True, text=True, timeout=60)
    failed(Outcome(done.returncode, done.stdout, done.stderr), FIRST)
    assert_only_old_files(tmp_path / "out", "cub200")


@pytest.mark.parametrize("blocked", ["out", "out/below"])
def test_folder_that_cannot_be(blocked, tmp_path):
    make_cub(tmp_path / "cub200")
    (tmp_path / "out").write_text("a file")
    done = script("cub200", "--data_dir", tmp_path, "--out_dir", tmp_path / blocked, "--workers", 1)
    failed(done, str(tmp_path / blocked), "--out_dir")


def test_unwritable_folder(tmp_path, small_disk):
    make_cub(tmp_path / "cub200")
    put_old_files(small_disk, "cub200")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)  # a mode would not stop root
    options = ["--data_dir", tmp_path, "--out_dir", small_disk, "--image_size", 8, "--workers", 1]
    done = script("cub200", *options)
    failed(done, f"{small_disk}: ", "Read-only file system", "--out_dir")
    assert_only_old_files(small_disk, "cub200")


# ------------------------------------------------------------------------------------------------ the disk


def test_too_little_space_is_seen_before_the_work(tmp_path, monkeypatch):
    make_cub(tmp_path / "cub200")
    put_old_files(tmp_path / "out", "cub200")
    needed = 6 * (SIZE * SIZE * 3 + 8)
    for free, status_wanted in ((needed - 1, 2), (needed, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: shutil._ntuple_diskusage(10**9, 0, free))
        done = script(
            "cub200", "--data_dir", tmp_path, "--out_dir", tmp_path / "out", "--image_size", SIZE, "--workers", 1
        )
        assert done.code == status_wanted
        if done.code:
            failed(done, str(tmp_path / "out"), "are free")
            assert_only_old_files(tmp_path / "out", "cub200")


@pytest.mark.parametrize("workers", [1, 2])
def test_disk_that_fills_up_on_the_way(workers, root, tmp_path):
    """A limit on the size of files makes a write fail in the middle, as a full disk does."""
    make_cub(tmp_path / "cub200")
    put_old_files(tmp_path / "out", "cub200", 64)
    options = ["--data_dir", tmp_path, "--out_dir", tmp_path / "out", "--image_size", 64, "--workers", workers]
    limit = 64 * 64 * 3 * 2  # the third image of a split does not fit
    done = subprocess.run(
        command(root, "cub200", *options),
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    failed(Outcome(done.returncode, done.stdout, done.stderr), "training_cub200_64resized_img.npy", "File too large")
    assert_only_old_files(tmp_path / "out", "cub200", 64)


@pytest.mark.parametrize("workers", [1, 2])
def test_full_disk(workers, tmp_path, small_disk, monkeypatch):
    make_cub(tmp_path / "cub200")
    options = ["--data_dir", tmp_path, "--out_dir", small_disk, "--image_size", 96, "--workers", workers]
    done = script("cub200", *options)
    failed(done, str(small_disk), "are free")
    monkeypatch.setattr(image_arrays, "check_space", lambda *_: None)  # another program takes the space meanwhile
    done = script("cub200", *options)
    failed(done, "training_cub200_96resized_img.npy", "No space left")
    assert not list(small_disk.iterdir())


def test_nothing_is_renamed_before_all_is_complete(tmp_path):
    """The second split fails when the first is finished: not even the first may appear."""
    raw = make_cub(tmp_path / "cub200")
    (raw / "images" / name_of(20, 200)).write_text("no image")  # the last image of the validation split
    put_old_files(tmp_path / "out", "cub200")
    done = script("cub200", "--data_dir", tmp_path, "--out_dir", tmp_path / "out", "--image_size", SIZE, "--workers", 1)
    failed(done, name_of(20, 200))
    assert_only_old_files(tmp_path / "out", "cub200")


def test_leftovers_of_a_killed_run_are_pointed_out(tmp_path):
    raw = make_cub(tmp_path / "cub200")
    left = raw / ".training_cub200_16resized_img.npy.1234.part"
    left.write_text("half")
    done = script("cub200", "--data_dir", tmp_path, "--image_size", SIZE, "--workers", 1)
    assert done.code == 0
    assert str(left) in done.err
    assert left.read_text() == "half"


# ------------------------------------------------------------------------------------------------ processes


@pytest.fixture
def long_run(root: Path, tmp_path: Path) -> Iterator[Callable[[int], subprocess.Popen]]:
    """Start a run that takes many seconds, in its own process group; come back when it writes."""
    raw = make_cub(tmp_path / "cub200")
    save_photo(raw / "photo.jpg", seed=0, size=(600, 600))
    extra = range(1000, 5000)
    for n in extra:
        path = raw / "images" / name_of(n, 4)
        path.parent.mkdir(exist_ok=True)
        os.link(raw / "photo.jpg", path)
    (raw / "images.txt").open("a").write("".join(f"{n} {name_of(n, 4)}\n" for n in extra))
    (raw / "image_class_labels.txt").open("a").write("".join(f"{n} 4\n" for n in extra))
    out = tmp_path / "out"
    put_old_files(out, "cub200", 256)
    started = []

    def start(workers: int) -> subprocess.Popen:
        options = ["--data_dir", tmp_path, "--out_dir", out, "--workers", workers]
        process = subprocess.Popen(
            command(root, "cub200", *options), stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        wait_until(lambda: any(path.stat().st_size > 1_000_000 for path in out.glob(".*img.npy.*.part")))
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_until(holds: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def workers_of(process: subprocess.Popen) -> list[int]:
    """The processes that `process` decodes in (multiprocessing's resource tracker is none of them)."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        pytest.skip("needs /proc to see a process's children")
    pids = [int(pid) for pid in children.read_text().split()]
    return [pid for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.parametrize(
    ("number", "workers", "status"),
    [(signal.SIGINT, 1, 130), (signal.SIGINT, 2, 130), (signal.SIGTERM, 2, 143)],
)
def test_interruption_leaves_nothing(number, workers, status, long_run, tmp_path):
    process = long_run(workers)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: the workers get it too
    else:
        process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == status
    assert err == ""
    assert_only_old_files(tmp_path / "out", "cub200", 256)


def test_killed_worker_is_an_error(long_run, tmp_path):
    process = long_run(2)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    _, err = process.communicate(timeout=20)
    failed(Outcome(process.returncode, "", err), str(tmp_path / "out"), "worker process died", "--workers")
    assert_only_old_files(tmp_path / "out", "cub200", 256)


def test_workers_end_with_a_killed_parent(long_run):
    process = long_run(2)
    workers = workers_of(process)
    assert len(workers) == 2
    process.kill()
    process.wait()
    wait_until(lambda: not any(is_running(pid) for pid in workers), seconds=10)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


PEAK_OF_CHILD = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_data(root, tmp_path):
    """Twenty times the images, 120 MB more of output: the peak of the process stays where it was."""
    peaks = {}
    for n in (30, 640):
        raw = make_cub(tmp_path / str(n) / "cub200")
        ids = range(1000, 1000 + n)
        (raw / "images.txt").open("a").write("".join(f"{i} {FIRST}\n" for i in ids))
        (raw / "image_class_labels.txt").open("a").write("".join(f"{i} 4\n" for i in ids))
        # started by a small process: a peak counts from the fork, when a child is still a copy of its parent
        asked = [str(part) for part in command(root, "cub200", "--data_dir", raw, "--workers", 1)]
        launch = [sys.executable, "-c", PEAK_OF_CHILD, *asked]
        done = subprocess.run(launch, stdout=subprocess.PIPE, text=True, check=True)
        peaks[n] = int(done.stdout) / 1024  # MiB on Linux
    written = (raw / "training_cub200_256resized_img.npy").stat().st_size / 2**20
    assert written > 115
    assert peaks[640] - peaks[30] < 25
    assert peaks[640] < 200


# ------------------------------------------------------------------------------------------------ the scripts


@pytest.mark.parametrize("dataset", ["cub200", "car196", "sop", "inshop", "glyphs"])
def test_help_explains_every_option(dataset, root):
    done = subprocess.run(command(root, dataset, "--help"), capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")
    for option in ("--data_dir", "--out_dir", "--image_size", "--workers"):
        assert option in done.stdout
    assert done.stdout.count("(default: ") == done.stdout.count("\n  --")


def test_room_knows_nothing_of_torch(root):
    modules = [f"pre_process.pre_process_{name}" for name in ("cub200", "car196", "sop", "inshop", "glyphs")]
    code = f"import sys, {', '.join(modules)}; print([m for m in ('torch', 'scipy', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=30)
    assert done.stdout.strip() == "[]", done.stderr


def test_scripts_can_be_imported_twice():
    for module in SCRIPTS.values():
        importlib.reload(module)


# ------------------------------------------------------------------------------------------------ real images


@pytest.mark.shared
def test_real_birds(shared, tmp_path):
    raw = tmp_path / "cub200"
    raw.mkdir()
    real = shared / "data" / "cub200"
    (raw / "images").symlink_to(real / "images")
    rows = [line.split() for line in (real / "image_class_labels.txt").read_text().splitlines()]
    chosen = {i for i, label in rows if label in ("4", "101")}
    for name in ("images.txt", "image_class_labels.txt"):
        lines = (real / name).read_text().splitlines(keepends=True)
        (raw / name).write_text("".join(line for line in lines if line.split()[0] in chosen))
    check_real("cub200", raw, len(chosen))


@pytest.mark.shared
def test_real_cars(shared, tmp_path):
    raw = tmp_path / "car196"
    raw.mkdir()
    real = shared / "data" / "car196"
    (raw / "car_ims").symlink_to(real / "car_ims")
    annotations = loadmat(real / "cars_annos.mat")["annotations"]
    chosen = [n for n, entry in enumerate(annotations[0]) if entry["class"].item() in (98, 99)]
    savemat(raw / "cars_annos.mat", {"annotations": annotations[:, chosen]})
    check_real("car196", raw, len(chosen))


def check_real(dataset: str, raw: Path, n: int) -> None:
    done = script(dataset, "--data_dir", raw, "--image_size", 64, "--workers", 1)
    assert (done.code, done.err) == (0, "")
    train, train_labels, test, test_labels = (np.load(path) for path in outputs(raw, dataset, 64))
    assert len(train) + len(test) == n > 100
    listed = official_list(dataset, raw)
    assert train_labels.tolist() + test_labels.tolist() == sorted(label for _, label in listed)
    by_class = sorted(listed, key=lambda item: item[1])  # stable: two classes, each in official order
    expected = np.stack([reference(path, 64) for path, _ in by_class])
    np.testing.assert_array_equal(np.concatenate([train, test]), expected)
