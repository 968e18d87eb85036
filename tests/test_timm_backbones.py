"""Backbones of timm: their input, feature maps and pooling, and their weights from files."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tensors import random_pixels
from torch.nn import functional as F

from models import build_model, load_checkpoint
from models.batch_norm import share_batch_norm
from models.export import export_onnx
from models.spec import IMAGENET
from models.timm_backbones import resized
from models.weights import load_backbone_weights
from utils.distributed import Processes
from utils.errors import UserError

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.usefixtures("one_thread")
VIT = "timm:test_vit"  # of timm's own tests: 160 px, patches of 16 px, 64 wide
CONV = "timm:test_resnet"


# --------------------------------------------------------------------- input, map and pooling


def test_resizing_is_pillows():
    images = 100 + random_pixels(2, 28) // 5  # nothing that Pillow would clip between its passes
    x = images.permute(0, 3, 1, 2).double()
    for size in ((40, 40), (19, 19), (28, 35)):
        for image, result in zip(images.numpy(), resized(x, size), strict=True):
            pillows = Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC)
            difference = result.permute(1, 2, 0).numpy() - np.asarray(pillows)
            assert np.abs(difference).max() < 1.1  # Pillow rounds twice
    assert resized(x, (28, 28)) is x


def test_a_transformer_of_another_size_and_normalization():
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"  # normalized by 0.5
    torch.manual_seed(1)
    model = build_model(f"timm:{name}").eval()
    assert model.normalization.mean == model.normalization.std == (127.5, 127.5, 127.5)
    assert model.normalization.mean != IMAGENET.mean
    images = random_pixels(2, 112)
    inputs = images.permute(0, 3, 1, 2) / 127.5 - 1.0
    enlarged = F.interpolate(inputs, (224, 224), mode="bicubic", antialias=True)
    with torch.no_grad():
        feature_map = model.base_model(model.normalization(images))
        tokens = model.base_model.network.forward_features(enlarged)  # (2, 1 + 196, 192)
    assert feature_map.shape == (2, 192, 14, 14)
    pooled = model.pool([feature_map])
    torch.testing.assert_close(pooled, tokens[:, 0], rtol=1e-4, atol=1e-4)  # the class token
    shift = feature_map - tokens[:, 1:].transpose(1, 2).view(2, 192, 14, 14)
    same_everywhere = shift[:, :, :1, :1].expand_as(shift)
    torch.testing.assert_close(shift, same_everywhere, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [VIT, CONV, "timm:test_convnext", "timm:test_nfnet"])
@torch.no_grad()
def test_pooled_is_what_timm_gives_without_its_classifier(name):
    torch.manual_seed(2)
    model = build_model(name, 4, 8).eval()
    inputs = torch.randn(2, 3, *model.base_model.input_size)
    pooled, embedding = model.features(inputs)
    torch.testing.assert_close(pooled, model.base_model.network(inputs), rtol=1e-4, atol=1e-5)
    assert embedding.shape == (2, 8) and model(inputs)[2].shape[:2] == (2, model.pooled_dim)


@pytest.mark.shared
@torch.no_grad()
def test_its_resnet18_is_torchvisions(shared):
    weights = shared / "weights" / "resnet18_imagenet1k_v1_fp16.pth"
    images = random_pixels(2, 224)
    pooled = []
    for name in ("resnet18", "timm:resnet18"):
        model = build_model(name, weights=weights).eval()
        pooled.append(model.features(model.normalization(images))[0])
    torch.testing.assert_close(*pooled, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------ weights and names


@pytest.mark.parametrize("ending, save", [("safetensors", save_file), ("pth", torch.save)])
def test_weights_from_a_file_with_timms_names(tmp_path, ending, save):
    torch.manual_seed(3)
    source = timm.create_model("test_vit", num_classes=10).state_dict()  # as published
    path = tmp_path / f"weights.{ending}"
    save(source, path)
    state = build_model(VIT, weights=path).base_model.network.state_dict()
    assert all(torch.equal(value, source[name]) for name, value in state.items())
    with pytest.raises(UserError, match="not the weights of timm:test_resnet"):
        build_model(CONV, weights=path)


def test_pretrained_weights_are_timms(monkeypatch):
    torch.manual_seed(4)
    source = timm.create_model("test_vit", num_classes=0)
    backbone = build_model(VIT).base_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: source)
    load_backbone_weights(backbone, VIT, "auto")
    state = backbone.network.state_dict()
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in state.items())


@pytest.mark.parametrize(
    "name, words",
    [
        ("timm:resnet1", "knows no network 'resnet1'; it knows "),
        ("timm:test_vit.nowhere", "timm cannot make test_vit.nowhere"),
        ("timm:hf-hub:someone/else", "knows no network"),
        ("timm:mobilenetv3_small_050", "pools to 1024 dimensions and its feature map has 288"),
    ],
)
def test_refused_names(name, words):
    with pytest.raises(UserError, match=words):
        build_model(name)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm"):
        build_model(VIT)


def test_its_batch_norms_with_an_activation_are_not_shared_by_processes():
    network = torch.nn.Sequential(timm.layers.BatchNormAct2d(4))
    with pytest.raises(UserError, match="BatchNormAct2d cannot be shared by processes"):
        share_batch_norm(network, Processes(0, 2), torch.device("cpu"))


# ----------------------------------------------------------------------- checkpoints, export


@pytest.mark.parametrize("backbone, words", [(None, "no known backbone"), (CONV, "does not fit")])
def test_a_checkpoint_that_does_not_say_its_network(tmp_path, backbone, words):
    torch.save({"model": build_model(VIT, 4, 8).state_dict()}, tmp_path / "vit.pth")
    assert load_checkpoint(tmp_path / "vit.pth", backbone=VIT)[1]["backbone"] == VIT
    with pytest.raises(UserError, match=words):
        load_checkpoint(tmp_path / "vit.pth", backbone=backbone)


@pytest.mark.parametrize("name", [VIT, CONV])
def test_onnx(tmp_path, name):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    torch.manual_seed(6)
    model = build_model(name, 4, 8).eval()
    export_onnx(model, tmp_path / "net.onnx", 56)
    images = random_pixels(3, 56)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (rows,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        _, embedding = model.features(model.normalization(images))
    np.testing.assert_allclose(rows, embedding, atol=2e-5)
