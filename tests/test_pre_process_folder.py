"""A folder of one's own images: their classes, the halves, and unreadable images."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from raw_folders import save_photo
from scripts import Outcome, failed, run_in_process

from datasets.images import find_images
from pre_process.label_lists import clean_classes

SIZE = 16
HALVES = ("training", "validation")


def make_photos(folder: Path, each: int = 3) -> Path:
    """Save `each` photos of four classes in folders below, one of them deeper."""
    names = [name for name in ("cat", "dog", "owl", "rat") for _ in range(each)]
    for seed, name in enumerate(names):
        deeper = "deep" if seed % each == 1 else ""
        ending = ("jpg", "png", "JPEG")[seed % 3]
        save_photo(folder / name / deeper / f"{seed:02d}.{ending}", seed)
    return folder


@pytest.fixture
def photos(tmp_path) -> Path:
    return make_photos(tmp_path / "photos")


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Run the script on the folder photos/ of the test's own folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, workers: int = 1) -> Outcome:
        options = ("--images", tmp_path / "photos", "--name", "mine", "--image_size", SIZE)
        return run_in_process("pre_process_folder.py", *options, "--workers", workers, *arguments)

    return run


def table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


def half(name: str, folder: Path = Path("data", "mine")) -> tuple[list[int], list[str], list[str]]:
    """Return labels, paths and classes of a half whose images are those that it lists."""
    stem = folder / f"{name}_mine_{SIZE}resized"
    listed = table(Path(f"{stem}_paths.csv"))
    paths = [row["path"] for row in listed]
    np.testing.assert_array_equal(np.load(f"{stem}_img.npy"), [reference(path) for path in paths])
    return np.load(f"{stem}_label.npy").tolist(), paths, [row["class"] for row in listed]


def reference(path: str) -> np.ndarray:
    size = (SIZE, SIZE)
    return np.array(Image.open(path).convert("RGB").resize(size, Image.Resampling.LANCZOS))


# ---------------------------------------------------------------------------- what is written


def test_without_labels_every_image_is_in_one_half(script, photos):
    done = script("--train_share", "0.75")
    assert (done.code, done.err) == (0, "")
    paths = []
    for name, count in zip(HALVES, (9, 3), strict=True):
        labels, listed, classes = half(name)
        assert labels == [-1] * count
        assert classes == [""] * count
        assert listed == sorted(listed)
        paths += listed
    assert sorted(paths) == [str(path) for path in find_images(photos)]


@pytest.mark.usefixtures("photos")
def test_another_seed_draws_other_images(script):
    drawn = []
    for seed in (0, 0, 1):
        assert script("--seed", seed, "--train_share", "0.5").code == 0
        drawn.append(half("training")[1])
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.usefixtures("photos")
@pytest.mark.parametrize(("share", "n_training"), [((), 2), (("--train_share", "0.25"), 1)])
def test_subfolders_are_classes_and_the_later_ones_unseen(script, share, n_training):
    assert script("--labels", "subfolders", *share).code == 0
    names = ["cat", "dog", "owl", "rat"]
    for name, chosen in zip(HALVES, (names[:n_training], names[n_training:]), strict=True):
        labels, paths, classes = half(name)
        assert classes == [name for name in chosen for _ in range(3)]
        assert labels == [names.index(name) + 1 for name in classes]
        assert all(f"/photos/{name}/" in path for path, name in zip(paths, classes, strict=True))


@pytest.mark.usefixtures("photos")
def test_split_by_images_mixes_the_classes(script):
    options = ("--labels", "subfolders", "--split_by", "images", "--train_share", "0.5")
    assert script(*options).code == 0
    labels = [half(name)[0] for name in HALVES]
    assert [len(numbers) for numbers in labels] == [6, 6]
    assert set(labels[0]) & set(labels[1])


def test_labels_of_a_csv_file(script, photos, tmp_path):
    odd = save_photo(photos / "77.png", seed=77).rename(photos / 'comma, "quote".png')
    rows = [
        ("10", odd),
        ("9", photos / "cat/00.jpg"),
        ("10", photos / "cat/02.JPEG"),
        ("2", photos / "rat/11.JPEG"),
        ("9", photos / "dog/03.jpg"),
        ("2", photos / "owl/06.jpg"),
    ]
    with open(tmp_path / "labels.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(("class", "note", "path"))
        writer.writerows((name, "x", path.relative_to(photos)) for name, path in rows)
    done = script("--labels", "labels.csv", "--train_share", "0.34")
    assert (done.code, done.err) == (0, "")
    assert "7 images of" in done.out and "are not listed in labels.csv: left out" in done.out
    # Numbers in their order: class 2 trains. Rows in the order of the file.
    assert half("training")[1:] == ([str(rows[3][1]), str(rows[5][1])], ["2", "2"])
    labels, paths, classes = half("validation")
    assert labels == [3, 2, 3, 2]
    assert list(zip(classes, map(Path, paths), strict=True)) == [rows[i] for i in (0, 1, 2, 4)]


def test_a_path_that_is_not_utf8_is_kept(script, photos):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        save_photo(photos / "plain.png", 5).rename(photos / name)
    except OSError:
        pytest.skip("the file system takes UTF-8 only")
    assert script().code == 0
    assert str(photos / name) in half("training")[1] + half("validation")[1]


CLASSES = {"cat/00.jpg": "cat", "dog/03.jpg": "cat", "rat/11.JPEG": "é", "owl/06.jpg": "owl"}
CLASSES |= {"rat/09.jpg": "é", "owl/08.JPEG": "owl"}


def odd_lists() -> dict[str, bytes]:
    """Return the same list of images in the forms that people and programs save."""
    table = "".join(f"{path},{name}\n" for path, name in CLASSES.items())
    plain = "path,class\n" + table
    absolute = "".join(f"{Path('photos', line).absolute()}\n" for line in table.splitlines())
    return {
        "plain": plain.encode(),
        "semicolons of a spreadsheet": plain.replace(",", ";").encode("utf-8-sig"),
        "a first line for Excel": b"sep=;\n" + plain.replace(",", ";").encode(),
        "a row of separators": f"{plain},\n".encode(),
        "tabs in UTF-16": plain.replace(",", "\t").encode("utf-16"),
        "a head in capitals, blanks": (" Path , Class \n" + table.replace(",", " , ")).encode(),
        "quotes after a blank": plain.replace(",cat", ', "cat"').encode(),
        "quotes after a blank, in the head, too": f'"path", "class"\n{table}'.encode(),
        "odd signs of a path": plain.replace("dog/03.jpg", "\u202adog/03.jpg").encode(),
        "backslashes": plain.replace("/", "\\").encode(),
        "absolute paths": f"path,class\n{absolute}".encode(),
        "class names in two Unicode forms": plain.replace("09.jpg,é", "09.jpg,e\u0301").encode(),
        "odd blanks": plain.replace("dog/03.jpg,cat", "dog/03.jpg,\u202fcat\u200b\u00a0").encode(),
        "lines of Windows, columns more": plain.replace("\n", ",x\r\n").encode(),
    }


@pytest.mark.usefixtures("photos")
def test_lists_as_people_save_them(script):
    for form, content in odd_lists().items():
        Path("labels.csv").write_bytes(content)
        done = script("--labels", "labels.csv", "--split_by", "images")
        assert (done.code, done.err) == (0, ""), form
        _, paths, classes = (
            first + second for first, second in zip(*map(half, HALVES), strict=True)
        )
        found = {str(Path(path).relative_to(Path("photos").absolute())) for path in paths}
        assert found == CLASSES.keys(), form
        assert sorted(classes) == sorted(CLASSES.values()), form
        is_cleaned = form in ("class names in two Unicode forms", "odd blanks")
        assert ("names of classes" in done.out) == is_cleaned, form


def test_a_list_as_excel_saves_it(script, photos):
    name = "Ét\u00e9 à la plage.jpg"
    save_photo(photos / "cat" / name, 50)
    rows = [(path.relative_to(photos), path.parent.name) for path in find_images(photos)]
    table_text = "path;class\n" + "".join(f"{path};{kind}\n" for path, kind in rows)
    Path("labels.csv").write_bytes(table_text.encode("cp1252"))
    done = script("--labels", "labels.csv", "--split_by", "images")
    assert (done.code, done.err) == (0, "")
    assert any(Path(p).name == name for h in HALVES for p in half(h)[1])


def test_names_that_look_alike_are_one_class():
    spellings = ["big\u00a0cat", "big  cat", "\u200ebig cat", "big\u200b cat", "b\u00adig cat "]
    spellings += ["\u200d big cat", "big cat\u200c\u00a0"]
    assert set(clean_classes(["big cat", *spellings])[0]) == {"big cat"}
    family = "\U0001f468\u200d\U0001f469"  # one sign, of two that are joined
    assert clean_classes([family]) == ([family], 0)


def test_a_list_among_what_is_written(script, photos):
    assert script().code == 0
    table = f"data/mine/training_mine_{SIZE}resized_paths.csv"
    before = Path(table).read_bytes()
    failed(script("--labels", table), "lies where the data set is written; copy it elsewhere")
    assert Path(table).read_bytes() == before


NAMES = ["Screenshot\u202f1.png", "no\u00a0break.png", "\u3000.png", "zero\u200bwidth.png", " .png"]
NAMES += ["line\nfeed.png", "carriage\rreturn.png", "comma,;\t|.png", 'quo"te.png', "e\u0301.png"]


def test_what_is_written_is_read_back_for_every_name(script, photos):
    for number, name in enumerate(NAMES):
        save_photo(photos / "plain.png", number).rename(photos / "owl" / name)
    assert script("--labels", "subfolders").code == 0
    written = [half(name)[1:] for name in HALVES]
    lists = [f"data/mine/{name}_mine_{SIZE}resized_paths.csv" for name in HALVES]
    texts = [Path(file).read_bytes() for file in lists]
    Path("again.csv").write_bytes(texts[0] + texts[1].partition(b"\r\n")[2])
    assert script("--labels", "again.csv").code == 0
    assert [half(name)[1:] for name in HALVES] == written
    assert len({path for paths, _ in written for path in paths}) == 12 + len(NAMES)


@pytest.mark.usefixtures("photos")
def test_absolute_paths_below_a_relative_folder(script):
    rows = "".join(f"{Path('photos', path).absolute()},{name}\n" for path, name in CLASSES.items())
    Path("labels.csv").write_text(f"path,class\n{rows}")
    done = script("--labels", "labels.csv", "--split_by", "images", "--images", "photos")
    assert (done.code, done.err) == (0, "")


def test_composed_names_find_decomposed_files(script, photos):
    for number, name in enumerate(("re\u0301", "u\u0308")):
        save_photo(photos / "x.png", number).rename(photos / f"{name}.png")
    rows = "r\u00e9.png,a\n\u00fc.png,b\ncat/00.jpg,a\nrat/11.JPEG,b\n"
    Path("labels.csv").write_text(f"path,class\n{rows}")
    done = script("--labels", "labels.csv", "--split_by", "images", "--train_share", "0.5")
    assert (done.code, done.err) == (0, "")
    assert str(photos / "re\u0301.png") in half("training")[1] + half("validation")[1]


def test_many_equal_pixels_are_worth_a_remark(script, photos, caplog):
    script()
    assert "the pixels of" not in caplog.text
    for number in range(6):
        Image.new("RGBA", (20 + number, 30)).save(photos / f"line_art_{number}.png")
    script("--train_share", "0.4")
    assert "6 images have the pixels of another one" in caplog.text


# -------------------------------------------------------------------------- unreadable images


def spoil(photos: Path) -> list[Path]:
    """Make the first image and two neighbors unreadable."""
    bad = [find_images(photos)[number] for number in (0, 5, 6)]
    bad[0].write_text("no image")
    os.truncate(bad[1], bad[1].stat().st_size - 50)
    bad[2].write_bytes(b"")
    return bad


def test_an_unreadable_image_is_an_error_that_names_the_way_out(script, photos, tmp_path):
    bad = spoil(photos)
    failed(script("--train_share", "0.99"), bad[0], "is not an image", "--skip_bad")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("labels", [(), ("--labels", "subfolders")])
def test_skip_bad_leaves_them_out_and_lists_them(script, photos, labels, workers):
    everything = find_images(photos)
    bad = spoil(photos)
    done = script("--skip_bad", *labels, workers=workers)
    assert (done.code, done.err) == (0, "")
    assert "3 unreadable images were left out" in done.out
    paths = half("training")[1] + half("validation")[1]
    assert sorted(paths) == [str(path) for path in everything if path not in bad]
    skipped = table(Path("data", "mine", f"mine_{SIZE}resized_unreadable.csv"))
    assert sorted(row["path"] for row in skipped) == [str(path) for path in bad]
    assert all(row["reason"] for row in skipped)
    for path in Path("data", "mine").glob("*_img.npy"):  # byte for byte as numpy itself saves it
        np.save("again.npy", np.load(path))
        assert path.read_bytes() == Path("again.npy").read_bytes()


@pytest.mark.usefixtures("photos")
def test_a_name_stands_for_one_folder(script, tmp_path):
    spoil(tmp_path / "photos")
    assert script("--skip_bad").code == 0
    assert script("--images", f"../{tmp_path.name}/photos", "--skip_bad").code == 0  # the same one
    others = ("--images", make_photos(tmp_path / "others"))
    failed(script(*others), "--name mine: holds images of another folder; choose another name")
    assert all("/photos/" in path for path in half("training")[1])
    assert script(*others, "--overwrite").code == 0
    assert all("/others/" in path for path in half("training")[1])
    assert not list(Path("data", "mine").glob("*unreadable.csv"))  # it was of the other folder
    assert script("--skip_bad", "--out_dir", "elsewhere").code == 0
    failed(script(*others, "--out_dir", "elsewhere"), "holds images of another folder")


# ----------------------------------------------------------------------------------- mistakes


REFUSED = [
    (("--labels", "folders.csv"), "folders.csv'; give a CSV file, or subfolders"),
    (("--split_by", "classes"), "give --labels"),
    (("--train_share", "1"), "must be below 1"),
    (("--name", "cub200"), "pre_process_cub200.py makes it"),
    (("--labels", "subfolders", "--images", "photos/cat"), "lies directly in --images"),
]


@pytest.mark.usefixtures("photos")
@pytest.mark.parametrize(("argv", "words"), REFUSED)
def test_refused(script, tmp_path, argv, words):
    failed(script(*argv), words)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("options", [(), ("--images", "photos"), ("--name", "mine")])
def test_images_and_a_name_are_needed(options):
    failed(run_in_process("pre_process_folder.py", *options), "give --images DIR and --name NAME")


CSV_FAULTS = [
    ("file,class\ncat/00.jpg,1\n", "name its columns path,class"),
    ("path,class\ncat/00.jpg,\n", "line 2: no class"),
    ("path,class\ncat/00.jpg,1\ncat/00.jpg,2\n", "line 3: cat/00.jpg is listed twice"),
    ("path,class\n../mine.csv,1\n", "line 2: '../mine.csv' is no image below "),
    ("path,class\nnone.jpg,1\ncat/00.jpg,1", "(1 of 2 rows have no image)"),
    ("path,class\ncat/00.jpg,\u200b\n", "line 2: no class"),
    ("path,class\ncat/00.jpg,1\ndog/03.jpg,2\n", "2 classes; 3 are needed"),
    ("path,class\ncat/00.jpg,1\ndog/03.jpg,2\nowl/06.jpg,3\n", "1 images in the training half"),
]


@pytest.mark.usefixtures("photos")
@pytest.mark.parametrize(("text", "words"), CSV_FAULTS)
def test_faults_of_a_csv_file(script, text, words):
    Path("labels.csv").write_text(text)
    failed(script("--labels", "labels.csv"), words)
