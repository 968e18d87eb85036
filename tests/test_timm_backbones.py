"""Backbones of timm: their own input, maps and pooling, weights from files, and every script that takes a backbone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import failed, run_in_process
from synthetic import write_dataset
from training import options, same_weights, trained

from models import build_model, load_checkpoint
from models.backbones import IMAGENET, backbone_spec
from models.batch_norm import share_batch_norm
from models.export import export_onnx
from models.timm_backbones import is_timm_name, resized
from utils.distributed import Processes
from utils.errors import UserError

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = "timm:test_vit"  # of timm's own tests: 160 px, patches of 16, 64 wide
TINY_CONV = "timm:test_resnet"


def pixels(count: int, size: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, size, size, 3)).astype(np.uint8))


# ---------------------------------------------------------------- map, pooling, input


def test_resizing_is_pillows():
    images = 100 + pixels(2, 28) // 5  # nothing that Pillow would have to clip between its two passes
    for size in ((40, 40), (19, 19), (28, 35)):
        found = resized(images.permute(0, 3, 1, 2).double(), size)
        for image, ours in zip(images.numpy(), found, strict=True):
            theirs = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC)).astype(float)
            assert np.abs(ours.permute(1, 2, 0).clamp(0, 255).numpy() - theirs).max() < 1.1  # Pillow rounds, twice
    same = images.permute(0, 3, 1, 2).float()
    assert resized(same, (28, 28)) is same


def test_a_transformer_of_another_size_and_normalisation():
    """What timm itself gives for the picture that its own input pipeline would make."""
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"  # normalised by 0.5, not by ImageNet's figures
    torch.manual_seed(1)
    model = build_model(f"timm:{name}").eval()
    assert model.normalization.mean == model.normalization.std == (127.5, 127.5, 127.5)
    assert model.normalization.mean != IMAGENET.mean and model.channels == 192
    network = model.base_model.network
    images = pixels(2, 112)  # the crops of stored images of 128 px
    with torch.no_grad():
        feature_map = model.base_model(model.normalization(images))
        pooled = model.pool(feature_map)
        own = torch.nn.functional.interpolate(
            images.permute(0, 3, 1, 2) / 127.5 - 1.0, (224, 224), mode="bicubic", antialias=True
        )
        tokens = network.forward_features(own)  # (2, 1 + 196, 192)
    assert feature_map.shape == (2, 192, 14, 14)
    torch.testing.assert_close(pooled, tokens[:, 0], rtol=1e-4, atol=1e-4)  # the class token is its pooling
    patches = tokens[:, 1:].view(2, 14, 14, 192).permute(0, 3, 1, 2)
    shift = feature_map - patches
    torch.testing.assert_close(shift, shift[:, :, :1, :1].expand_as(shift), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [SMALL, TINY_CONV, "timm:test_convnext", "timm:test_vit2", "timm:test_nfnet"])
def test_pooled_is_what_timm_gives_without_its_classifier(name):
    torch.manual_seed(2)
    model = build_model(name, 4, 8).eval()
    inputs = torch.randn(2, 3, *model.base_model.input_size)
    with torch.no_grad():
        expected = model.base_model.network(inputs)
        feature_map = model.base_model(inputs)
        torch.testing.assert_close(model.pool(feature_map), expected, rtol=1e-4, atol=1e-5)
        embedding, logits, _ = model(inputs)
    assert feature_map.shape[:2] == (2, model.channels) and feature_map.dim() == 4
    assert (embedding.shape, logits.shape) == ((2, 8), (2, 4))


def test_its_resnet18_is_torchvisions(shared):
    """The same weights, by both packages' code: the same embeddings."""
    weights = shared / "weights" / "resnet18_imagenet1k_v1_fp16.pth"
    if not weights.is_file():
        pytest.skip(f"needs {weights.name}")
    ours, theirs = (build_model(name, weights=weights).eval() for name in ("resnet18", "timm:resnet18"))
    theirs.feat_ext.load_state_dict(ours.feat_ext.state_dict())
    images = pixels(2, 224)
    assert theirs.normalization.mean == pytest.approx(ours.normalization.mean)
    with torch.no_grad():
        for a, b in zip(*(m.features(m.normalization(images)) for m in (ours, theirs)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- weights, checkpoints, names


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_weights_from_a_file_in_timms_names(tmp_path, ending):
    from safetensors.torch import save_file

    torch.manual_seed(3)
    source = timm.create_model("test_vit", num_classes=10)  # with a classifier, as published files have
    path = tmp_path / f"weights.{ending}"
    (save_file if ending == "safetensors" else torch.save)(source.state_dict(), path)
    model = build_model(SMALL, weights=path)
    state = model.base_model.network.state_dict()
    assert len(state) > 10 and all(torch.equal(value, source.state_dict()[name]) for name, value in state.items())
    with pytest.raises(UserError, match="not the weights of timm:test_resnet"):
        build_model(TINY_CONV, weights=path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=f"weights.{ending}"):
        build_model(SMALL, weights=path)


def test_pretrained_weights_that_cannot_be_had(monkeypatch):
    made = timm.create_model

    def offline(name, pretrained=False, **more):
        if pretrained:
            raise OSError("no route to\nhost")
        return made(name, pretrained=pretrained, **more)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        UserError, match=r"cannot get timm's pretrained weights of timm:test_vit .no route to host.; give"
    ):
        build_model(SMALL, weights="auto")


def test_pretrained_weights_are_those_of_timm(monkeypatch):
    made = timm.create_model
    torch.manual_seed(4)
    source = made("test_vit", num_classes=0)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **more: source if pretrained else made(
        name, pretrained=pretrained, **more))  # fmt: skip
    torch.manual_seed(5)
    model = build_model(SMALL, weights="auto")
    assert all(torch.equal(v, source.state_dict()[n]) for n, v in model.base_model.network.state_dict().items())


@pytest.mark.parametrize("name, words", [
    ("timm:resnet1", "knows no such network; it knows "),
    ("timm:test_vit.nowhere", "cannot make it"),
    ("timm:hf-hub:someone/else", "expected timm:NAME"),
    ("timm:", "expected timm:NAME"),
    ("timm:mobilenetv3_small_050", "pooled feature has 1024 dimensions and its feature map 288"),
])  # fmt: skip
def test_refused_names(name, words, monkeypatch):
    with pytest.raises(UserError, match=words):
        backbone_spec(name)


@pytest.mark.parametrize("name", ["timm:hf_hub:a/b", "timm:../x", "timm:a b", "timm", ["timm:x"], None, "timm:x.y.z"])
def test_what_is_no_name_is_never_given_to_timm(name):
    assert not is_timm_name(name)


def test_without_timm(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "timm", None)
    data = write_dataset(tmp_path / "data")
    failed(run_in_process("train.py", *options(data, tmp_path / "runs", backbone=SMALL)), "pip install timm")
    assert not (tmp_path / "runs").exists()


def test_norms_with_an_activation_are_not_shared_by_processes():
    network = torch.nn.Sequential(timm.layers.BatchNormAct2d(4))
    with pytest.raises(UserError, match="BatchNormAct2d cannot be shared by processes"):
        share_batch_norm(network, Processes(0, 2), torch.device("cpu"))
    assert share_batch_norm(network, Processes(), torch.device("cpu")) is network


# ---------------------------------------------------------------- the scripts


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    return trained(data, tmp_path_factory.mktemp("run"), backbone=SMALL, lr=0.01)


def test_training_and_its_checkpoint(data, run, tmp_path):
    assert same_weights(run, trained(data, tmp_path, backbone=SMALL, lr=0.01))
    assert not same_weights(run, trained(data, tmp_path / "untrained", backbone=SMALL, n_epoch=0))
    model, info = load_checkpoint(run.run / "last.pth")
    assert info["backbone"] == model.backbone_name == SMALL
    assert all(torch.equal(value, run.saved["model"][name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("named, words", [
    (None, "fits no known backbone"), ("timm:hf-hub:a/b", "fits no known backbone"),
    (TINY_CONV, "the nearest is timm:test_resnet"), ("timm:unheard_of", "knows no such network"),
])  # fmt: skip
def test_checkpoints_that_name_another_network(run, tmp_path, named, words):
    torch.save({**run.saved, "config": {**run.saved["config"], "backbone": named}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=words):
        load_checkpoint(tmp_path / "other.pth")


def test_test_embed_and_search(data, run, tmp_path):
    scores = tmp_path / "scores.json"
    half = ("--dataset=tiny", f"--data_dir={data}", "--device=cpu")
    done = run_in_process("test.py", *half, f"--checkpoint_path={run.run / 'last.pth'}", f"--json={scores}")
    assert done.code == 0, done.err
    assert json.loads(scores.read_text())["recall@1"] == run.rows[-1]["recall@1"]
    embedded = tmp_path / "frozen.npy"
    network = (f"--backbone={SMALL}", "--weights=none", "--seed=4")
    assert run_in_process("embed.py", *half, *network, f"--out={embedded}").code == 0
    assert np.load(embedded).shape == (48, 64)
    done = run_in_process("test.py", *half, *network, f"--save_embeddings={tmp_path / 'same.npy'}")
    assert done.code == 0 and "pooled of 64 dimensions" in done.out
    np.testing.assert_allclose(np.load(tmp_path / "same.npy"), np.load(embedded)[24:], atol=1e-5)
    query = tmp_path / "query.png"
    Image.fromarray(np.load(next((data / "tiny").glob("validation*_img.npy")))[5]).save(query)
    found = run_in_process("search.py", f"--embeddings={embedded}", f"--query={query}", "--k=1", f"--json={scores}")
    assert found.code == 0, found.err
    assert json.loads(scores.read_text())[0]["hits"][0]["path"].endswith("#5")


@pytest.mark.parametrize("name", [SMALL, TINY_CONV])
def test_onnx(tmp_path, name):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    torch.manual_seed(6)
    model = build_model(name, 4, 8).eval()
    export_onnx(model, tmp_path / "net.onnx", 56)
    images = pixels(3, 56)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, model.features(model.normalization(images))[1].numpy(), atol=2e-5)
