"""search.py: it finds the nearest images, measures its recall, and draws what it found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from photos import make_photos, read_table, save_network
from PIL import Image, ImageFont
from scripts import Outcome, failed, run_in_process

import utils.index
from datasets.images import find_images
from reports.sheets import FONTS, TILE, name_lines, thumbnail
from utils.errors import UserError
from utils.index import Index, approximate_neighbors, nearest_exactly

PNG = "photos/cat/deep/01.png"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Photos, a network and the embeddings of the photos."""
    folder = tmp_path_factory.mktemp("embedded")
    photos = make_photos(folder / "photos")
    checkpoint = save_network(folder / "net.pth", flip_eval=True)
    result = run_in_process(
        "embed.py", "--images", photos, "--checkpoint_path", checkpoint, "--out", folder / "e.npy"
    )
    assert result.code == 0
    return folder


def search(folder: Path, *argv: object) -> Outcome:
    file = folder / "e.npy"
    return run_in_process("search.py", "--embeddings", file, *argv, "--device", "cpu")


def test_hits_are_the_nearest_other_images(folder, tmp_path):
    photos = folder / "photos"
    queries = [photos / "owl", photos / "cat/00.jpg"]
    result = search(folder, "--query", *queries, "--k", 3, "--json", tmp_path / "hits.json")
    assert (result.code, result.err) == (0, "") and "12 images; exact search" in result.out
    rows = np.load(folder / "e.npy").astype(np.float64)
    paths = [row["path"] for row in read_table(folder / "e.csv")]
    answers = json.loads((tmp_path / "hits.json").read_text())
    expected = [*find_images(photos / "owl"), photos / "cat/00.jpg"]
    assert [answer["query"] for answer in answers] == list(map(str, expected))
    for answer in answers:
        row = paths.index(answer["query"])
        distances = np.linalg.norm(rows - rows[row], axis=1)
        nearest = [number for number in distances.argsort() if number != row][:3]
        assert [hit["path"] for hit in answer["hits"]] == [paths[number] for number in nearest]
        assert [hit["rank"] for hit in answer["hits"]] == [1, 2, 3]
        hit_distances = [hit["distance"] for hit in answer["hits"]]
        np.testing.assert_allclose(hit_distances, distances[nearest], atol=1e-5)
        for hit in answer["hits"]:
            line = f"   {hit['rank']}  {hit['distance']:.4f}  {hit['path']}\n"
            assert line in result.out


def test_a_query_is_itself_through_a_link_and_after_a_rename(folder, tmp_path):
    photos = tmp_path / "photos"
    shutil.copytree(folder / "photos", photos)
    embedded = ("--images", photos, "--checkpoint_path", folder / "net.pth")
    assert run_in_process("embed.py", *embedded, "--out", tmp_path / "e.npy").code == 0
    (tmp_path / "link").symlink_to(photos)
    places = [photos, tmp_path / "link"]
    for _ in range(2):
        for place in places:
            argv = ("--query", place / "cat/00.jpg", "--k", 12, "--json", tmp_path / "hits.json")
            assert search(tmp_path, *argv).code == 0
            hits = json.loads((tmp_path / "hits.json").read_text())[0]["hits"]
            assert len(hits) == 11 and hits[0]["distance"] > 0.01
        places = [photos.rename(tmp_path / "renamed")] if photos.exists() else []


def test_a_full_disk_names_the_file(folder, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    query = folder / "photos/cat/00.jpg"
    result = search(folder, "--query", query, "--sheet", tmp_path / "hits.png")
    failed(result, f"{tmp_path}/hits.png: No space left on device")


def test_unreadable_queries_may_be_left_out(folder, tmp_path):
    queries = (folder / "net.pth", tmp_path / "gone.jpg", folder / "photos/cat/00.jpg")
    result = search(folder, "--query", *queries, "--skip_bad")
    assert result.code == 0 and "net.pth: is not an image: left out" in result.out
    assert "gone.jpg: " in result.out


def test_twin_from_elsewhere(folder, tmp_path):
    """Its distance is zero, not what rounding in products of float32 leaves."""
    copy = tmp_path / "copy.jpg"
    copy.write_bytes((folder / "photos/dog/03.jpg").read_bytes())
    result = search(folder, "--query", copy, "--json", tmp_path / "hits.json")
    assert result.code == 0
    hits = json.loads((tmp_path / "hits.json").read_text())[0]["hits"]
    assert hits[0]["path"] == str(folder / "photos/dog/03.jpg") and hits[0]["distance"] < 1e-5
    assert len(hits) == 10


def test_contact_sheet(folder, tmp_path):
    query = folder / "photos/cat/00.jpg"
    sheet_file = tmp_path / "s.png"
    result = search(folder, "--query", query.parent, "--k", 11, "--sheet", sheet_file)
    assert result.code == 0
    sheet = np.array(Image.open(sheet_file))
    assert sheet.shape == (40 + 3 * 225, 12 * 170 + 30, 3)
    tile = np.array(thumbnail(str(query)))
    left = 10 + (160 - tile.shape[1]) // 2
    top = 40 + (160 - tile.shape[0]) // 2
    assert np.array_equal(sheet[top : top + tile.shape[0], left : left + tile.shape[1]], tile)
    last_hit = sheet[40:200, 20 + 11 * 170 : 180 + 11 * 170]
    assert (last_hit != 255).any() and (sheet[10:30] != 255).any()


def test_names_are_cut_into_two_lines():
    font = ImageFont.truetype(FONTS / "DejaVuSans.ttf", 13)
    assert name_lines("a.jpg", font) == ["a.jpg"]
    for name in ("photo_of_the_harbor_in_1987_1.jpg", "x" * 400 + ".jpg"):
        first, second = name_lines(name, font)
        assert name.startswith(first) and name.endswith(second.removeprefix("..."))
        assert max(font.getlength(line) for line in (first, second)) <= TILE


def test_thumbnail_of_a_row_of_an_array(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    np.save(tmp_path / "a_img.npy", images)
    assert np.array_equal(thumbnail(f"{tmp_path / 'a_img.npy'}#2"), images[2])
    assert thumbnail(f"{tmp_path / 'a_img.npy'}#3").size == (160, 160)  # a row that is not there


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_recall_of_an_approximate_index(kind):
    rows = np.random.default_rng(0).standard_normal((1200, 8)).astype(np.float32)
    poor = Index(rows, kind, nprobe=1, ef_search=1)
    good = Index(rows, kind, nprobe=1000, ef_search=1200)
    share, n_queries = poor.recall(5)
    assert n_queries == 1000 and share < 0.9 < 0.999 < good.recall(5)[0] <= 1
    drawn = np.random.default_rng(0).permutation(1200)[:1000]
    hits = 0
    for query, numbers in zip(drawn, poor.search(rows[drawn], 6)[1], strict=True):
        order = np.square(rows - rows[query]).sum(1).argsort(kind="stable")
        hits += len(set(order[1:6]) & set(numbers))
    assert share == pytest.approx(hits / 5000, abs=1e-3)
    for values, expected in zip(
        good.search(rows[:7], 4), Index(rows).search(rows[:7], 4), strict=True
    ):
        assert np.array_equal(values, expected)


def test_what_codes_round_is_sorted_by_the_rows():
    rows = np.random.default_rng(0).standard_normal((1200, 8)).astype(np.float32)
    index = Index(rows, "PQ4x4")
    distances, numbers = index.search(rows[:50], 5)
    expected = Index(rows).search(rows[:50], 5)
    codes = index.faiss.search(rows[:50], 5)[1]

    def found(numbers: np.ndarray) -> int:
        return sum(len(set(a) & set(b)) for a, b in zip(numbers, expected[1], strict=True))

    assert found(codes) < 0.7 * 250 and found(numbers) > 0.9 * 250
    is_found = numbers == expected[1]
    assert np.array_equal(distances[is_found], expected[0][is_found])


def test_exact_search_in_blocks(monkeypatch):
    rows = np.random.default_rng(0).standard_normal((299, 8)).astype(np.float16)
    queries = rows[::7].astype(np.float32)
    expected = Index(rows).search(queries, 5)[1]
    monkeypatch.setattr(utils.index, "BLOCK", 148)  # the last block has fewer rows than asked for
    assert np.array_equal(nearest_exactly(rows, queries, 5), expected)


def test_approximate_neighbors():
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((40, 8))[rng.integers(0, 40, 3000)]
    rows = (centers + 0.3 * rng.standard_normal((3000, 8))).astype(np.float32)
    rows[7] = rows[8]  # twins
    numbers = approximate_neighbors(rows, 4)
    assert (numbers != np.arange(3000)[:, None]).all()
    expected = nearest_exactly(rows, rows, 5)[:, 1:]
    shared = [len(set(a) & set(b)) for a, b in zip(numbers, expected, strict=True)]
    assert sum(shared) > 0.97 * 4 * 3000
    few = approximate_neighbors(np.repeat(rows[:20], 10, 0), 30, nprobe=1)
    assert few.shape == (200, 30) and few.min() >= 0  # where a cell holds no more: the row itself


def test_approximate_search(folder):
    query = folder / "photos/cat"
    result = search(folder, "--query", query, "--k", 2, "--index", "hnsw")
    assert result.code == 0
    assert "recall@2 against exact search: 100.00 % (on 12 of the images)" in result.out
    result = search(folder, "--query", query, "--index", "ivf", "--nprobe", 1)
    assert result.code == 0 and "ivf, 1 cells, 1 looked into" in result.out


def test_an_effort_that_the_kept_index_does_not_read(folder, tmp_path):
    words = ("--query", folder / "photos/cat", "--index_file", tmp_path / "photos.index")
    assert search(folder, *words, "--index", "hnsw").code == 0
    failed(search(folder, *words, "--nprobe", 1), "--nprobe goes with --index ivf")


def test_without_faiss(monkeypatch):
    monkeypatch.setattr(utils.index, "faiss", None)
    with pytest.raises(UserError, match="needs faiss"):
        Index(np.ones((2, 2), np.float32))


def test_moved_and_changed_networks(folder, tmp_path):
    for name in ("e.npy", "e.csv"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    facts = json.loads((folder / "e.json").read_text())
    gone = tmp_path / "gone.pth"
    (tmp_path / "e.json").write_text(json.dumps(facts | {"checkpoint": str(gone)}))
    row = folder / "photos/cat/00.jpg"
    assert search(tmp_path, "--query", row).code == 0  # its embedding is there
    query = make_photos(tmp_path / "others", first=20) / "cat/00.jpg"
    failed(search(tmp_path, "--query", query), "gone.pth: no such file", "--checkpoint_path or")
    moved = search(tmp_path, "--query", query, "--checkpoint_path", folder / "net.pth")
    assert moved.code == 0
    refused = search(tmp_path, "--query", query, "--weights", folder / "net.pth")
    failed(refused, f"net.pth: the checkpoint {gone} made the embeddings")
    save_network(gone, seed=6)
    failed(search(tmp_path, "--query", query), "gone.pth: is not the network that made")
    (tmp_path / "e.npy").write_bytes((tmp_path / "e.npy").read_bytes()[:-200])
    failed(search(tmp_path, "--query", query), "e.npy: not a .npy array, or truncated")


def test_a_query_with_a_copy_is_itself_after_a_rename(tmp_path):
    photos = make_photos(tmp_path / "photos")
    shutil.copy(photos / "cat/00.jpg", photos / "a copy.jpg")
    network = ("--checkpoint_path", save_network(tmp_path / "net.pth"))
    embedded = ("--images", photos, *network, "--out", tmp_path / "e.npy")
    assert run_in_process("embed.py", *embedded).code == 0
    renamed = photos.rename(tmp_path / "renamed")
    for query, copy in (("cat/00.jpg", "a copy.jpg"), ("a copy.jpg", "cat/00.jpg")):
        argv = ("--query", renamed / query, "--k", 1, "--json", tmp_path / "hits.json")
        result = search(tmp_path, *argv)
        assert result.code == 0 and "1 of these images are no longer there" in result.out
        (hit,) = json.loads((tmp_path / "hits.json").read_text())[0]["hits"]
        assert hit["path"] == str(photos / copy)


REFUSED = [
    ("--embeddings e.npy --query photos --index IDMap,Flat", "faiss cannot make an index"),
    ("--embeddings e.npy", "required: --query"),
    ("--embeddings none.npy --query a.jpg", "none.json: no such file; make it with embed.py"),
    ("--embeddings e.npy --query a.jpg --nprobe 3", "--nprobe goes with --index ivf"),
    ("--embeddings e.npy --query a.jpg --sheet s.jpg", "must end in .png"),
    ("--embeddings e.npy --query photos --json e.json", "belongs to the embeddings e.npy"),
    (
        "--embeddings e.npy --query photos/cat/deep/01.png --sheet photos/cat/deep/01.png",
        "what --query names",
    ),
    ("--embeddings e.npy --query photos --sheet photos/cat/deep/01.png", "what --query names"),
    ("--embeddings e.npy --query nowhere.jpg", "nowhere.jpg: no such file"),
    ("--embeddings e.npy --query net.pth", "net.pth: is not an image; leave it out, or give"),
    ("--embeddings e.npy --query net.pth --skip_bad", "none of the images can be read"),
]


@pytest.mark.parametrize(("command", "message"), REFUSED)
def test_refused(folder, monkeypatch, command, message):
    monkeypatch.chdir(folder)
    failed(run_in_process("search.py", *command.split()), message)
