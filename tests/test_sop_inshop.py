"""Stanford Online Products and In-shop Clothes: pre-processing, training and scores, on small official layouts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from raw_folders import make_inshop, make_sop, replace_line, save_photo
from scripts import Outcome, failed, run_in_process
from training import execute, trained

from datasets import load_split
from utils import evaluation
from utils.errors import UserError

SIZE = 16
MAKE = {"sop": make_sop, "inshop": make_inshop}
NAMES = {
    "sop": [f"{half}_sop_{{}}resized_{kind}.npy" for half in ("training", "validation") for kind in ("img", "label")],
    "inshop": [
        *(f"training_inshop_{{}}resized_{kind}.npy" for kind in ("img", "label")),
        *(f"validation_inshop_{{}}resized_{kind}.npy" for kind in ("img", "label", "role")),
    ],
}
BENCHMARK = "In-shop Clothes Retrieval Benchmark"
pytestmark = pytest.mark.usefixtures("one_thread")


def script(dataset: str, *arguments: object, size: int = SIZE) -> Outcome:
    return run_in_process(f"pre_process_{dataset}.py", *arguments, "--image_size", size, "--workers", 1)


def listed(dataset: str, raw: Path) -> dict[str, list[tuple[Path, int, str]]]:
    """Image, class and status of either half, read in the plainest way."""
    halves: dict[str, list] = {"training": [], "validation": []}
    if dataset == "sop":
        for half, name in (("training", "Ebay_train.txt"), ("validation", "Ebay_test.txt")):
            rows = [line.split() for line in (raw / name).read_text().splitlines()[1:]]
            halves[half] = [(raw / row[3], int(row[1]), "") for row in rows]
        return halves
    for line in (raw / "Eval" / "list_eval_partition.txt").read_text().splitlines()[2:]:
        name, item, status = line.split()
        halves["training" if status == "train" else "validation"].append((raw / "Img" / name, int(item[3:]), status))
    return halves


# ------------------------------------------------------------------------------------------------ what is written


@pytest.mark.parametrize("dataset", MAKE)
def test_arrays_are_the_literal_reference_in_official_order(dataset, tmp_path):
    raw = MAKE[dataset](tmp_path / dataset)
    done = script(dataset, "--data_dir", tmp_path)
    assert (done.code, done.err) == (0, "")
    for half, rows in listed(dataset, raw).items():
        split = load_split(tmp_path, dataset, half)
        pixels = [Image.open(path).convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS) for path, _, _ in rows]
        np.testing.assert_array_equal(split.images, np.stack(pixels))
        assert split.labels.tolist() == [label for _, label, _ in rows]
        queries = None if split.is_query is None else split.is_query.tolist()
        roles = (dataset, half) == ("inshop", "validation")
        assert queries == ([status == "query" for _, _, status in rows] if roles else None)
    assert sorted(path.name for path in raw.glob("*.npy")) == sorted(name.format(SIZE) for name in NAMES[dataset])
    assert not list(raw.glob(".*"))
    lines = done.out.splitlines()
    assert len(lines) == 2 and ("(6 queries, 6 gallery), 3 classes" in lines[1]) == (dataset == "inshop")


@pytest.mark.parametrize(("dataset", "place"), [
    ("sop", ""), ("sop", "Stanford_Online_Products"), ("inshop", ""), ("inshop", BENCHMARK),
])  # fmt: skip
def test_raw_files_are_found_where_they_were_unpacked(dataset, place, tmp_path):
    home = tmp_path / "downloads" / dataset
    MAKE[dataset](home / place)
    for data_dir in (home.parent, home):
        out = tmp_path / "out" / data_dir.name
        assert script(dataset, "--data_dir", data_dir, "--out_dir", out).code == 0
        assert sorted(path.name for path in out.iterdir()) == sorted(name.format(SIZE) for name in NAMES[dataset])


@pytest.mark.parametrize(("images", "listed"), [("img", ""), ("img", "Eval"), ("Img/img", "")])
def test_inshop_images_and_list_may_lie_a_folder_above(images, listed, tmp_path):
    make_inshop(tmp_path / "inshop", images=images, listed=listed)
    assert script("inshop", "--data_dir", tmp_path).code == 0


def test_the_folder_of_images_may_be_a_link(tmp_path):
    raw = make_inshop(tmp_path / "inshop")
    (raw / "Img" / "img").rename(tmp_path / "elsewhere")
    (raw / "Img" / "img").symlink_to(tmp_path / "elsewhere")
    assert script("inshop", "--data_dir", tmp_path).code == 0


@pytest.mark.parametrize("dataset", MAKE)
def test_every_number_of_workers_writes_the_same_bytes(dataset, root, tmp_path):
    MAKE[dataset](tmp_path / dataset, each=8)  # several tasks for each worker
    command = [sys.executable, str(root / "pre_process" / f"pre_process_{dataset}.py"), "--data_dir", str(tmp_path)]
    for workers in ("1", "3"):
        argv = [*command, "--out_dir", str(tmp_path / workers), "--image_size", str(SIZE), "--workers", workers]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
    for name in NAMES[dataset]:
        assert (tmp_path / "1" / name.format(SIZE)).read_bytes() == (tmp_path / "3" / name.format(SIZE)).read_bytes()


# ------------------------------------------------------------------------------------------------ bad input


TRAIN, TEST, LIST = "Ebay_train.txt", "Ebay_test.txt", "Eval/list_eval_partition.txt"
DRESS = "img/WOMEN/Dresses/id_00000002/01_0_train.jpg"  # line 3, the first image
QUERY_OF_5 = "img/WOMEN/Dresses/id_00000005/01_2_query.jpg"  # line 5
SOP_IMAGE = "bicycle_final/111318_0.JPG"  # line 2 of the training list


def drop_line(file: Path, number: int) -> None:
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[: number - 1] + lines[number:]) + "\n")


def put_link_out(raw: Path, image: str) -> None:
    save_photo(raw.parent / "secret.jpg", seed=0)
    (raw / image).unlink()
    (raw / image).symlink_to(raw.parent / "secret.jpg")


def line(file: str, number: int, text: str):
    return lambda raw: replace_line(raw / file, number, text)


FAULTS = {  # data set, what is done to a good raw folder -> what the message must name
    "sop: no folder": (shutil.rmtree, ["Ebay_train.txt: not found", "Stanford_Online_Products.zip"]),
    "sop: no test list": (lambda raw: (raw / TEST).unlink(), ["Ebay_test.txt: not found", "Stanford_Online_Products"]),
    "sop: no text": (lambda raw: (raw / TRAIN).write_bytes(b"\xff\xfe\x00a"), ["Ebay_train.txt", "not a text file"]),
    "sop: empty list": (lambda raw: (raw / TEST).write_text(""), ["Ebay_test.txt", "column names"]),
    "sop: no header": (lambda raw: drop_line(raw / TRAIN, 1), ["Ebay_train.txt: line 1", "column names"]),
    "sop: header alone": (
        lambda raw: (raw / TEST).write_text("image_id class_id super_class_id path\n"), ["0 images of the validation"],
    ),
    "sop: three words": (line(TRAIN, 2, "1 1 a.JPG"), ["Ebay_train.txt: line 2", "1 1 a.JPG"]),
    "sop: class no number": (line(TRAIN, 2, f"1 x 1 {SOP_IMAGE}"), ["Ebay_train.txt: line 2", "class 'x'"]),
    "sop: class 0": (line(TRAIN, 2, f"1 0 1 {SOP_IMAGE}"), ["Ebay_train.txt: line 2", "class 0", "1-22634"]),
    "sop: class 22635": (line(TEST, 2, "1 22635 1 bicycle_final/122634_0.JPG"), ["Ebay_test.txt: line 2", "22635"]),
    "sop: path up": (line(TRAIN, 2, "1 1 1 ../a.JPG"), ["Ebay_train.txt: line 2", "../a.JPG", "leaves"]),
    "sop: absolute path": (line(TRAIN, 2, "1 1 1 /etc/hostname"), ["line 2", "/etc/hostname", "leaves"]),
    "sop: drive": (line(TRAIN, 2, r"1 1 1 C:\a.JPG"), ["line 2", "leaves"]),
    "sop: link out": (lambda raw: put_link_out(raw, SOP_IMAGE), ["Ebay_train.txt: line 2", "link out of"]),
    "sop: twice": (line(TRAIN, 5, f"4 1 1 {SOP_IMAGE}"), ["Ebay_train.txt: line 5", "listed already", "line 2"]),
    "sop: in both halves": (
        line(TEST, 3, "9 40 1 bicycle_final/111319_0.JPG"), ["Ebay_test.txt", "class 40 is in both halves"]
    ),
    "sop: image of both": (line(TEST, 3, f"9 12000 1 {SOP_IMAGE}"), ["Ebay_test.txt: line 3", "listed already"]),
    "sop: no image": (lambda raw: (raw / SOP_IMAGE).unlink(), [SOP_IMAGE, "no such file"]),
    "sop: bad image": (lambda raw: (raw / SOP_IMAGE).write_text("<html>"), [SOP_IMAGE, "not an image"]),
    "inshop: no folder": (shutil.rmtree, ["list_eval_partition.txt: not found", "DeepFashion"]),
    "inshop: empty list": (lambda raw: (raw / LIST).write_text(""), ["list_eval_partition.txt: line 1", "number"]),
    "inshop: no count": (lambda raw: drop_line(raw / LIST, 1), ["line 1", "expected the number of images"]),
    "inshop: count too high": (line(LIST, 1, "17"), ["list_eval_partition.txt", "says 17 images, 16 are listed"]),
    "inshop: torn": (lambda raw: drop_line(raw / LIST, 18), ["says 16 images, 15 are listed"]),
    "inshop: no header": (lambda raw: drop_line(raw / LIST, 2), ["line 2", "column names"]),
    "inshop: four words": (line(LIST, 3, f"{DRESS} id_00000002 train 1"), ["line 3", "not of the form"]),
    "inshop: unknown status": (line(LIST, 3, f"{DRESS} id_00000002 val"), ["line 3", "'val'", "query, gallery"]),
    "inshop: item no number": (line(LIST, 3, f"{DRESS} id_0000000x train"), ["line 3", "id_0000000x"]),
    "inshop: item 0": (line(LIST, 3, f"{DRESS} id_00000000 train"), ["line 3", "id_00000000"]),
    "inshop: item negative": (line(LIST, 3, f"{DRESS} id_-0000001 train"), ["line 3", "id_-0000001"]),
    "inshop: path up": (line(LIST, 3, "img/../../a.jpg id_00000002 train"), ["line 3", "leaves"]),
    "inshop: absolute path": (line(LIST, 3, "/etc/hostname id_00000002 train"), ["line 3", "leaves"]),
    "inshop: link out": (lambda raw: put_link_out(raw / "Img", DRESS), ["line 3", "link out of"]),
    "inshop: twice": (line(LIST, 4, f"{DRESS} id_00007982 train"), ["line 4", "listed already", "line 3"]),
    "inshop: in both halves": (line(LIST, 3, f"{DRESS} id_00000005 train"), ["class 5 is in both halves"]),
    "inshop: item without gallery": (
        line(LIST, 5, f"{QUERY_OF_5} id_00000006 query"), ["line 5", "no image of item id_00000006 in the gallery"],
    ),
    "inshop: no query": (
        lambda raw: (raw / LIST).write_text((raw / LIST).read_text().replace(" query\n", " gallery\n")), ["no query"],
    ),
    "inshop: no training image": (
        lambda raw: (raw / LIST).write_text((raw / LIST).read_text().replace(" train\n", " gallery\n")),
        ["0 images of the training half"],
    ),
    "inshop: no image": (lambda raw: (raw / "Img" / DRESS).unlink(), [DRESS, "no such file"]),
    "inshop: cut image": (
        lambda raw: os.truncate(raw / "Img" / QUERY_OF_5, (raw / "Img" / QUERY_OF_5).stat().st_size - 99),
        [QUERY_OF_5, "truncated"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_raw_folder(fault, tmp_path):
    dataset, (spoil, named) = fault.partition(":")[0], FAULTS[fault]
    out = tmp_path / "out"
    out.mkdir()
    for name in NAMES[dataset]:
        (out / name.format(SIZE)).write_text("an older run's")
    spoil(MAKE[dataset](tmp_path / dataset))
    done = script(dataset, "--data_dir", tmp_path, "--out_dir", out)
    failed(done, *named)
    assert done.out == ""
    assert {path.name: path.read_text() for path in out.iterdir()} == {
        name.format(SIZE): "an older run's" for name in NAMES[dataset]
    }


# ------------------------------------------------------------------------------------------------ the roles


@pytest.fixture
def inshop(tmp_path) -> Path:
    """--data_dir with the arrays of In-shop, 32 px, 8 training and 24 test images."""
    make_inshop(tmp_path / "raw", each=4)
    (tmp_path / "data").mkdir()
    assert (
        script("inshop", "--data_dir", tmp_path / "raw", "--out_dir", tmp_path / "data" / "inshop", size=32).code == 0
    )
    return tmp_path / "data"


def role_file(data: Path) -> Path:
    return data / "inshop" / "validation_inshop_32resized_role.npy"


@pytest.mark.parametrize(("roles", "words"), [
    (None, "no such file"),
    (np.zeros(23, np.int64), "expected 24 roles"),
    (np.zeros((24, 1), np.int64), "expected 24 roles"),
    (np.zeros(24), "integers"),
    (np.zeros(24, np.int64), "queries"),
    (np.arange(24) % 3, "queries"),
])  # fmt: skip
def test_roles_that_cannot_be(inshop, roles, words):
    role_file(inshop).unlink()
    if roles is not None:
        np.save(role_file(inshop), roles)
    with pytest.raises(UserError, match=words) as fault:
        load_split(inshop, "inshop", "validation")
    assert str(role_file(inshop)) in str(fault.value)


def test_roles_are_part_of_the_fingerprint(inshop):
    before = load_split(inshop, "inshop", "validation").fingerprint()
    assert before.keys() == {"images", "labels", "roles"}
    assert load_split(inshop, "inshop", "training").fingerprint().keys() == {"images", "labels"}
    np.save(role_file(inshop), (1 - np.load(role_file(inshop))).astype(np.int8))
    after = load_split(inshop, "inshop", "validation").fingerprint()
    assert [name for name in before if before[name] != after[name]] == ["roles"]


def test_a_run_is_not_resumed_with_other_roles(inshop, tmp_path):
    trained(inshop, tmp_path, dataset="inshop")
    roles = np.load(role_file(inshop))
    np.save(role_file(inshop), 1 - roles)
    failed(execute("--resume", tmp_path / "run", "--n_epoch", 2), str(role_file(inshop)), "its content has changed")
    np.save(role_file(inshop), roles)
    assert execute("--resume", tmp_path / "run", "--n_epoch", 2).code == 0


# ------------------------------------------------------------------------------------------------ end to end


def literal_recall(embeddings: np.ndarray, labels: np.ndarray, is_query: np.ndarray | None, k: int) -> float:
    """Query by query, in float64; at equal distance the earlier row is nearer."""
    rows = embeddings.astype(np.float64)
    hits = []
    for q in range(len(rows)) if is_query is None else np.flatnonzero(is_query):
        searched = [i for i in range(len(rows)) if i != q and (is_query is None or not is_query[i])]
        searched.sort(key=lambda i: (np.square(rows[q] - rows[i]).sum(), i))
        hits.append(any(labels[i] == labels[q] for i in searched[:k]))
    return sum(hits) / len(hits)


@pytest.mark.parametrize(("dataset", "ks"), [("sop", (1, 10, 100, 1000)), ("inshop", (1, 10, 20, 30, 40, 50))])
def test_from_raw_files_to_scores(dataset, ks, tmp_path, capsys):
    MAKE[dataset](tmp_path / dataset, each=8)
    assert script(dataset, "--data_dir", tmp_path, size=32).code == 0
    capsys.readouterr()
    row = trained(tmp_path, tmp_path, dataset=dataset).rows[0]
    assert [name for name in row if name.startswith("recall@")] == [f"recall@{k}" for k in ks]
    out = capsys.readouterr().out
    assert " ".join(f"R@{k} {100 * row[f'recall@{k}']:.2f}" for k in ks) + f"  NMI {100 * row['nmi']:.2f} *" in out
    assert "R@2 " not in out and (tmp_path / "run" / "best.pth").is_file()
    written = ["--json", tmp_path / "scores.json", "--save_embeddings", tmp_path / "e.npy"]
    done = run_in_process("test.py", "--data_dir", tmp_path, "--dataset", dataset, "--device", "cpu",
                          "--checkpoint_path", tmp_path / "run" / "last.pth", *written)  # fmt: skip
    assert (done.code, done.err) == (0, "")
    scores, embeddings = json.loads((tmp_path / "scores.json").read_text()), np.load(tmp_path / "e.npy")
    half = load_split(tmp_path, dataset, "validation")
    for k in ks:
        assert scores[f"recall@{k}"] == literal_recall(embeddings, half.labels, half.is_query, k) == row[f"recall@{k}"]
        assert f"R@{k} {100 * scores[f'recall@{k}']:.2f}" in done.out
    assert 0 < scores["recall@1"] < 1 and scores["recall@10"] <= 1
    assert {"nmi", "ami", "map@r", "r_precision"} <= scores.keys()
    assert scores.get("queries") == (24 if dataset == "inshop" else None)
    assert ("48 test images (24 queries, the others their gallery)" in done.out) == (dataset == "inshop")


# ------------------------------------------------------------------------------------------------ NMI left out


def test_nmi_left_out_of_training_is_said(inshop, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "NMI_CLASSES", 2)
    row = trained(inshop, tmp_path, dataset="inshop").rows[0]
    assert "nmi" not in row and row["nmi_left_out"] == "3 classes, more than 2, take long (--nmi on)"
    out = capsys.readouterr().out
    assert "NMI left out *" in out and "NMI left out: 3 classes, more than 2, take long (--nmi on)" in out
    with_it = execute("--resume", tmp_path / "run", "--n_epoch", 2, "--nmi", "on")
    assert (with_it.code, with_it.err) == (0, "") and "NMI by 3 clusters" in with_it.out
    without = execute("--resume", tmp_path / "run", "--n_epoch", 3, "--nmi", "off")
    assert without.code == 0 and "NMI left out: --nmi off" in without.out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [("nmi" in row, "nmi_left_out" in row) for row in rows] == [(False, True), (True, False), (False, True)]
    assert torch.load(tmp_path / "run" / "last.pth")["epoch"] == 3


def test_nmi_left_out_of_a_test_is_said(inshop, tmp_path):
    frozen = ["--data_dir", inshop, "--dataset", "inshop", "--device", "cpu", "--backbone", "resnet_small", "--weights",
              "none", "--json", tmp_path / "scores.json"]  # fmt: skip
    done = run_in_process("test.py", *frozen, "--nmi", "off")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert done.code == 0 and scores["nmi_left_out"] == "--nmi off"
    assert not {"nmi", "ami", "nmi_protocol"} & scores.keys() and {"recall@1", "map@r", "r_precision"} <= scores.keys()
    assert done.out.splitlines()[-1] == "NMI and AMI left out: --nmi off" and " NMI " not in done.out.splitlines()[-3]
    failed(run_in_process("test.py", *frozen, "--nmi", "off", "--nmi_engine", "sklearn"), "--nmi_engine goes with")


def test_a_long_wait_for_nmi_is_said(inshop, monkeypatch):
    monkeypatch.setattr(evaluation, "NMI_CLASSES", 2)
    done = run_in_process("test.py", "--data_dir", inshop, "--dataset", "inshop", "--device", "cpu", "--backbone",
                          "resnet_small", "--weights", "none")  # fmt: skip
    assert done.code == 0 and "k-means of 3 clusters takes minutes (--nmi off leaves it out)" in done.out
