"""A folder of one's own images: which are taken, their classes, the halves, unreadable ones; and training on them."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import Outcome, failed, run_in_process
from training import options

import train
from datasets import load_split
from pre_process import image_arrays, pre_process_folder
from utils.errors import UserError
from utils.images import find_images

SIZE = 16
pytestmark = pytest.mark.usefixtures("one_thread")


def save_photo(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def make_photos(folder: Path, classes: tuple[str, ...] = ("cat", "dog", "owl", "rat"), each: int = 3) -> Path:
    """`each` photos of each class, in folders below, one of them deeper."""
    for seed, name in enumerate(name for name in classes for _ in range(each)):
        deeper = "deep" if seed % each == 1 else ""
        save_photo(folder / name / deeper / f"{seed:02d}.{('jpg', 'png', 'JPEG')[seed % 3]}", seed)
    return folder


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """The script sets signal handlers; the tests after it get their own back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def script(monkeypatch, capsys, tmp_path) -> Callable[..., tuple[int, str, str]]:
    """Run the script in this process on tmp_path/photos: (exit status, stdout, stderr)."""

    def run(*arguments: object, images: Path | None = None) -> tuple[int, str, str]:
        given = ["--images", images or tmp_path / "photos", "--name", "mine", "--data_dir", tmp_path / "data"]
        given += ["--image_size", SIZE, "--workers", 1, *arguments]
        monkeypatch.setattr(sys, "argv", ["pre_process/pre_process_folder.py", *map(str, given)])
        with pytest.raises(SystemExit) as ended:
            image_arrays.run(pre_process_folder.main)
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run


def table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


def halves(data: Path) -> dict[str, tuple[np.ndarray, np.ndarray, list[dict[str, str]]]]:
    """Images, labels and listed paths of both halves."""
    found = {}
    for name in ("training", "validation"):
        split = load_split(data, "mine", name)
        found[name] = split.images, split.labels, table(data / "mine" / f"{name}_mine_{SIZE}resized_paths.csv")
    return found


def assert_one_line(result: tuple[int, str, str], *parts: str) -> None:
    status, _, err = result
    assert status == 2, err
    assert err.startswith("pre_process_folder.py: error: ") and err.count("\n") == 1, err
    for part in parts:
        assert part in err


def reference(path: Path | str) -> np.ndarray:
    return np.array(Image.open(path).convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))


# ------------------------------------------------------------------------------------------------ what is written


def test_without_labels_every_image_is_in_one_half(script, tmp_path):
    photos = make_photos(tmp_path / "photos")
    status, _, err = script("--train_share", "0.75")
    assert (status, err) == (0, "")
    found = halves(tmp_path / "data")
    for images, labels, listed in found.values():
        assert set(labels.tolist()) == {-1} and len(images) == len(listed) > 0
        assert [row["class"] for row in listed] == [""] * len(listed)
        np.testing.assert_array_equal(images, np.stack([reference(row["path"]) for row in listed]))
    paths = [[row["path"] for row in listed] for _, _, listed in found.values()]
    assert [len(half) for half in paths] == [9, 3]
    assert sorted([*paths[0], *paths[1]]) == [str(path) for path in find_images(photos)]
    assert all(os.path.isabs(path) for half in paths for path in half) and all(half == sorted(half) for half in paths)


def test_another_seed_draws_other_images(script, tmp_path):
    make_photos(tmp_path / "photos")
    drawn = []
    for seed in (0, 0, 1):
        assert script("--seed", seed, "--train_share", "0.5")[0] == 0
        drawn.append([row["path"] for row in halves(tmp_path / "data")["training"][2]])
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("share, training", [((), ["cat", "dog"]), (("--train_share", "0.25"), ["cat"])])
def test_subfolders_are_classes_and_the_later_ones_unseen(script, tmp_path, share, training):
    make_photos(tmp_path / "photos")
    assert script("--labels", "subfolders", *share)[0] == 0
    found = halves(tmp_path / "data")
    for name, classes in (("training", training), ("validation", sorted({"cat", "dog", "owl", "rat"} - {*training}))):
        images, labels, listed = found[name]
        assert [row["class"] for row in listed] == [c for c in classes for _ in range(3)]
        assert labels.tolist() == [("cat", "dog", "owl", "rat").index(row["class"]) + 1 for row in listed]
        assert all(f"/photos/{row['class']}/" in row["path"] for row in listed)
        np.testing.assert_array_equal(images, np.stack([reference(row["path"]) for row in listed]))


def test_split_by_images_mixes_the_classes(script, tmp_path):
    make_photos(tmp_path / "photos", each=6)
    assert script("--labels", "subfolders", "--split_by", "images", "--train_share", "0.5")[0] == 0
    found = halves(tmp_path / "data")
    assert [len(labels) for _, labels, _ in found.values()] == [12, 12]
    assert set(found["training"][1]) & set(found["validation"][1])


def test_labels_of_a_csv_file(script, tmp_path):
    photos = make_photos(tmp_path / "photos")
    odd = save_photo(photos / 'comma, "quote"\nline.png', seed=77)
    rows = [("10", odd), ("9", photos / "cat/00.jpg"), ("10", photos / "cat/02.JPEG"), ("2", photos / "rat/11.JPEG"),
            ("9", photos / "dog/03.jpg"), ("2", photos / "owl/06.jpg")]  # fmt: skip
    odd.rename(photos / 'comma, "quote".png')
    rows[0] = ("10", photos / 'comma, "quote".png')
    with open(tmp_path / "labels.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(("class", "note", "path"))
        writer.writerows((name, "x", path.relative_to(photos)) for name, path in rows)
    status, out, err = script("--labels", tmp_path / "labels.csv", "--train_share", "0.34")
    assert (status, err) == (0, "") and "7 images" in out and "left out" in out
    found = halves(tmp_path / "data")
    # numbers in their order: 2 trains; rows in the order of the file
    assert [(row["class"], row["path"]) for row in found["training"][2]] == [
        (name, str(path)) for name, path in rows if name == "2"
    ]
    assert [(row["class"], row["path"]) for row in found["validation"][2]] == [
        (name, str(path)) for name, path in rows if name != "2"
    ]
    assert found["validation"][1].tolist() == [3, 2, 3, 2]


def test_which_files_are_images(tmp_path):
    photos = make_photos(tmp_path / "photos", ("a",))
    kept = [*find_images(photos), photos / "b.TIFF", photos / "link.png"]
    Image.new("RGB", (9, 9)).save(photos / "b.TIFF")
    (photos / "link.png").symlink_to(photos / "b.TIFF")
    for name in (".hidden.png", ".cache/x.png", "notes.txt", "no_suffix"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_bytes(b"x")
    (photos / "folder.jpg").mkdir()
    (photos / "a" / "loop").symlink_to(photos)
    (photos / "broken.jpg").symlink_to(photos / "nowhere.jpg")
    assert find_images(photos) == sorted(kept)


def test_a_name_that_is_no_utf8_is_kept(script, tmp_path):
    photos = make_photos(tmp_path / "photos")
    name = os.fsdecode(b"caf\xe9.png")
    try:
        save_photo(photos / "plain.png", 5).rename(photos / name)
    except OSError:
        pytest.skip("the file system takes UTF-8 only")
    assert script()[0] == 0
    paths = [row["path"] for _, _, listed in halves(tmp_path / "data").values() for row in listed]
    assert str(photos / name) in paths and all(os.path.exists(path) for path in paths)


# ------------------------------------------------------------------------------------------------ unreadable images


def spoil(photos: Path) -> list[Path]:
    """Three of the twelve cannot be read: the first and two neighbours."""
    bad = [find_images(photos)[i] for i in (0, 5, 6)]
    bad[0].write_text("no image")
    os.truncate(bad[1], bad[1].stat().st_size - 50)
    bad[2].write_bytes(b"")
    return bad


def test_unreadable_images_are_an_error_that_names_them_and_the_way_out(script, tmp_path):
    bad = spoil(make_photos(tmp_path / "photos"))
    save_photo(tmp_path / "data" / "mine" / "old.png", 1)
    assert_one_line(script("--train_share", "0.99"), str(bad[0]), str(bad[1]), "is not an image", "--skip_bad")
    assert [path.name for path in (tmp_path / "data" / "mine").iterdir()] == ["old.png"]


@pytest.mark.parametrize("labels", [(), ("--labels", "subfolders")])
def test_skip_bad_leaves_them_out_and_lists_them(script, tmp_path, labels):
    photos = make_photos(tmp_path / "photos")
    everything = find_images(photos)
    bad = spoil(photos)
    status, out, err = script("--skip_bad", *labels)
    assert (status, err) == (0, "") and "3 unreadable images were left out" in out
    found = halves(tmp_path / "data")
    for images, labels, listed in found.values():
        assert len(images) == len(labels) == len(listed)
        np.testing.assert_array_equal(images, np.stack([reference(row["path"]) for row in listed]))
        assert [row["class"] for row in listed] == [("", "cat", "dog", "owl", "rat")[max(0, label)] for label in labels]
    paths = [row["path"] for _, _, listed in found.values() for row in listed]
    assert sorted(paths) == [str(path) for path in everything if path not in bad]
    skipped = table(tmp_path / "data" / "mine" / f"mine_{SIZE}resized_unreadable.csv")
    assert sorted(row["path"] for row in skipped) == [str(path) for path in bad]
    assert all(row["reason"] for row in skipped)
    for name in ("training", "validation"):  # files that numpy itself would write
        path = tmp_path / "data" / "mine" / f"{name}_mine_{SIZE}resized_img.npy"
        np.save(tmp_path / "again.npy", np.load(path))
        assert path.read_bytes() == (tmp_path / "again.npy").read_bytes()


@pytest.mark.parametrize("n, rows", [(11, [0]), (10, [9]), (12, [0, 1, 5, 10]), (100, [*range(97)]), (5, [])])
def test_dropped_rows(tmp_path, n, rows):
    pixels = np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    np.save(tmp_path / "a.npy", pixels)
    start = (tmp_path / "a.npy").stat().st_size - pixels.nbytes
    with open(tmp_path / "a.npy", "rb+") as file:
        image_arrays.drop_rows(file, start, n, 8, rows)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), np.delete(pixels, rows, axis=0))


def test_a_bomb_is_unreadable(script, tmp_path, monkeypatch):
    photos = make_photos(tmp_path / "photos")
    save_photo(photos / "bomb.png", 1, size=(60, 60))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60 * 60 - 1)
    assert_one_line(script(), "bomb.png", "exceeds limit", "--skip_bad")


def test_workers_write_the_same_bytes_and_report_what_is_unreadable(root, tmp_path):
    photos = make_photos(tmp_path / "photos", each=9)
    bad = spoil(photos)
    given = ["--images", photos, "--name", "mine", "--image_size", SIZE, "--skip_bad"]
    for workers in (1, 2):
        where = ["--out_dir", tmp_path / str(workers), "--workers", workers]
        command = [sys.executable, root / "pre_process" / "pre_process_folder.py", *map(str, [*given, *where])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
    files = [sorted((tmp_path / name).iterdir()) for name in "12"]
    assert [p.name for p in files[0]] == [p.name for p in files[1]] and len(files[0]) == 7
    assert all(one.read_bytes() == two.read_bytes() for one, two in zip(*files, strict=True))
    assert len(table(tmp_path / "2" / f"mine_{SIZE}resized_unreadable.csv")) == len(bad)


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize("argv, words", [
    (["--labels", "folders.csv"], "no such file; give a CSV file, or subfolders"),
    (["--split_by", "classes"], "give --labels"),
    (["--train_share", "1"], "must be below 1"),
    (["--train_share", "0"], "must be greater than 0"),
    (["--name", "cub200"], "pre_process_cub200.py"),
    (["--name", "a/b"], "expected a plain name"),
    (["--images", "no_such_folder"], "no_such_folder: no such folder"),
    (["--labels", "subfolders", "--images", "photos/cat"], "lies directly in --images"),
])  # fmt: skip
def test_refused(script, tmp_path, monkeypatch, argv, words):
    make_photos(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    assert_one_line(script(*argv), words)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("text, words", [
    ("file,class\ncat/00.jpg,1\n", "has no column path"),
    ("path,class\ncat/00.jpg,\n", "line 2: no class"),
    ("path,class\ncat/00.jpg,1\ncat/00.jpg,2\n", "line 3: cat/00.jpg is listed twice"),
    ("path,class\n../photos/cat/00.jpg,1\n", "leaves the data folder"),
    ("path,class\nnone.jpg,1\n", "none.jpg: listed, but no such file"),
    ("path,class\n", "lists no image"),
    ("path,class\ncat/00.jpg,1\ndog/03.jpg,2\n", "2 classes; 3 are needed"),
    ("path,class\ncat/00.jpg,1\ndog/03.jpg,2\nowl/06.jpg,3\n", "1 images would be in the training half"),
])  # fmt: skip
def test_faults_of_a_csv_file(script, tmp_path, text, words):
    make_photos(tmp_path / "photos")
    (tmp_path / "labels.csv").write_text(text)
    assert_one_line(script("--labels", tmp_path / "labels.csv"), words)


def test_images_and_a_name_are_needed():
    for given in ([], ["--images", "photos"], ["--name", "mine"]):
        failed(run_in_process("pre_process_folder.py", *given), "give --images DIR and --name NAME")


def test_a_folder_without_images(tmp_path):
    with pytest.raises(UserError, match="no images in it"):
        find_images(tmp_path)


# ------------------------------------------------------------------------------------------------ training on it


def execute(*argv: object) -> Outcome:
    return run_in_process("train.py", *argv)


@pytest.fixture
def unlabelled(script, tmp_path) -> Path:
    make_photos(tmp_path / "photos", each=4)
    assert script()[0] == 0
    return tmp_path / "data"


def test_training_without_labels(unlabelled, tmp_path):
    done = execute(*options(unlabelled, tmp_path, dataset="mine", batch_size=4, n_epoch=2, positives="nn"))
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert "test images without labels" in lines[0]
    assert [("no scores: they need labels" in line, "loss" in line) for line in lines[1:3]] == [(True, True)] * 2
    assert lines[3].startswith("last epoch (2), not scored") and lines[3].endswith("last.pth")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["best"] for row in rows] == [False, False] and not any("recall@1" in row for row in rows)
    assert sorted(path.name for path in (tmp_path / "run").glob("*.pth")) == ["last.pth"]
    again = execute("--resume", tmp_path / "run", "--n_epoch", 3)
    assert (again.code, again.err) == (0, "") and "last epoch (3)" in again.out


def test_an_untrained_network_without_labels(unlabelled, tmp_path):
    assert execute(*options(unlabelled, tmp_path, dataset="mine", batch_size=4, n_epoch=0)).code == 0
    assert torch.load(tmp_path / "run" / "last.pth")["epoch"] == 0 and not (tmp_path / "run" / "best.pth").exists()


def test_test_script_without_labels(forks, unlabelled, tmp_path):
    assert train.main(options(unlabelled, tmp_path, dataset="mine", batch_size=4)) == 0
    given = ["--dataset", "mine", "--data_dir", unlabelled, "--checkpoint_path", tmp_path / "run", "--device", "cpu"]
    refused = forks.run(*given, script="test.py")
    assert (refused.code, refused.err.count("\n")) == (2, 1) and "--save_embeddings" in refused.err
    saved = forks.run(*given, "--save_embeddings", tmp_path / "e.npy", "--json", tmp_path / "e.json", script="test.py")
    assert (saved.code, saved.err) == (0, "")
    assert "last.pth, no epoch of this run was scored" in saved.out and "no scores: they need labels" in saved.out
    assert np.load(tmp_path / "e.npy").shape == (len(load_split(unlabelled, "mine", "validation")), 16)
    assert json.loads((tmp_path / "e.json").read_text())["classes"] is None


def test_labels_for_some_images_only_are_refused(unlabelled):
    path = load_split(unlabelled, "mine", "training").label_path
    labels = np.load(path)
    labels[1] = 4
    np.save(path, labels)
    with pytest.raises(UserError, match=r"-1 .no label. beside labels"):
        load_split(unlabelled, "mine", "training")
