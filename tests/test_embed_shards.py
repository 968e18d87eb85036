"""Embeddings by several processes: what they write is what one process writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from photos import make_photos, save_network
from scripts import Outcome, failed, run_in_process

from embedder import Embedder
from utils.embedding_store import EmbeddingStore
from utils.signals import Stopped, StopRequest

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Twelve photos, a network, and the embeddings that one process makes."""
    folder = tmp_path_factory.mktemp("shards")
    make_photos(folder / "photos")
    save_network(folder / "net.pth")
    assert embed(folder, folder / "whole.npy").code == 0
    return folder


def options(made: Path, out: Path) -> list[object]:
    network = ["--checkpoint_path", made / "net.pth", "--device", "cpu", "--test_batch", 2]
    return ["--images", made / "photos", "--out", out, *network]


def embed(made: Path, out: Path, *words: object) -> Outcome:
    return run_in_process("embed.py", *options(made, out), *words)


def assert_as_one_process(made: Path, out: Path) -> None:
    """The three files are those of one process, bit for bit, and nothing else is left."""
    for kind in ("npy", "csv", "json"):
        expected = (made / "whole.npy").with_suffix(f".{kind}").read_bytes()
        assert out.with_suffix(f".{kind}").read_bytes() == expected
    assert sorted(path.name for path in out.parent.iterdir()) == ["e.csv", "e.json", "e.npy"]


@pytest.mark.parametrize("count", [1, 4, 9])
def test_shards_are_joined(made, tmp_path, monkeypatch, count):
    out = tmp_path / "e.npy"
    for number in range(count, 0, -1):  # in any order
        assert embed(made, out, "--shard", f"{number}/{count}").code == 0
    monkeypatch.setattr(Embedder, "embed_crops", None)  # all rows are known
    assert embed(made, out).code == 0
    assert_as_one_process(made, out)


def test_processes_join_their_shards(made, tmp_path, forks):
    (tmp_path / "out").mkdir()
    out = tmp_path / "out/e.npy"
    done = forks.run(*options(made, out), script="embed.py", processes=2)
    assert done.code == 0, done.err
    assert "e.npy: shard 1 of 2: 6 images" in done.out and "e.npy: 12 rows" in done.out
    assert_as_one_process(made, out)


def test_a_stopped_shard_goes_on(made, tmp_path, monkeypatch):
    calls = []

    def check(self: StopRequest) -> None:
        calls.append(self)
        if len(calls) == 4:  # two at the ends of the loading, then one for each batch
            raise Stopped(15)

    out = tmp_path / "e.npy"
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "check", check)
        assert embed(made, out, "--shard", "1/2").code == 143
    assert "goes on; 4 images have a row already" in embed(made, out, "--shard", "1/2").out
    with monkeypatch.context() as patch:
        patch.setattr(Embedder, "embed_crops", None)  # all rows are known
        assert embed(made, out, "--shard", "1/2").code == 0
    assert embed(made, out).code == 0  # the other half is embedded now
    assert_as_one_process(made, out)


def test_shards_of_another_count_and_an_earlier_file_are_taken_over(made, tmp_path, monkeypatch):
    out = tmp_path / "e.npy"
    assert embed(made, out, "--shard", "1/2").code == 0
    copy_whole(made, out, source="before a photo was added")
    monkeypatch.setattr(Embedder, "embed_crops", None)
    result = embed(made, out, "--shard", "2/3")
    assert result.code == 0 and "shard 2 of 3: 4 images" in result.out
    result = embed(made, out)
    assert result.code == 0 and "e.npy: 12 kept" in result.out
    assert_as_one_process(made, out)


def test_a_shard_takes_what_other_shards_have(made, tmp_path, monkeypatch):
    out = tmp_path / "e.npy"
    for number in (1, 2):
        assert embed(made, out, "--shard", f"{number}/2").code == 0
    monkeypatch.setattr(Embedder, "embed_crops", None)
    for number in (1, 2, 3):
        assert embed(made, out, "--shard", f"{number}/3").code == 0
    assert embed(made, out).code == 0
    assert_as_one_process(made, out)


def test_shards_that_overwrite(made, tmp_path, monkeypatch):
    """Shards of another network go; those of this one are not made twice."""
    out = tmp_path / "e.npy"
    save_network(tmp_path / "other.pth", seed=6)
    words = ["--images", made / "photos", "--out", out, "--device", "cpu", "--test_batch", 2]
    other = [*words, "--checkpoint_path", tmp_path / "other.pth"]
    for shard in ("1/2", "1/3"):
        assert run_in_process("embed.py", *other, "--shard", shard).code == 0
    failed(embed(made, out, "--shard", "1/2"), "network_sha256 was")
    assert embed(made, out, "--shard", "1/2", "--overwrite").code == 0
    with monkeypatch.context() as patch:
        patch.setattr(Embedder, "embed_crops", None)
        assert embed(made, out, "--shard", "1/2", "--overwrite").code == 0
    assert embed(made, out, "--overwrite").code == 0
    (tmp_path / "other.pth").unlink()
    assert_as_one_process(made, out)


def test_a_folder_that_changes_between_shards_and_join(made, tmp_path):
    folder = tmp_path / "place"
    shutil.copytree(made, folder)
    out = folder / "e.npy"
    bad = folder / "photos/bad.jpg"
    bad.write_bytes(b"no image")
    assert embed(folder, out, "--shard", "1/2", "--skip_bad", "--half").code == 0
    make_photos(folder / "photos/aa", first=30)
    assert embed(folder, out, "--shard", "2/2", "--skip_bad", "--half").code == 0
    result = embed(folder, out, "--skip_bad", "--half")
    assert result.code == 0 and "24 rows" in result.out and "1 unreadable" in result.out
    assert embed(folder, folder / "scratch.npy", "--skip_bad", "--half").code == 0
    rows = np.load(out)
    assert rows.dtype == np.float16
    np.testing.assert_allclose(rows, np.load(folder / "scratch.npy"), atol=1e-3)
    assert out.with_suffix(".csv").read_bytes() == (folder / "scratch.csv").read_bytes()
    assert not list(folder.glob("e.parts*"))


def copy_whole(made: Path, out: Path, **facts: object) -> None:
    """Put the finished files under another name, with some facts changed."""
    for kind in ("npy", "csv"):
        shutil.copy((made / "whole.npy").with_suffix(f".{kind}"), out.with_suffix(f".{kind}"))
    whole = json.loads((made / "whole.json").read_text())
    out.with_suffix(".json").write_text(json.dumps(whole | facts))


def test_refused(made, tmp_path, monkeypatch):
    out = tmp_path / "e.npy"
    for text in ("0/4", "5/4", "1", "a/b", "1/0"):
        failed(embed(made, out, "--shard", text), "expected I/N, such as 1/4 to 4/4", text)
    network = ["--checkpoint_path", made / "net.pth"]
    words = ["--dataset", "glyphs", "--out", out, *network]
    failed(run_in_process("embed.py", *words, "--shard", "1/2"), "--shard goes with --images")
    monkeypatch.setenv("WORLD_SIZE", "2")
    failed(run_in_process("embed.py", *words), "torchrun goes with --images")
    monkeypatch.undo()
    assert embed(made, out, "--shard", "1/2").code == 0
    with EmbeddingStore(out, {"dtype": "float32"}, is_shared=True, overwrite=True):
        failed(embed(made, out), "e.npy: another process is writing it")
    chunks = list((tmp_path / "e.parts").iterdir())
    save_network(tmp_path / "other.pth", seed=6)
    other = ["--checkpoint_path", tmp_path / "other.pth"]
    result = run_in_process("embed.py", "--images", made / "photos", "--out", out, *other)
    failed(result, "network_sha256 was", "overwrite it")
    assert list((tmp_path / "e.parts").iterdir()) == chunks and len(chunks) == 3


def test_a_finished_file_leaves_shards_of_another_network_alone(made, tmp_path):
    out = tmp_path / "e.npy"
    assert embed(made, out).code == 0
    save_network(tmp_path / "other.pth", seed=6)
    words = ["--images", made / "photos", "--out", out, "--device", "cpu", "--shard", "1/2"]
    other = ["--checkpoint_path", tmp_path / "other.pth", "--overwrite"]
    assert run_in_process("embed.py", *words, *other).code == 0
    assert "is complete already" in embed(made, out).out
    assert len(list((tmp_path / "e.parts").iterdir())) == 3
