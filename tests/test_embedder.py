"""The embedder of Python programs, and its door for torch.hub."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from photos import SIZE, make_photos, save_network
from PIL import Image
from scripts import ROOT, run_in_process

from datasets.images import find_images
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
    for images in (paths, pictures, arrays, tensors, [tensor / 255 for tensor in tensors]):
        np.testing.assert_allclose(embedder(images), rows, atol=1e-6)
        np.testing.assert_allclose(embedder(images[3]), rows[3:4], atol=1e-6)
    assert embedder([]).shape == (0, 12)


def test_torch_hub(place):
    photo = place / "photos/cat/00.jpg"
    hub = {"source": "local", "repo_or_dir": str(ROOT)}
    embedder = torch.hub.load(model="cbswr", checkpoint=str(place / "net.pth"), **hub)
    np.testing.assert_allclose(embedder(photo), np.load(place / "e.npy")[:1], atol=1e-6)
    frozen = torch.hub.load(model="frozen", backbone="resnet_small", weights="none", **hub)
    assert frozen(Image.open(photo)).shape == (1, 128)


def test_what_is_no_network():
    with pytest.raises(UserError, match=r"none\.pth"):
        Embedder("none.pth")


def test_hash_of_the_network():
    torch.manual_seed(0)
    model = build_model("resnet_small", 4, 12)
    before = network_hash(model)
    model.clustering[2].weight.data += 1  # makes no embedding
    assert network_hash(model) == before
    model.base_model.bn1.running_mean += 1
    assert network_hash(model) != before
