"""What the pre-processing scripts write for the four downloaded data sets, and when they do not."""

from __future__ import annotations

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
from raw_folders import make_cars, make_cub, make_inshop, make_sop, name_of
from scipy.io import loadmat, savemat
from scripts import Outcome, failed, run_in_process

from pre_process import writer

SIZE = 16  # side of the images that the tests write, unless a test says otherwise
MAKE = {"cub200": make_cub, "car196": make_cars, "sop": make_sop, "inshop": make_inshop}
HALVES = ("training", "validation")


def script(dataset: str, *arguments: object, size: int = SIZE, workers: int = 1) -> Outcome:
    options = ("--image_size", size, "--workers", workers)
    return run_in_process(f"pre_process_{dataset}.py", *arguments, *options)


def outputs(folder: Path, dataset: str, size: int = SIZE) -> list[Path]:
    """List the files of a data set."""
    stems = [f"{half}_{dataset}_{size}resized" for half in HALVES]
    names = [f"{stem}_{kind}.npy" for stem in stems for kind in ("img", "label")]
    if dataset == "inshop":
        names.append(f"{stems[1]}_role.npy")
    return [folder / name for name in names]


def official_list(dataset: str, raw: Path) -> list[tuple[str, Path, int, str]]:
    """Read half, image, class and role of all images in official order in the plainest way."""
    if dataset == "cub200":
        lines = (raw / "image_class_labels.txt").read_text().splitlines()
        label_of = dict(line.split() for line in lines)
        lines = [line.split() for line in (raw / "images.txt").read_text().splitlines()]
        rows = [(raw / "images" / name, int(label_of[number])) for number, name in lines]
        return [(HALVES[label > 100], path, label, "") for path, label in rows]
    if dataset == "car196":
        entries = loadmat(raw / "cars_annos.mat", squeeze_me=True)["annotations"]
        rows = [(raw / entry["relative_im_path"], int(entry["class"])) for entry in entries]
        return [(HALVES[label > 98], path, label, "") for path, label in rows]
    if dataset == "sop":
        rows = []
        for half, name in zip(HALVES, ("Ebay_train.txt", "Ebay_test.txt"), strict=True):
            lines = [line.split() for line in (raw / name).read_text().splitlines()[1:]]
            rows += [(half, raw / path, int(label), "") for _, label, _, path in lines]
        return rows
    lines = (raw / "Eval" / "list_eval_partition.txt").read_text().splitlines()[2:]
    rows = [line.split() for line in lines]
    return [
        (HALVES[status != "train"], raw / "Img" / name, int(item[3:]), status)
        for name, item, status in rows
    ]


def reference(path: Path, size: int = SIZE) -> np.ndarray:
    """Apply the literal rule: all of the image, RGB, squashed with Lanczos."""
    squashed = Image.open(path).convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
    return np.array(squashed)


def check_arrays(dataset: str, raw: Path, size: int = SIZE) -> None:
    """Compare the arrays in `raw` with the literal rule, row by row."""
    listed = official_list(dataset, raw)
    for half in HALVES:
        rows = [row[1:] for row in listed if row[0] == half]
        stem = raw / f"{half}_{dataset}_{size}resized"
        images = np.load(f"{stem}_img.npy")
        labels = np.load(f"{stem}_label.npy")
        assert images.dtype == np.uint8
        assert labels.dtype == np.int64
        assert labels.tolist() == [label for _, label, _ in rows]
        np.testing.assert_array_equal(images, np.stack([reference(row[0], size) for row in rows]))
        if dataset == "inshop" and half == "validation":
            roles = np.load(f"{stem}_role.npy")
            assert roles.tolist() == [("query", "gallery").index(role) for _, _, role in rows]


def put_old_files(folder: Path, size: int = SIZE) -> None:
    folder.mkdir(parents=True)
    for path in outputs(folder, "cub200", size):
        path.write_text(f"an older run's {path.name}")


def assert_only_old_files(folder: Path, size: int = SIZE) -> None:
    """Check that nothing half-written is left and that the older files are as they were."""
    assert sorted(folder.iterdir()) == sorted(outputs(folder, "cub200", size))
    for path in folder.iterdir():
        assert path.read_text() == f"an older run's {path.name}"


# ---------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("dataset", MAKE)
def test_arrays_are_the_literal_reference_in_official_order(dataset, tmp_path):
    raw = MAKE[dataset](tmp_path / dataset)
    done = script(dataset, "--data_dir", tmp_path)
    assert (done.code, done.err) == (0, "")
    check_arrays(dataset, raw)
    created = [path for path in raw.iterdir() if path.suffix == ".npy" or path.name[0] == "."]
    assert sorted(created) == sorted(outputs(raw, dataset))
    for path in created:  # byte for byte as numpy itself saves it
        np.save(tmp_path / "again.npy", np.load(path))
        assert path.read_bytes() == (tmp_path / "again.npy").read_bytes()
    lines = done.out.splitlines()
    n_training = sum(row[0] == "training" for row in official_list(dataset, raw))
    assert f"training_{dataset}_{SIZE}resized_img.npy: ({n_training}, {SIZE}, {SIZE}" in lines[0]
    assert ("6 queries, 6 gallery, 3 classes" in lines[1]) == (dataset == "inshop")


PLACES = [
    ("cub200", "CUB_200_2011"),
    ("car196", "CARS196"),
    ("sop", "Stanford_Online_Products"),
    ("inshop", "In-shop Clothes Retrieval Benchmark"),
]


@pytest.mark.parametrize(("dataset", "place"), [*PLACES, ("cub200", "")])
def test_raw_files_are_found_where_they_were_unpacked(dataset, place, tmp_path):
    home = tmp_path / "downloads" / dataset
    MAKE[dataset](home / place)
    before = sorted(home.rglob("*"))
    for data_dir in (home.parent, home):
        out = tmp_path / "new" / data_dir.name
        assert script(dataset, "--data_dir", data_dir, "--out_dir", out).code == 0
        assert sorted(out.iterdir()) == sorted(outputs(out, dataset))
    assert sorted(home.rglob("*")) == before


@pytest.mark.parametrize(("images", "listed"), [("img", ""), ("img", "Eval"), ("Img/img", "")])
def test_images_and_list_of_inshop_may_lie_a_folder_above(images, listed, tmp_path):
    make_inshop(tmp_path / "inshop", images=images, listed=listed)
    assert script("inshop", "--data_dir", tmp_path).code == 0


def test_lists_with_windows_line_ends_and_empty_lines(tmp_path):
    raw = make_cub(tmp_path / "cub200")
    for name in ("images.txt", "image_class_labels.txt"):
        text = (raw / name).read_text()
        (raw / name).write_bytes(("\ufeff" + text + "\n\n").replace("\n", "\r\n").encode())
    assert script("cub200", "--data_dir", tmp_path).code == 0
    check_arrays("cub200", make_cub(raw))


@pytest.mark.parametrize("link_folders", [False, True])
def test_images_may_be_links(tmp_path, link_folders):
    """As git-annex, DVC and the caches of hubs store them."""
    raw = make_cub(tmp_path / "data" / "cub200")
    images = raw / "images"
    for place in list(images.iterdir()) if link_folders else list(images.rglob("*.jpg")):
        stored = tmp_path / "store" / place.relative_to(images)
        stored.parent.mkdir(parents=True, exist_ok=True)
        place.rename(stored)
        place.symlink_to(stored)
    assert script("cub200", "--data_dir", tmp_path / "data").code == 0
    check_arrays("cub200", raw)


def test_every_number_of_workers_writes_the_same_bytes(tmp_path):
    make_cub(tmp_path / "cub200", extra=30)
    for workers in (1, 3):
        where = ("--data_dir", tmp_path, "--out_dir", tmp_path / str(workers))
        done = script("cub200", *where, workers=workers)
        assert (done.code, done.err) == (0, "")
    for path in outputs(tmp_path / "1", "cub200"):
        assert path.read_bytes() == (tmp_path / "3" / path.name).read_bytes()


def test_help_explains_every_option():
    done = run_in_process("pre_process_cub200.py", "--help")
    assert done.code == 0
    for option in ("--data_dir", "--out_dir", "--image_size", "--workers"):
        assert option in done.out
    assert done.out.count("(default: ") == done.out.count("\n  --")
    assert "(default: 256)" in done.out


@pytest.mark.slow
def test_the_room_knows_nothing_of_torch(root):
    files = sorted((root / "pre_process").glob("*.py"))
    modules = [f"pre_process.{file.stem}" for file in files if file.stem != "__init__"]
    assert len(modules) > 10
    code = f"import sys, {', '.join(modules)}; print('torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr


# ------------------------------------------------------------------------- whole files or none


@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_appears_before_all_is_complete(workers, tmp_path):
    """The last image fails, when the first half is finished: not even that may appear."""
    raw = make_cub(tmp_path / "cub200")
    (raw / "images" / name_of(20, 200)).write_text("no image")
    put_old_files(tmp_path / "out")
    where = ("--data_dir", tmp_path, "--out_dir", tmp_path / "out")
    done = script("cub200", *where, workers=workers)
    failed(done, name_of(20, 200), "is not an image", "unpack it again")
    assert_only_old_files(tmp_path / "out")


@pytest.mark.parametrize(("missing", "code"), [(1, 2), (0, 0)])
def test_too_little_space_is_seen_before_the_work(missing, code, tmp_path, monkeypatch):
    make_cub(tmp_path / "cub200")
    free = 6 * (SIZE * SIZE * 3 + 8) - missing
    usage = shutil._ntuple_diskusage(10**9, 0, free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    done = script("cub200", "--data_dir", tmp_path)
    assert done.code == code
    assert ("are free" in done.err) == bool(missing)


def test_a_disk_that_fills_up_on_the_way(root, tmp_path):
    """A limit on the size of files makes a write fail in the middle, as a full disk does."""
    make_cub(tmp_path / "cub200")
    put_old_files(tmp_path / "out", 64)
    limit = 64 * 64 * 3 * 2  # the third image of a split does not fit
    done = subprocess.run(
        command(root, "--data_dir", tmp_path, "--out_dir", tmp_path / "out", "--image_size", 64),
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    ended = Outcome(done.returncode, done.stdout, done.stderr)
    failed(ended, "training_cub200_64resized_img.npy", "File too large", "make room")
    assert_only_old_files(tmp_path / "out", 64)


def test_a_row_of_another_shape_is_a_mistake_of_the_script(tmp_path):
    rows = writer.Half("training", [1, 2], [1, 2])
    with pytest.raises(ValueError, match=r"1 made a row of shape \(3,\) and type uint8"):
        writer.write_splits("x", [rows], tmp_path, lambda *_: np.zeros(3, np.uint8), 8)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------- processes


def command(root: Path, *arguments: object, workers: int = 1) -> list[str]:
    script = root / "pre_process" / "pre_process_cub200.py"
    return [sys.executable, str(script), *map(str, arguments), "--workers", str(workers)]


@pytest.fixture
def long_run(root: Path, tmp_path: Path) -> Iterator[Callable[[int], subprocess.Popen]]:
    """Start a run that takes many seconds, in its own process group; return when it writes."""
    raw = make_cub(tmp_path / "cub200")
    extra = [f"{number} {name_of(7, 150)}\n" for number in range(1000, 10_000)]
    (raw / "images.txt").open("a").writelines(extra)
    labels = [f"{number} 4\n" for number in range(1000, 10_000)]
    (raw / "image_class_labels.txt").open("a").writelines(labels)
    out = tmp_path / "out"
    put_old_files(out, 256)
    started = []

    def start(workers: int) -> subprocess.Popen:
        argv = command(root, "--data_dir", tmp_path, "--out_dir", out, workers=workers)
        process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, start_new_session=True)
        started.append(process)
        parts = ".*img.npy.*.part"
        wait_until(lambda: any(path.stat().st_size > 1_000_000 for path in out.glob(parts)))
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_until(holds: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


STOPS = [(signal.SIGINT, 1, 130), (signal.SIGINT, 2, 130), (signal.SIGTERM, 2, 143)]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "workers", "status"), STOPS)
def test_a_stop_leaves_nothing(number, workers, status, long_run, tmp_path):
    process = long_run(workers)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: the workers get it, too
    else:
        process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == status
    assert err.count("\n") == 1 and "interrupted" in err
    assert_only_old_files(tmp_path / "out", 256)


PEAK_OF_CHILD = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(root, tmp_path):
    """Twenty times the images, 120 MB more of output: the peak stays where it was."""
    peaks = {}
    for count in (30, 640):
        raw = make_cub(tmp_path / str(count) / "cub200")
        numbers = range(1000, 1000 + count)
        lines = [f"{number} {name_of(7, 150)}\n" for number in numbers]
        (raw / "images.txt").open("a").writelines(lines)
        labels = [f"{number} 4\n" for number in numbers]
        (raw / "image_class_labels.txt").open("a").writelines(labels)
        # Started by a small process: the peak counts from the fork, a copy of the parent.
        launch = [sys.executable, "-c", PEAK_OF_CHILD, *command(root, "--data_dir", raw)]
        done = subprocess.run(launch, stdout=subprocess.PIPE, text=True, check=True)
        peaks[count] = int(done.stdout) / 1024  # MiB on Linux
    assert (raw / "training_cub200_256resized_img.npy").stat().st_size > 120e6
    assert peaks[640] - peaks[30] < 25
    assert peaks[640] < 200


# -------------------------------------------------------------------------------- real images


@pytest.mark.shared
def test_real_birds(shared, tmp_path):
    raw = tmp_path / "cub200"
    raw.mkdir()
    real = shared / "data" / "cub200"
    (raw / "images").symlink_to(real / "images")
    lines = (real / "image_class_labels.txt").read_text().splitlines(keepends=True)
    chosen = [number for number, line in enumerate(lines) if line.split()[1] in ("4", "101")]
    for name in ("images.txt", "image_class_labels.txt"):
        lines = (real / name).read_text().splitlines(keepends=True)
        (raw / name).write_text("".join(lines[number] for number in chosen))
    assert script("cub200", "--data_dir", tmp_path, size=64).code == 0
    check_arrays("cub200", raw, 64)


@pytest.mark.shared
def test_real_cars(shared, tmp_path):
    raw = tmp_path / "car196"
    raw.mkdir()
    real = shared / "data" / "car196"
    (raw / "car_ims").symlink_to(real / "car_ims")
    annotations = loadmat(real / "cars_annos.mat")["annotations"]
    classes = np.array([entry["class"].item() for entry in annotations[0]])
    chosen = annotations[:, np.isin(classes, (98, 99))]
    savemat(raw / "cars_annos.mat", {"annotations": chosen})
    assert script("car196", "--data_dir", tmp_path, size=64).code == 0
    check_arrays("car196", raw, 64)
