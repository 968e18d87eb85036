"""Embeddings of a folder that has changed: known rows stay, whatever happened to the files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from photos import make_photos, read_table, save_network
from raw_folders import save_photo
from scripts import Outcome, failed, run_in_process

from embedder import Embedder
from utils.signals import Stopped, StopRequest


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with twelve photos in photos/, others in others/, and a network."""
    make_photos(tmp_path / "photos")
    make_photos(tmp_path / "others", first=20)
    save_network(tmp_path / "net.pth")
    return tmp_path


@pytest.fixture
def embedded(monkeypatch) -> list[int]:
    """How many images the network saw, a number for each batch."""
    counts: list[int] = []
    embed_crops = Embedder.embed_crops

    def counted(self: Embedder, crops: object) -> np.ndarray:
        counts.append(len(crops))
        return embed_crops(self, crops)

    monkeypatch.setattr(Embedder, "embed_crops", counted)
    return counts


def embed(place: Path, out: str = "e.npy", photos: str = "photos", *words: object) -> Outcome:
    network = ("--checkpoint_path", place / "net.pth", "--device", "cpu", "--test_batch", 4)
    images = ("--images", place / photos, "--out", place / out)
    return run_in_process("embed.py", *images, *network, *words)


def assert_as_from_scratch(place: Path, photos: str = "photos") -> None:
    """The files are those that a first run would write, and nothing else is left."""
    assert embed(place, "scratch.npy", photos, "--overwrite").code == 0
    rows = np.load(place / "e.npy")
    np.testing.assert_allclose(rows, np.load(place / "scratch.npy"), atol=1e-6)
    assert np.abs(np.diff(rows, axis=0)).max() > 0.01
    assert read_table(place / "e.csv") == read_table(place / "scratch.csv")
    assert sorted(path.name for path in place.glob("e.*")) == ["e.csv", "e.json", "e.npy"]


def change(place: Path) -> None:
    """Add three photos, change, rename, touch and remove one each, add an exact copy."""
    photos = place / "photos"
    shutil.copytree(place / "others/owl", photos / "new")
    shutil.copy(place / "others/cat/00.jpg", photos / "cat/00.jpg")
    (photos / "dog/03.jpg").rename(photos / "first.jpg")
    os.utime(photos / "rat/09.jpg", ns=(1, 1))
    (photos / "cat/02.JPEG").unlink()
    shutil.copy(photos / "owl/06.jpg", photos / "owl/copy.jpg")


def test_a_folder_that_changed(place, embedded):
    assert embed(place).code == 0
    assert embedded == [4, 4, 4]
    change(place)
    embedded.clear()
    result = embed(place)
    assert result.code == 0 and sum(embedded) == 4
    assert "e.npy: 3 new, 1 changed, 2 renamed or copied, 9 kept, 1 gone\n" in result.out
    assert_as_from_scratch(place)
    embedded.clear()
    assert "is complete already, 15 rows" in embed(place).out and embedded == []


def test_another_folder_with_a_photo_in_common(place):
    assert embed(place).code == 0
    shutil.copy(place / "photos/cat/00.jpg", place / "others/copy.jpg")
    before = (place / "e.npy").read_bytes()
    failed(embed(place, "e.npy", "others"), "folder was", "overwrite it", script="embed.py")
    assert (place / "e.npy").read_bytes() == before
    assert embed(place, "e.npy", "others", "--overwrite").code == 0


def test_a_link_to_a_photo_of_the_folder_is_no_photo_more(place, caplog):
    (place / "photos/a_link.jpg").symlink_to(place / "photos/cat/00.jpg")
    (place / "photos/from_elsewhere.jpg").symlink_to(place / "others/cat/00.jpg")
    (place / "photos/a_folder").symlink_to(place / "photos/cat")
    assert embed(place).code == 0
    paths = [Path(row["path"]) for row in read_table(place / "e.csv")]
    assert len(paths) == 13 and place / "photos/from_elsewhere.jpg" in paths
    assert place / "photos/cat/00.jpg" in paths
    assert "1 links to images that are here themselves are left out" in caplog.text


def test_a_folder_that_was_renamed(place, embedded):
    assert embed(place).code == 0
    (place / "photos").rename(place / "album")
    save_photo(place / "album/a.png", 90, size=(31, 17))
    embedded.clear()
    failed(embed(place, "e.npy", "album"), "folder was", "overwrite it")
    result = embed(place, "e.npy", "album", "--overwrite")  # rows of the same images are kept
    assert result.code == 0 and sum(embedded) == 1 and "1 new, 12 renamed" in result.out
    assert_as_from_scratch(place, "album")


@pytest.mark.parametrize("is_finished", [True, False])
def test_stopped_and_changed_again(place, embedded, monkeypatch, is_finished):
    """What a stopped run had embedded is not embedded again, though the folder changed since."""
    if is_finished:
        assert embed(place).code == 0
        change(place)
    checks = []

    def check(self: StopRequest) -> None:
        checks.append(self)
        if len(checks) == 4:  # two at the ends of the loading, then one for each batch
            raise Stopped(2)

    embedded.clear()
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "check", check)
        assert embed(place).code == 130
    stopped_with = sum(embedded)
    assert (place / "e.npy").exists() == is_finished
    shutil.copytree(place / "others/rat", place / "photos/more")
    assert embed(place).code == 0
    n_new = 3 + (4 if is_finished else 12)
    assert stopped_with > 0 and sum(embedded) == n_new
    assert_as_from_scratch(place)


def test_a_copy_that_goes_is_counted(place):
    shutil.copy(place / "photos/cat/00.jpg", place / "photos/copy.jpg")
    assert embed(place).code == 0
    (place / "photos/copy.jpg").unlink()
    (place / "photos/cat/00.jpg").rename(place / "photos/renamed.jpg")
    result = embed(place)
    assert "1 renamed or copied, 11 kept, 1 gone" in result.out
