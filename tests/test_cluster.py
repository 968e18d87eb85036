"""cluster.py: groups, how many of them, and images that show the same."""

from __future__ import annotations

import csv
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from photos import make_photos, read_table, save_network, write_embeddings
from PIL import Image, ImageOps
from scripts import Outcome, failed, run_in_process
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

from utils.clustering import choose_k
from utils.duplicates import duplicate_groups

N, CLASSES = 90, 6


def blobs(n_rows: int, n_classes: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Return unit rows around random centers, and the number of the center of each."""
    generator = np.random.default_rng(0)
    classes = np.sort(generator.integers(0, n_classes, n_rows))
    centers = generator.standard_normal((n_classes, 16))
    rows = centers[classes] + spread * generator.standard_normal((n_rows, 16))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), classes


@pytest.fixture
def file(tmp_path) -> Path:
    """Embeddings of images with classes, in blobs that overlap a little."""
    rows, classes = blobs(N, CLASSES, 0.5)
    listed = [(f"/photos/{row:02d}.jpg", f"class {c}", "", "", "") for row, c in enumerate(classes)]
    write_embeddings(tmp_path / "e.npy", rows, listed)
    return tmp_path / "e.npy"


def cluster(file: Path, *argv: object) -> Outcome:
    return run_in_process("cluster.py", "--embeddings", file, *argv)


def test_the_table_of_clusters(file):
    result = cluster(file, "--k", 4)
    assert (result.code, result.err) == (0, "")
    table = read_table(file.with_name("e_clusters.csv"))
    assert sorted(row["path"] for row in table) == [f"/photos/{n:02d}.jpg" for n in range(N)]
    rows = np.load(file)
    sizes = []
    for number in range(1, 5):
        members = [row for row in table if int(row["cluster"]) == number]
        sizes.append(len(members))
        assert [int(row["rank"]) for row in members] == list(range(1, len(members) + 1))
        own = rows[[int(row["path"][-6:-4]) for row in members]]
        distances = np.linalg.norm(own - own.mean(0), axis=1)
        printed = [float(row["distance"]) for row in members]
        np.testing.assert_allclose(printed, distances, atol=1e-4)
        assert (np.diff(distances) >= -1e-4).all()
    assert sizes == sorted(sizes, reverse=True)
    assert f"in 4 clusters of {sizes[-1]} to {sizes[0]}" in result.out


def test_agreement_with_classes(file):
    result = cluster(file, "--k", CLASSES)
    table = read_table(file.with_name("e_clusters.csv"))
    numbers = {row["path"]: int(row["cluster"]) for row in table}
    listed = read_table(file.with_suffix(".csv"))
    clusters = [numbers[row["path"]] for row in listed]
    classes = [row["class"] for row in listed]
    counts = Counter(zip(clusters, classes, strict=True))
    purity = sum(max(counts[n, name] for name in set(classes)) for n in set(clusters))
    nmi = normalized_mutual_info_score(classes, clusters)
    ami = adjusted_mutual_info_score(classes, clusters)
    expected = f"purity {100 * purity / N:.1f}, NMI {100 * nmi:.1f}, AMI {100 * ami:.1f}"
    assert f"agreement with 6 classes: {expected}" in result.out


@pytest.mark.parametrize("n_classes", [6, 20])
def test_as_many_clusters_as_are_stable(n_classes):
    rows, _ = blobs(900, n_classes, 0.3)
    k, stability = choose_k(rows)
    assert n_classes / 1.6 <= k <= 1.6 * n_classes
    assert stability[k] > stability[max(stability)] + 0.1


def test_automatic_number_is_said(file):
    result = cluster(file)
    assert result.code == 0 and "clusters; stability by number of clusters: 4 " in result.out


def test_links_and_sheet(tmp_path):
    photos = make_photos(tmp_path / "photos")
    network = ("--checkpoint_path", save_network(tmp_path / "net.pth"))
    file = tmp_path / "e.npy"
    assert run_in_process("embed.py", "--images", photos, *network, "--out", file).code == 0
    folder = tmp_path / "groups"
    result = cluster(file, "--k", 3, "--link", folder, "--sheet", tmp_path / "s.png")
    assert result.code == 0
    table = read_table(tmp_path / "e_clusters.csv")
    for row in table:
        links = (folder / row["cluster"]).iterdir()
        (link,) = (path for path in links if int(path.name.split("_")[0]) == int(row["rank"]))
        assert os.readlink(link) == row["path"] and link.exists()
    assert len(list(folder.rglob("*_*"))) == 12
    assert Image.open(tmp_path / "s.png").width >= 10 * 170
    failed(cluster(file, "--k", 3, "--link", folder), "is there already; name a new folder")
    failed(cluster(file, "--k", 13), "cannot make 13 clusters of 12 images")
    photo = photos / "cat/deep/01.png"
    content = photo.read_bytes()
    failed(cluster(file, "--k", 3, "--sheet", photo), "01.png: is one of the embedded images")
    query = ("--embeddings", file, "--query", photos / "cat/00.jpg", "--sheet", photo)
    failed(run_in_process("search.py", *query), "01.png: is one of the embedded images")
    assert photo.read_bytes() == content
    photo.rename(photos / "renamed.png")
    failed(cluster(file, "--k", 3, "--link", tmp_path / "new"), "01.png: no such file to link to")
    assert not (tmp_path / "new").exists()


def test_duplicate_groups():
    rows = np.random.default_rng(1).standard_normal((40, 16)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows = np.concatenate([rows, rows[[3, 3, 8]] + 1e-4, rows[:1]])
    contents = [str(number) for number in range(44)]
    contents[20] = contents[30]
    groups = duplicate_groups(rows, contents, 0.999)
    assert [group.tolist() for group in groups] == [[3, 40, 41], [0, 43], [8, 42], [20, 30]]
    assert duplicate_groups(rows, [""] * 44, 1.1) == []


def test_many_pairs_are_held_as_links(monkeypatch):
    rows = np.eye(7, dtype=np.float32)[np.random.default_rng(0).integers(0, 7, 300)]
    whole = [group.tolist() for group in duplicate_groups(rows, [""] * 300, 0.9)]
    monkeypatch.setattr("utils.duplicates.MOST_PAIRS", 50)
    monkeypatch.setattr("utils.duplicates.BLOCK", 16)
    assert [group.tolist() for group in duplicate_groups(rows, [""] * 300, 0.9)] == whole
    assert len(whole) == 7 and sum(map(len, whole)) == 300


def test_copies_of_photos(tmp_path):
    photos = make_photos(tmp_path / "photos")
    original = photos / "cat/deep/01.png"
    with Image.open(original) as photo:
        ImageOps.mirror(photo).save(photos / "mirrored.png")
        photo.resize((80, 60)).save(photos / "resized.webp", quality=95)
    shutil.copy(original, photos / "copy.png")
    network = ("--checkpoint_path", save_network(tmp_path / "net.pth"), "--flip_eval")
    file = tmp_path / "e.npy"
    assert run_in_process("embed.py", "--images", photos, *network, "--out", file).code == 0
    result = cluster(file, "--duplicates", 0.9999, "--out", tmp_path / "d.csv")
    assert result.code == 0 and "1 groups of 4 images, 3 beside the first ones" in result.out
    assert "frozen ones find more" in result.out
    kinds = {Path(row["path"]).name: row["kind"] for row in read_table(tmp_path / "d.csv")}
    copies = {"01.png": "first", "copy.png": "equal file"}
    assert kinds == copies | {"mirrored.png": "alike", "resized.webp": "alike"}
    folder = tmp_path / "groups"
    result = cluster(file, "--duplicates", 1, "--link", folder)
    assert result.code == 0 and folder.is_dir()
    with open(tmp_path / "e_duplicates.csv", newline="") as table:
        assert len(list(csv.reader(table))) >= 3


REFUSED = [
    ("--embeddings none.npy", "none.json: no such file"),
    ("--embeddings e.npy --k 0", "must be at least 1"),
    ("--embeddings e.npy --k many", "expected a whole number, got 'many'; or give auto"),
    ("--embeddings e.npy --k 3 --duplicates", "--k does not go with --duplicates"),
    ("--embeddings e --k 2 --out e.csv", "the name must end in .npy"),
    ("--embeddings e.npy --out e.csv", "would overwrite what --embeddings names"),
    ("--embeddings e.npy --k 2 --out other.csv", "belongs to the .npy file beside it"),
]


@pytest.mark.parametrize(("command", "message"), REFUSED)
def test_refused(file, monkeypatch, command, message):
    monkeypatch.chdir(file.parent)
    Path("other.npy").touch()
    failed(run_in_process("cluster.py", *command.split()), message)
