"""embed.py: what it writes, what it refuses, and that it goes on after every kind of end."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from photos import SIZE, make_photos, read_table, save_network
from PIL import Image
from scripts import ROOT, Outcome, failed, run_in_process
from torch.nn import functional as F

import utils.embedding_store
from datasets.images import decode_image, find_images
from embedder import Embedder
from models import Pooling, build_model, load_checkpoint
from utils.embedding_store import EmbeddingStore
from utils.embeddings import open_embeddings
from utils.errors import UserError
from utils.signals import Stopped, StopRequest

CROP = slice(2, 30)  # the center of 32 pixels
FACTS = {"dimension": 4, "dtype": "float32", "source": "a"}
LISTED = ("a.jpg", "", 1, 2, "00")


@pytest.fixture
def photos(tmp_path) -> Path:
    return make_photos(tmp_path / "photos")


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return save_network(tmp_path / "net.pth")


def embed(*argv: object) -> Outcome:
    return run_in_process("embed.py", *argv, "--device", "cpu")


def features(model: torch.nn.Module, images: np.ndarray, flip: bool = False) -> tuple:
    """Compute pooled features and embedding of images (N, 32, 32, 3)."""
    crops = torch.from_numpy(images[:, CROP, CROP].copy())
    with torch.no_grad():
        return model.eval().features(model.normalization(crops), flip)


def squares(photos: Path) -> np.ndarray:
    return np.stack([decode_image(path, SIZE) for path in find_images(photos)])


def assert_same_files(file: Path, expected: Path) -> None:
    for kind in (".npy", ".csv"):
        assert file.with_suffix(kind).read_bytes() == expected.with_suffix(kind).read_bytes()
    assert not list(file.parent.glob(f"{file.stem}*.part*"))


def test_embedding_of_a_folder(photos, checkpoint, tmp_path):
    out = tmp_path / "e.npy"
    result = embed("--images", photos, "--checkpoint_path", checkpoint, "--out", out)
    assert (result.code, result.err) == (0, "") and "12 rows of 12, float32" in result.out
    rows = np.load(out)
    model, _ = load_checkpoint(checkpoint)
    np.testing.assert_allclose(rows, features(model, squares(photos))[1], atol=1e-6)
    assert np.abs(np.diff(rows, axis=0)).max() > 0.01  # the comparison can tell rows apart
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    paths = [str(path) for path in find_images(photos)]
    assert [row["path"] for row in read_table(tmp_path / "e.csv")] == paths
    facts = json.loads((tmp_path / "e.json").read_text())
    assert facts["checkpoint"] == str(checkpoint) and facts["image_size"] == SIZE
    assert (facts["rows"], facts["dimension"], facts["unreadable"]) == (12, 12, [])


@pytest.mark.parametrize("split", ["all", "validation"])
def test_pooled_features_of_a_data_set(tmp_path, checkpoint, split):
    """A batch may begin in one half and end in the other."""
    folder = tmp_path / "data" / "mine"
    folder.mkdir(parents=True)
    halves = {}
    for name, count in (("training", 6), ("validation", 5)):
        images = np.random.default_rng(count).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)
        halves[name] = images
        np.save(folder / f"{name}_mine_{SIZE}resized_img.npy", images)
        np.save(folder / f"{name}_mine_{SIZE}resized_label.npy", np.arange(count) // 2)
    listed = [(f"/photos/{number}.jpg", "owl") for number in range(5)]
    table = "path,class\n" + "".join(f"{path},{name}\n" for path, name in listed)
    (folder / f"validation_mine_{SIZE}resized_paths.csv").write_text(table)

    data = ["--dataset", "mine", "--data_dir", tmp_path / "data", "--split", split]
    network = ["--backbone", "resnet_small", "--weights", checkpoint, "--test_batch", 4]
    assert embed(*data, *network, "--out", tmp_path / "e.npy").code == 0
    images = halves["validation"]
    if split == "all":
        images = np.concatenate(list(halves.values()))
        file = folder / f"training_mine_{SIZE}resized_img.npy"
        listed = [(f"{file}#{row}", str(row // 2)) for row in range(6)] + listed
    pooled, _ = features(build_model("resnet_small", weights=checkpoint), images)
    np.testing.assert_allclose(np.load(tmp_path / "e.npy"), F.normalize(pooled), atol=1e-6)
    rows = read_table(tmp_path / "e.csv")
    assert [(row["path"], row["class"]) for row in rows] == listed


def test_layers_pool_mirror_image_and_half(photos, checkpoint, tmp_path):
    network = ["--backbone", "resnet_small", "--weights", checkpoint, "--image_size", SIZE]
    options = ["--layers", "layer2,layer3", "--pool", "gem,max", "--flip_eval", "--half"]
    out = tmp_path / "e.npy"
    assert embed("--images", photos, *network, *options, "--out", out).code == 0
    pooling = Pooling.parse("layer2,layer3", "gem,max", False)
    model = build_model("resnet_small", weights=checkpoint, pooling=pooling)
    pooled, _ = features(model, squares(photos), flip=True)
    rows = np.load(out)
    assert rows.dtype == np.float16 and rows.shape == (12, 64 + 128)
    np.testing.assert_allclose(rows, F.normalize(pooled), atol=1e-3)
    result = embed("--images", photos, *network, "--flip_eval", "--half", "--out", out)
    failed(result, "layers was layer2,layer3 and is None", "overwrite")


def test_mirror_image_as_in_training(tmp_path):
    checkpoint = save_network(tmp_path / "flipped.pth", flip_eval=True)
    assert Embedder(checkpoint).flip and not Embedder(checkpoint, flip=False).flip
    assert not Embedder(save_network(tmp_path / "plain.pth")).flip


def test_stopped_it_goes_on_to_the_same_files(photos, checkpoint, tmp_path, monkeypatch):
    command = ["--images", photos, "--checkpoint_path", checkpoint, "--test_batch", 2]
    assert embed(*command, "--out", tmp_path / "whole.npy").code == 0
    calls = []

    def check(self: StopRequest) -> None:
        calls.append(self)
        if len(calls) == 5:  # two at the ends of the loading, then one for each batch
            raise Stopped(2)

    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "check", check)
        stopped = embed(*command, "--out", tmp_path / "e.npy")
    assert stopped.code == 130 and "the same command goes on" in stopped.out
    assert not (tmp_path / "e.npy").exists()
    result = embed(*command, "--out", tmp_path / "e.npy")
    assert result.code == 0 and "goes on; 6 images have a row already" in result.out
    assert_same_files(tmp_path / "e.npy", tmp_path / "whole.npy")


@pytest.mark.slow
@pytest.mark.parametrize("save_every", [0, 1000])
def test_killed_it_goes_on_to_the_same_files(photos, checkpoint, tmp_path, save_every):
    """What was saved is not made again, what was not saved is."""
    command = ["--images", photos, "--checkpoint_path", checkpoint, "--test_batch", 2]
    assert embed(*command, "--out", tmp_path / "whole.npy").code == 0
    program = f"""
import os, sys, embed, utils.embedding_store
utils.embedding_store.SAVE_EVERY = {save_every}
embed.refuse_unreadable = lambda crops: "06.jpg" in crops.listed[0][0] and os.kill(os.getpid(), 9)
embed.main(sys.argv[1:])
"""
    out = tmp_path / "e.npy"
    argv = [sys.executable, "-c", program, *map(str, command), "--out", out, "--device", "cpu"]
    assert subprocess.run(argv, cwd=ROOT).returncode == -9
    result = embed(*command, "--out", out)
    assert result.code == 0 and ("goes on; 6 images" in result.out) == (save_every == 0)
    assert_same_files(out, tmp_path / "whole.npy")


def test_full_disk(tmp_path):
    """The message says so, and what was saved before stays, whatever was in the buffers."""
    rows = np.random.default_rng(0).standard_normal((100, 4)).astype(np.float32)
    listed = [(f"{number} long name " * 90, *LISTED[1:]) for number in range(100)]
    with EmbeddingStore(tmp_path / "e.npy", FACTS) as store:
        store.add(rows, listed)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, limits[1]))
    try:
        message = r"e\.npy: cannot be written .*make room"
        with (
            pytest.raises(UserError, match=message),
            EmbeddingStore(tmp_path / "e.npy", FACTS) as store,
        ):
            store.add(rows, listed)
            store.add(rows, listed)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with EmbeddingStore(tmp_path / "e.npy", FACTS) as store:
        known = store.known_rows()
        assert len(known) == 100
        found = [known.unchanged(listed[row][0], 1, 2)[1] for row in range(100)]
    assert np.array_equal(found, rows)


@pytest.mark.parametrize("number", range(4))
def test_killed_while_the_file_gets_its_name(tmp_path, monkeypatch, number):
    """Once all rows are joined, the next start gives them their names."""
    store = EmbeddingStore(tmp_path / "e.npy", FACTS)
    store.join([(np.ones((1, 4)), [LISTED], [])])
    store = EmbeddingStore(tmp_path / "e.npy", FACTS | {"source": "b"})
    moves = []

    def move(source: Path, target: Path) -> None:
        if len(moves) == number:
            sys.exit("killed")
        moves.append(target)
        shutil.move(source, target)

    def publish() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", move)
            EmbeddingStore._publish(store)

    monkeypatch.setattr(store, "_publish", publish)
    rows = [(np.zeros((1, 4)), [LISTED], [])]
    if number < 3:
        with pytest.raises(SystemExit):
            store.join(rows)
        with pytest.raises(UserError, match="unfinished"):
            open_embeddings(tmp_path / "e.npy")
    else:
        store.join(rows)
    store._lock.release()  # as the system does
    with EmbeddingStore(tmp_path / "e.npy", FACTS | {"source": "b"}) as again:
        assert again.is_complete
    assert np.array_equal(open_embeddings(tmp_path / "e.npy").rows, np.zeros((1, 4)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.csv", "e.json", "e.npy"]


def test_killed_while_a_chunk_is_written(tmp_path, monkeypatch):
    """A chunk whose facts are missing does not count."""

    def killed(path: Path, content: object) -> None:
        sys.exit("killed")

    monkeypatch.setattr(utils.embedding_store, "write_json", killed)
    with pytest.raises(SystemExit), EmbeddingStore(tmp_path / "e.npy", FACTS) as store:
        store.add(np.ones((1, 4)), [LISTED])
    monkeypatch.undo()
    assert len(list((tmp_path / "e.parts").iterdir())) == 2
    with EmbeddingStore(tmp_path / "e.npy", FACTS) as store:
        assert len(store.known_rows()) == 0
        store.join([(np.ones((1, 4)), [LISTED], [])])
    assert not (tmp_path / "e.parts").exists()


def test_chunks_of_another_network(tmp_path):
    with EmbeddingStore(tmp_path / "e.npy", FACTS) as store:
        store.add(np.ones((1, 4)), [LISTED])
    other = FACTS | {"dtype": "float16"}
    message = "dtype was float32 and is float16; choose another name, or overwrite it"
    with (
        pytest.raises(UserError, match=message),
        EmbeddingStore(tmp_path / "e.npy", other) as store,
    ):
        store.known_rows()
    with EmbeddingStore(tmp_path / "e.npy", other, overwrite=True) as store:
        assert len(store.known_rows()) == 0
        store.add(np.ones((1, 4)), [LISTED])
    with EmbeddingStore(tmp_path / "e.npy", other, overwrite=True) as store:
        assert len(store.known_rows()) == 1  # an interrupted overwriting goes on


def test_more_chunks_than_a_process_may_open(tmp_path, monkeypatch):
    monkeypatch.setattr(utils.embedding_store, "SAVE_EVERY", 0)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    names = [f"{number}.jpg" for number in range(120)]
    with EmbeddingStore(tmp_path / "e.npy", FACTS) as store:
        for number, name in enumerate(names):
            store.add(np.full((1, 4), number), [(name, *LISTED[1:])])
        n_open = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (n_open + 90, limits[1]))
        try:
            known = store.known_rows()
            rows = [known.unchanged(name, 1, 2)[1][0] for name in names]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert rows == list(range(120))


def test_one_writer_at_a_time(tmp_path):
    with EmbeddingStore(tmp_path / "e.npy", FACTS):
        for is_shared in (True, False):
            with pytest.raises(UserError, match="another process is writing it"):
                EmbeddingStore(tmp_path / "e.npy", FACTS, is_shared=is_shared)
    with EmbeddingStore(tmp_path / "e.npy", FACTS, is_shared=True):
        EmbeddingStore(tmp_path / "e.npy", FACTS, is_shared=True).close()
        with pytest.raises(UserError, match="another process is writing it"):
            EmbeddingStore(tmp_path / "e.npy", FACTS)
    EmbeddingStore(tmp_path / "e.npy", FACTS).close()
    assert not list(tmp_path.iterdir())


def test_finished_files(photos, checkpoint, tmp_path):
    """The same command makes nothing again; another network and other images need --overwrite."""
    out = tmp_path / "e.npy"
    command = ["--images", photos, "--out", out, "--checkpoint_path"]
    assert embed(*command, checkpoint).code == 0
    times = os.stat(out).st_mtime_ns
    result = embed(*command, checkpoint)
    assert result.code == 0 and "is complete already, 12 rows" in result.out
    assert os.stat(out).st_mtime_ns == times
    other = save_network(tmp_path / "other.pth", seed=6)
    failed(embed(*command, other), "network_sha256 was", "overwrite it")
    assert embed(*command, other, "--overwrite").code == 0
    others = make_photos(tmp_path / "others", first=20)
    failed(embed("--images", others, *command[2:], other), "folder was", "overwrite it")
    assert sorted(path.name for path in tmp_path.glob("e.*")) == ["e.csv", "e.json", "e.npy"]
    np.save(tmp_path / "array.npy", np.ones(3))
    with pytest.raises(UserError, match="without the other two files"):
        EmbeddingStore(tmp_path / "array.npy", FACTS)
    (tmp_path / "labels.csv").write_text("path,class")
    with pytest.raises(UserError, match=r"labels\.csv: is there without the other two"):
        EmbeddingStore(tmp_path / "labels.npy", FACTS)


def test_unreadable_images(photos, checkpoint, tmp_path):
    damaged = photos / "cat/00.jpg"
    damaged.write_text("no image")
    out = tmp_path / "e.npy"
    command = ["--images", photos, "--checkpoint_path", checkpoint, "--out", out]
    failed(embed(*command), damaged, "is not an image", "--skip_bad")
    whole = Image.new("RGB", (40, 30), "red")
    whole.save(damaged)
    assert embed(*command).code == 0  # nothing was embedded before, and the image is mended
    damaged.write_text("no image")
    result = embed(*command, "--skip_bad", "--test_batch", 1)
    assert result.code == 0 and "1 unreadable images are left out" in result.out
    assert "11 kept, 1 gone" in result.out
    assert "1 unreadable images" in embed(*command, "--skip_bad").out  # tried again
    file = open_embeddings(out)
    assert list(file.columns["path"]) == [
        str(path) for path in find_images(photos) if path != damaged
    ]
    assert len(file.rows) == 11 and file.facts["unreadable"] == [[str(damaged), "is not an image"]]
    for path in find_images(photos):
        path.write_text("no image")
    failed(embed(*command, "--skip_bad", "--overwrite"), "none of the images can be read")
    assert sorted(path.name for path in tmp_path.glob("*e.*")) == ["e.csv", "e.json", "e.npy"]


def test_many_equal_images_are_worth_a_remark(photos, checkpoint, tmp_path, caplog):
    for path in find_images(photos)[:3]:
        Image.new("RGBA", (30, 20)).save(path.with_suffix(".webp"))
        path.unlink()
    result = embed("--images", photos, "--checkpoint_path", checkpoint, "--out", tmp_path / "e.npy")
    assert result.code == 0 and "3 images have the embedding of another one" in caplog.text


REFUSED = [
    ("--backbone resnet_small --out c.npy", "one of the arguments --images --dataset --onnx"),
    ("--images a --dataset b", "not allowed with argument --images"),
    ("--images a --checkpoint_path b", "give --out FILE.npy"),
    ("--images a --checkpoint_path b --out c.txt", "must end in .npy"),
    ("--dataset a --checkpoint_path b --out c.npy --skip_bad", "--skip_bad goes with --images"),
    ("--images a --checkpoint_path b --out c.npy --layers d", "--layers goes with --backbone"),
    ("--images a --backbone resnet_small --weights none --out c.npy", "a: no such folder"),
    ("--onnx c.onnx --checkpoint_path resnet18", "resnet18: no such file or run"),
]


@pytest.mark.parametrize(("command", "message"), REFUSED)
def test_refused(tmp_path, monkeypatch, command, message):
    monkeypatch.chdir(tmp_path)
    failed(embed(*command.split()), message)
    assert not list(tmp_path.iterdir())
