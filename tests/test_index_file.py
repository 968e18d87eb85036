"""search.py --index_file: an index that is built once, grows, and is refused if it does not fit."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from photos import make_photos, save_network
from scripts import Outcome, failed, run_in_process

from utils.embeddings import Embeddings
from utils.errors import UserError
from utils.index import Index
from utils.index_file import kept_index, row_keys

KINDS = ["ivf", "hnsw", "IVF4,PQ4x4", "PCA8,Flat"]
OPTIONS = {"nprobe": 1000, "ef_search": 1200}


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    rows = np.random.default_rng(0).standard_normal((900, 16)).astype(np.float32)
    rows[7] = rows[40] = rows[3]  # equal ones
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def kept(
    rows: np.ndarray, file: Path, kind: str | None = "hnsw", network: str = "net", **other: object
) -> tuple[Index, str]:
    facts = {"network_sha256": network, "source": hashlib.sha256(rows.tobytes()).hexdigest()}
    facts |= {"checkpoint": file.name, "flip_eval": False} | other
    np.save(file.with_suffix(".npy"), rows)
    return kept_index(Embeddings(file.with_suffix(".npy"), {}, facts), file, kind, **OPTIONS)


def assert_finds(index: Index, rows: np.ndarray, is_exact: bool) -> None:
    """The index finds of all rows nearly or just what exact search finds."""
    distances, numbers = index.search(rows, 4)
    expected, expected_numbers = Index(rows).search(rows, 4)
    own = np.linalg.norm(rows[numbers] - rows[:, None], axis=2)
    np.testing.assert_allclose(distances, own, atol=1e-5)
    if is_exact:
        np.testing.assert_allclose(distances, expected, atol=1e-5)
    shared = [len({*a} & {*b}) for a, b in zip(numbers, expected_numbers, strict=True)]
    assert np.mean(shared) > (3.9 if is_exact else 1.5)


@pytest.mark.parametrize("kind", KINDS)
def test_built_opened_grown_and_thinned(tmp_path, rows, kind):
    file = tmp_path / "photos.index"
    is_exact = kind in {"ivf", "hnsw"}
    order = np.random.default_rng(1).permutation(900)
    first = rows[np.sort(order[:800])]
    index, done = kept(first, file, kind)
    assert done == "built"
    assert_finds(index, first, is_exact)
    index, done = kept(first, file, None)
    assert (done, index.kind) == ("opened", kind)
    assert_finds(index, first, is_exact)
    mixed = rows[np.sort(order[50:])]  # 50 are gone, 100 lie between the others
    index, done = kept(mixed, file, kind)
    assert done == "opened, 100 rows added"
    assert_finds(index, mixed, is_exact)
    index, done = kept(mixed, file, None)
    assert done == "opened"
    assert_finds(index, mixed, is_exact)
    index, done = kept(rows[:500], file, None)
    assert done.startswith("built anew, as ")
    assert_finds(index, rows[:500], is_exact)


def test_exact_search_keeps_nothing(tmp_path, rows):
    index, done = kept(rows, tmp_path / "photos.index", None)
    assert done.startswith("not needed") and index.faiss is None
    assert [file.name for file in tmp_path.iterdir()] == ["photos.npy"]


def test_equal_rows_have_keys_of_their_own(rows):
    keys = row_keys(rows)
    assert len(np.unique(keys)) == 900
    assert keys["number"][[3, 7, 40]].tolist() == [0, 1, 2] and keys["number"].sum() == 3


def test_rows_of_the_same_images_by_other_settings(tmp_path, rows):
    file = tmp_path / "photos.index"
    kept(rows, file, source="same")
    turned = np.ascontiguousarray(rows[:, ::-1])
    assert kept(rows, file, source="same", checkpoint="moved")[1] == "opened"
    index, done = kept(turned, file, source="same", flip_eval=True)
    assert done == "built anew, as 900 rows are gone"
    assert_finds(index, turned, is_exact=True)
    assert kept(rows[:, :8].copy(), file, source="same", layers="last2")[1].startswith("built anew")


def test_what_does_not_fit_is_refused(tmp_path, rows):
    file = tmp_path / "photos.index"
    kept(rows, file, "hnsw")
    with pytest.raises(UserError, match="of another network"):
        kept(rows, file, network="other")
    with pytest.raises(UserError, match="an index of the kind hnsw"):
        kept(rows, file, "ivf")
    with pytest.raises(UserError, match="faiss cannot make an index 'PQ7' of 900 rows"):
        kept(rows, tmp_path / "other.index", "PQ7")
    assert not (tmp_path / "other.index").exists()
    older = Path(f"{file}.npz").read_bytes()
    kept(np.concatenate([rows, rows[:9] + 1]), file)
    Path(f"{file}.npz").write_bytes(older)  # as if killed between the two
    assert kept(rows, file)[1] == "built"
    file.unlink()
    assert kept(rows, file)[1] == "built"
    Path(f"{file}.npz").write_bytes(Path(f"{file}.npz").read_bytes()[:-30])
    with pytest.raises(UserError, match=r"not an index of search\.py; remove them"):
        kept(rows, file)
    file.unlink()
    with pytest.raises(UserError, match=r"not an index of search\.py; remove them"):
        kept(rows, file)  # nor are the keys, which may be a file of something else
    file.write_bytes(b"no index")
    with pytest.raises(UserError, match=r"not an index of search\.py; remove them"):
        kept(rows, file)


def search(place: Path, *argv: object) -> Outcome:
    index = ("--embeddings", place / "e.npy", "--index_file", place / "photos.index")
    return run_in_process("search.py", *index, *argv, "--device", "cpu")


def test_the_index_follows_the_photos(tmp_path):
    photos = make_photos(tmp_path / "photos")
    network = ("--checkpoint_path", save_network(tmp_path / "net.pth"))
    embed = ("--images", photos, *network, "--out", tmp_path / "e.npy")
    assert run_in_process("embed.py", *embed).code == 0
    query = photos / "cat/00.jpg"
    result = search(tmp_path, "--query", query, "--index", "hnsw")
    assert result.code == 0 and "photos.index: built" in result.out and "hnsw, 32" in result.out
    shutil.copytree(make_photos(tmp_path / "others", first=20) / "owl", photos / "more")
    assert run_in_process("embed.py", *embed).code == 0
    hits = tmp_path / "hits.json"
    result = search(tmp_path, "--query", photos / "more", "--k", 20, "--json", hits)
    assert result.code == 0 and "opened, 3 rows added" in result.out
    answers = json.loads(hits.read_text())
    assert [len(answer["hits"]) for answer in answers] == [14, 14, 14]
    failed(search(tmp_path, "--query", query, "--index", "IVF2,Flat"), "of the kind hnsw")
    failed(search(tmp_path, "--query", query, "--index", "tree"), "unknown name 'tree'")
