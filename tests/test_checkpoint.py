"""From a checkpoint file to the same network: every backbone, and files that are no checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models import build_model, load_checkpoint
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def small() -> torch.nn.Module:
    torch.manual_seed(2)
    return build_model("resnet_small", 5, 6)


@pytest.mark.parametrize("backbone", ["googlenet", "googlenet_bn", "resnet18", "resnet_small"])
def test_round_trip(tmp_path, backbone):
    torch.manual_seed(4)
    model = build_model(backbone, 5, 6)
    config = {"backbone": backbone, "lr": 0.01, "log_dir": None}
    path = tmp_path / "run.pth"
    torch.save({"model": model.state_dict(), "epoch": 11, "config": config, "metrics": [{"epoch": 11}]}, path)
    loaded, info = load_checkpoint(path)
    assert info == {
        "path": str(path), "epoch": 11, "backbone": backbone, "n_cluster": 5, "low_dim": 6, "config": config,
        "data": {}, "image_size": None,
    }  # fmt: skip
    assert not loaded.training and loaded.backbone_name == backbone
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    if backbone == "resnet_small":
        x = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            for actual, expected in zip(loaded(x), model.eval()(x), strict=True):
                assert torch.equal(actual, expected)


@pytest.mark.parametrize("backbone", ["resnet34", "resnet50", "resnet101"])
def test_deep_backbones_are_told_apart(tmp_path, backbone):
    """The figures do not matter here: all arrays are views of one zero, so that the file stays small."""
    with torch.device("meta"):
        shapes = build_model(backbone, 5, 6).state_dict()
    state = {name: torch.zeros((), dtype=value.dtype).expand(value.shape) for name, value in shapes.items()}
    most = max(value.numel() for value in state.values())  # a file must be as large as each of its tensors
    torch.save({"model": state, "epoch": 1, "filling": torch.zeros(most)}, tmp_path / "deep.pth")
    assert load_checkpoint(tmp_path / "deep.pth")[1]["backbone"] == backbone


def test_the_two_googlenets_have_the_same_names_and_the_config_tells_them_apart(tmp_path):
    model = build_model("googlenet_caffe", 5, 6)
    found = {}
    configs = {
        "none": {}, "released": {"backbone": "googlenet"}, "caffe": {"backbone": "googlenet_caffe"},
        "absurd": {"backbone": ["resnet18"]}, "wrong": {"backbone": "resnet18"},
    }  # fmt: skip
    for name, config in configs.items():
        content = {"model": model.state_dict(), "epoch": 1} | ({"config": config} if config else {})
        torch.save(content, tmp_path / "run.pth")
        loaded, info = load_checkpoint(tmp_path / "run.pth")
        found[name] = info["backbone"], loaded.base_model[0].norm.kind
    released, caffe = ("googlenet", "released"), ("googlenet_caffe", "caffe")
    assert found == {"none": released, "released": released, "caffe": caffe, "absurd": released, "wrong": released}


def test_a_bare_state_dict_and_parallel_names(tmp_path, small):
    torch.save({f"module.{name}": value for name, value in small.state_dict().items()}, tmp_path / "bare.pth")
    loaded, info = load_checkpoint(tmp_path / "bare.pth")
    assert (info["epoch"], info["config"], info["n_cluster"], info["low_dim"]) == (None, {}, 5, 6)
    assert torch.equal(loaded.feat_ext[0].weight, small.feat_ext[0].weight)


def test_halves_widen(tmp_path, small):
    torch.save(
        {"model": {k: v.half() if v.is_floating_point() else v for k, v in small.state_dict().items()}},
        tmp_path / "half.pth",
    )
    loaded, _ = load_checkpoint(tmp_path / "half.pth")
    assert loaded.feat_ext[0].weight.dtype == torch.float32
    assert torch.equal(loaded.feat_ext[0].weight, small.feat_ext[0].weight.half().float())


def refused(path: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    for word in words:
        assert word in message


def test_missing_files_and_folders(tmp_path):
    refused(tmp_path / "none.pth", "no such file")
    refused(tmp_path, "a folder")


@pytest.mark.parametrize("content", [b"", b"no checkpoint\n" * 9, b"PK\x03\x04", b"\x80\x02}q\x00."])
def test_files_that_are_none(tmp_path, content):
    (tmp_path / "else.pth").write_bytes(content)
    refused(tmp_path / "else.pth")


def test_truncated_files(tmp_path, small):
    torch.save({"model": small.state_dict(), "epoch": 1}, tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    for share in (0.001, 0.02, 0.5, 0.95, 0.999):
        (tmp_path / "cut.pth").write_bytes(content[: int(share * len(content))])
        refused(tmp_path / "cut.pth")


@pytest.mark.parametrize("content, words", [
    (torch.zeros(3), "expected a dictionary, found Tensor"),
    ([1, 2], "expected a dictionary, found list"),
    ({}, "it holds no state_dict"),
    ({"model": {}}, "it holds no state_dict"),
    ({"model": None, "epoch": 3}, "it holds no state_dict"),
    ({"model": {"feat_ext.0.weight": 3}}, "it holds no state_dict"),
    ({"model": {0: torch.zeros(3)}}, "it holds no state_dict"),
    ({"model": {"conv1.weight": torch.zeros(3)}}, "no weights feat_ext.0 and clustering.2"),
    ({"model": {"feat_ext.0.weight": torch.zeros(3), "clustering.2.weight": torch.zeros(3)}}, "no weights feat_ext.0"),
    ({"model": {"feat_ext.0.weight": torch.zeros(3, 4), "clustering.2.weight": torch.ones(2, 3)}}, "no known backbone"),
])  # fmt: skip
def test_other_content(tmp_path, content, words):
    torch.save(content, tmp_path / "else.pth")
    refused(tmp_path / "else.pth", words)


@pytest.mark.parametrize("change, words", [
    (lambda state: state.pop("decoder.decoder.4.weight"), "1 names missing, unknown or of another shape"),
    (lambda state: state.update({"extra.weight": torch.zeros(1)}), "the first is extra.weight"),
    (lambda state: state.update({"base_model.conv1.weight": torch.zeros(1)}), "the first is base_model.conv1.weight"),
])  # fmt: skip
def test_nearly_right_names_say_what_is_wrong(tmp_path, small, change, words):
    state = dict(small.state_dict())
    change(state)
    torch.save({"model": state}, tmp_path / "near.pth")
    refused(tmp_path / "near.pth", "the nearest is resnet_small", words)
