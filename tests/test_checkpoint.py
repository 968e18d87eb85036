"""From a checkpoint file to an equal network, and files that are no checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models import Pooling, build_model, load_checkpoint, load_network
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
FINGERPRINT = "uint8 (9, 64, 64, 3) sha256 00"


@pytest.fixture(scope="module")
def small() -> nn.Module:
    torch.manual_seed(2)
    return build_model("resnet_small", 5, 6).eval()


def save(path: Path, model: nn.Module, **facts: object) -> Path:
    torch.save({"model": model.state_dict(), **facts}, path)
    return path


@pytest.mark.parametrize("backbone", ["googlenet_bn", "resnet_small"])
def test_round_trip(tmp_path, backbone):
    torch.manual_seed(4)
    model = build_model(backbone, 5, 6)
    config = {"backbone": backbone, "method": "cbswr", "flip_eval": True}
    data = {"training": {"images": FINGERPRINT}}
    path = save(tmp_path / "run.pth", model, epoch=11, config=config, data=data)
    loaded, info = load_checkpoint(path)
    assert info == {
        "path": str(path),
        "epoch": 11,
        "step": 0,
        "backbone": backbone,
        "n_cluster": 5,
        "low_dim": 6,
        "config": config,
        "data": data,
        "image_size": 64,
        "flip_eval": True,
    }
    assert not loaded.training and loaded.backbone_name == backbone
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("backbone", ["resnet34", "resnet50"])
def test_backbones_are_told_apart_by_names_and_shapes(tmp_path, backbone):
    with torch.device("meta"):
        shapes = build_model(backbone, 5, 6).state_dict()
    zeros = {name: torch.zeros((), dtype=v.dtype).expand(v.shape) for name, v in shapes.items()}
    torch.save({"model": zeros}, tmp_path / "deep.pth")  # views of a single zero: a small file
    assert load_checkpoint(tmp_path / "deep.pth")[1]["backbone"] == backbone


def test_a_config_stands_above_what_is_asked_for(tmp_path, small):
    path = save(tmp_path / "run.pth", small, config={"backbone": "resnet_small"})
    assert load_checkpoint(path, backbone="resnet_small")[1]["backbone"] == "resnet_small"
    with pytest.raises(UserError, match=r"run\.pth: was trained with the backbone resnet_small"):
        load_checkpoint(path, backbone="resnet18")


def test_the_pooling_of_a_run_is_that_of_its_config(tmp_path):
    config = {"backbone": "resnet_small", "layers": "layer2,layer3", "pool": "gem,avg"}
    config |= {"stripes": "1", "head_init": "whiten"}
    pooling = Pooling.parse("layer2,layer3", "gem,avg", unit=True)
    model = build_model("resnet_small", 5, 6, pooling=pooling)
    loaded, _ = load_checkpoint(save(tmp_path / "run.pth", model, config=config))
    assert str(loaded.pooling) == "gem of layer2 + avg of layer3"
    for wrong in ({"stripes": "no"}, {"layers": 3}, {"pool": "mean"}, {"layers": "layer7,layer3"}):
        path = save(tmp_path / "wrong.pth", model, config=config | wrong)
        with pytest.raises(UserError):
            load_checkpoint(path)


def test_a_bare_state_dict_with_parallel_names_in_halves(tmp_path, small):
    state = {f"module.{name}": value for name, value in small.state_dict().items()}
    halves = {name: v.half() if v.is_floating_point() else v for name, v in state.items()}
    torch.save(halves, tmp_path / "bare.pth")
    loaded, info = load_checkpoint(tmp_path / "bare.pth")
    assert (info["epoch"], info["config"], info["image_size"]) == (None, {}, None)
    weight = loaded.feat_ext[0].weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, small.feat_ext[0].weight.half().float())


@pytest.mark.parametrize("place", ["net", "state_dict", "model_state_dict", "ema.module"])
def test_checkpoints_as_trainers_write_them(tmp_path, small, place):
    state = {f"module.{name}": value.half() for name, value in small.state_dict().items()}
    facts = {"epoch": 3, "NMI": np.float64(0.559), "recall": np.arange(4.0)}
    torch.save(
        {place: state, "optimizer": {"state": {0: torch.ones(2)}}} | facts, tmp_path / "a.pt"
    )
    loaded, info = load_checkpoint(tmp_path / "a.pt")
    assert (info["epoch"], info["backbone"]) == (3, "resnet_small")
    assert torch.equal(loaded.feat_ext[0].weight, small.feat_ext[0].weight.half().float())


# ------------------------------------------------------------------------------ load_network


def test_a_frozen_backbone_is_a_network_too():
    model, about = load_network("cpu", None, "resnet_small", "none")
    assert not model.training
    assert about == {
        "features": "pooled",
        "backbone": "resnet_small",
        "weights": "none",
        "checkpoint": None,
        "epoch": None,
        "flip_eval": False,
    }


def test_a_network_of_a_run_and_its_first_dimensions(tmp_path, small):
    config = {"backbone": "resnet_small", "head_init": "pca", "flip_eval": True}
    config["refit_head"] = "start"
    path = save(tmp_path / "best.pth", small, epoch=2, config=config)
    model, about = load_network("cpu", str(tmp_path), dim=4)  # the folder of the run
    assert (about["checkpoint"], about["features"], about["epoch"]) == (str(path), "embedding", 2)
    assert about["low_dim"] == model.low_dim == 4 and about["flip_eval"]
    for changed in ({"head_init": "random"}, {"refit_head": "off"}):
        save(path, small, epoch=2, config=config | changed)
        with pytest.raises(UserError, match=r"not in order, .* cannot be cut to 4"):
            load_network("cpu", str(tmp_path), dim=4)
    save(path, small, epoch=0, config=config | {"refit_head": "off"})
    assert load_network("cpu", str(tmp_path), dim=4)[0].low_dim == 4
    save(path, small, epoch=2, config=config, state={"step": 3})  # stopped in the third epoch
    with pytest.raises(UserError, match="not in closed form"):
        load_network("cpu", str(tmp_path), dim=4)


# ----------------------------------------------------------------------------------- refused


def assert_refused(path: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    for word in words:
        assert word in message


def test_missing_files_folders_and_other_files(tmp_path):
    assert_refused(tmp_path / "none.pth", "no such file")
    assert_refused(tmp_path, "a folder")
    (tmp_path / "other.pth").write_bytes(b"no checkpoint\n" * 9)
    assert_refused(tmp_path / "other.pth")


HEADS = {"feat_ext.0.weight": torch.zeros(3, 4), "clustering.2.weight": torch.ones(2, 3)}


@pytest.mark.parametrize(
    "content, words",
    [
        (torch.zeros(3), "it holds no named tensors"),
        ({"model": None, "epoch": 3}, "it holds no named tensors"),
        (
            {"model": {"conv1.weight": torch.zeros(3)}},
            "holds model.conv1.weight, and no ",
        ),
        ({"model": HEADS}, "fits no known backbone"),
        ({"model": HEADS | {"a": torch.full((2,), torch.inf)}}, "a holds NaN or infinite values"),
    ],
)
def test_other_content(tmp_path, content, words):
    torch.save(content, tmp_path / "other.pth")
    assert_refused(tmp_path / "other.pth", words)


@pytest.mark.parametrize(
    "name, value",
    [
        ("decoder.decoder.4.weight", None),
        ("extra.weight", torch.zeros(1)),
        ("base_model.conv1.weight", torch.zeros(1)),
    ],
)
def test_nearly_right_names_say_what_is_wrong(tmp_path, small, name, value):
    state = small.state_dict() | {name: value}
    path = tmp_path / "near.pth"
    torch.save({"model": {n: v for n, v in state.items() if v is not None}}, path)
    assert_refused(path, "nearest is resnet_small, with 1 names", f"the first is {name}")
