"""The embedder of Python programs, and its door for torch.hub."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from photos import SIZE, make_photos, save_network
from PIL import Image
from scripts import ROOT, run_in_process

from datasets.images import UnreadableError, find_images, open_rgb
from embedder import Embedder, network_hash
from models import build_model
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Photos, a network, and what embed.py makes of them."""
    folder = tmp_path_factory.mktemp("embedder")
    photos = make_photos(folder / "photos")
    network = save_network(folder / "net.pth", flip_eval=True)
    argv = ("--images", photos, "--checkpoint_path", network, "--out", folder / "e.npy")
    assert run_in_process("embed.py", *argv).code == 0
    return folder


def test_all_kinds_of_images_give_the_rows_of_embed(place):
    rows = np.load(place / "e.npy")
    paths = find_images(place / "photos")
    pictures = [Image.open(path) for path in paths]
    arrays = [np.array(picture) for picture in pictures]
    tensors = [torch.from_numpy(array).permute(2, 0, 1) for array in arrays]
    embedder = Embedder(place / "net.pth")
    assert (embedder.image_size, embedder.dimension, embedder.flip) == (SIZE, 12, True)
    contents = [path.read_bytes() for path in paths]
    for images in (paths, contents, pictures, arrays, tensors, [t / 255 for t in tensors]):
        np.testing.assert_allclose(embedder(images), rows, atol=1e-6)
        np.testing.assert_allclose(embedder(images[3]), rows[3:4], atol=1e-6)
    assert embedder([]).shape == (0, 12)


def test_a_turned_photo_is_the_same_as_a_path_and_as_an_image(place, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me by 90 degrees"
    Image.open(place / "photos/cat/00.jpg").save(tmp_path / "turned.jpg", exif=exif, quality=95)
    embedder = Embedder(place / "net.pth", flip=False)
    picture = open_rgb(tmp_path / "turned.jpg")
    assert picture.size == (30, 40)
    row = embedder(tmp_path / "turned.jpg")
    for image in (Image.open(tmp_path / "turned.jpg"), picture):
        np.testing.assert_allclose(embedder(image), row, atol=1e-6)
    assert np.abs(row - embedder(place / "photos/cat/00.jpg")).max() > 0.01


def test_many_images_are_embedded_in_batches(place, monkeypatch):
    monkeypatch.setattr("embedder.BATCH", 5)
    paths = (path for path in find_images(place / "photos"))
    rows = Embedder(place / "net.pth")(paths)
    np.testing.assert_allclose(rows, np.load(place / "e.npy"), atol=1e-6)


def test_numbers_that_are_no_image(place):
    embedder = Embedder(place / "net.pth")
    gray = np.zeros((48, 64), np.uint8)
    assert embedder(gray).shape == embedder(torch.from_numpy(gray)[None]).shape == (1, 12)
    upright = torch.zeros(8, 8, 3, dtype=torch.uint8)  # channels last
    numbers = (torch.full((3, 8, 8), 90.0), torch.full((3, 8, 8), -2.0), np.zeros((8, 8, 3)))
    for wrong in (*numbers, upright):
        with pytest.raises(ValueError, match=r"0 to 1|expected an array"):
            embedder(wrong)
    with pytest.raises(ValueError, match=r"expected a PIL image, .*, got int"):
        embedder([3])


def test_a_folder_that_is_called_none(place, monkeypatch):
    monkeypatch.chdir(place)
    Path("none").mkdir(exist_ok=True)
    assert Embedder("resnet_small", "none", image_size=32).location["weights"] == "none"


def test_random_numbers_of_the_caller_stay(place):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    Embedder("resnet_small", "none")
    assert torch.equal(torch.rand(4), expected)


def test_torch_hub(place):
    photo = place / "photos/cat/00.jpg"
    hub = {"source": "local", "repo_or_dir": str(ROOT)}
    embedder = torch.hub.load(model="cbswr", checkpoint=str(place / "net.pth"), **hub)
    np.testing.assert_allclose(embedder(photo), np.load(place / "e.npy")[:1], atol=1e-6)
    frozen = torch.hub.load(model="frozen", backbone="resnet_small", weights="none", **hub)
    assert frozen(Image.open(photo)).shape == (1, 128)


@pytest.mark.parametrize("device", ["gpu", "cuda1", "cuda:9999"])
def test_a_device_that_is_not_there(place, device):
    with pytest.raises((UserError, RuntimeError), match="device"):
        Embedder(place / "net.pth", device=device)


def test_errors_name_what_was_given(place, tmp_path):
    (tmp_path / "notes.jpg").write_text("no image")
    with pytest.raises(UnreadableError, match=r"notes\.jpg: is not an image"):
        Embedder(place / "net.pth")(tmp_path / "notes.jpg")
    with pytest.raises(
        UserError, match=r"resnet19: no such file or run, .* did you mean resnet18\?"
    ):
        Embedder("resnet19")


def test_what_is_no_network():
    with pytest.raises(UserError, match=r"none\.pth"):
        Embedder("none.pth")


def test_hash_of_the_network():
    torch.manual_seed(0)
    model = build_model("resnet_small", 4, 12)
    before = network_hash(model)
    model.clustering[2].weight.data += 1  # makes no embedding
    assert network_hash(model) == before
    pooled = network_hash(model, "pooled")
    model.feat_ext[0].weight.data += 1
    assert network_hash(model) != before and network_hash(model, "pooled") == pooled
    model.base_model.bn1.running_mean += 1
    assert network_hash(model, "pooled") != pooled
