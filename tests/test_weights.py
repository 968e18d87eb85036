"""Pretrained weights from every kind of file, and what is said of files that do not fit."""

from __future__ import annotations

import urllib.error
from pathlib import Path

import h5py
import hickle
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.numpy import save_file
from torch import Tensor, nn

from models import build_model, weights
from models.googlenet import CAFFE_BLOCKS
from models.weights import read_hdf5_arrays
from utils.errors import UserError
from utils.features import embeddings_of, pooled_features
from utils.metrics import recall_at_k

pytestmark = pytest.mark.usefixtures("one_thread")
GOLDEN = Path(__file__).parent / "golden"
CAFFE_NAMES = {str(place): name for name, place in CAFFE_BLOCKS.items()}


def caffe_name(name: str) -> str:
    place, _, rest = name.partition(".")
    return f"{CAFFE_NAMES[place]}.{rest}"


@pytest.fixture(scope="module")
def caffe_arrays() -> dict[str, np.ndarray]:
    """A GoogLeNet by its Caffe names, with the classifier that such files hold, too."""
    rng = np.random.default_rng(3)
    arrays = {}
    for name, value in build_model("googlenet").base_model.state_dict().items():
        arrays[caffe_name(name)] = rng.standard_normal(value.shape, np.float32)
    arrays["loss3.classifier.weight"] = rng.standard_normal((10, 1024), np.float32)
    arrays["loss3.classifier.bias"] = np.zeros(10, np.float32)
    return arrays


def assert_filled(model: nn.Module, arrays: dict[str, np.ndarray]) -> None:
    state = model.base_model.state_dict()
    assert len(state) == len(arrays) - 2  # all but the classifier
    for name, value in state.items():
        np.testing.assert_array_equal(value.numpy(), arrays[caffe_name(name)])


# ------------------------------------------------------------------------------ kinds of files


@pytest.mark.parametrize("name", ["hickle_3_4_9_sample.h5", "hickle_5_0_3_sample.h5"])
def test_both_layouts_of_hickle(name):
    arrays = read_hdf5_arrays(GOLDEN / name)
    stored = {}

    def visit(_: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            stored[item.shape] = item[()]

    with h5py.File(GOLDEN / name) as file:
        file.visititems(visit)
    shapes = {"conv1.7x7_s2.weight": (4, 3, 2, 2), "inception_3a.3x3_reduce.bias": (4,)}
    assert arrays.keys() == shapes.keys()
    for key, shape in shapes.items():
        np.testing.assert_array_equal(arrays[key], stored[shape])


def save_hdf5(arrays: dict[str, np.ndarray], path: Path) -> None:
    """Write paths such as /conv1/7x7_s2/weight, or names with dots in a file of another ending."""
    with h5py.File(path, "w") as file:
        for name, value in arrays.items():
            file[name.replace(".", "/") if path.suffix == ".hdf5" else name] = value


def save_checkpoint(arrays: dict[str, np.ndarray], path: Path) -> None:
    tensors = {f"module.base_model.{name}": torch.from_numpy(v) for name, v in arrays.items()}
    torch.save({"model": tensors, "epoch": 3}, path)


def save_state(arrays: dict[str, np.ndarray], path: Path) -> None:
    torch.save({"state_dict": {name: torch.from_numpy(v) for name, v in arrays.items()}}, path)


@pytest.mark.parametrize(
    "name, save",
    [
        ("googlenet.h5", hickle.dump),
        ("plain.hdf5", save_hdf5),
        ("weights.bin", save_hdf5),
        ("run.pth", save_checkpoint),
        ("state.pth", save_state),
    ],
)
def test_every_kind_of_file_by_caffes_names(tmp_path, caffe_arrays, name, save):
    path = tmp_path / name
    save(caffe_arrays, path)
    assert_filled(build_model("googlenet", weights=path), caffe_arrays)


@pytest.mark.parametrize("backbone", ["googlenet", "googlenet_fallback_lrn"])
def test_auto_takes_the_file_beside_the_models(tmp_path, caffe_arrays, monkeypatch, backbone):
    monkeypatch.setattr(weights, "GOOGLENET_FILE", tmp_path / "googlenet.h5")
    with pytest.raises(UserError) as caught:
        build_model(backbone, weights="auto")
    words = ["googlenet.h5: no such file", "download.py googlenet", weights.GOOGLENET_SOURCE]
    for word in (*words, "resnet18", "weights none"):
        assert word in str(caught.value)
    hickle.dump(caffe_arrays, weights.GOOGLENET_FILE)
    assert_filled(build_model(backbone, weights="auto"), caffe_arrays)


@pytest.fixture(scope="module")
def resnet18() -> dict[str, Tensor]:
    torch.manual_seed(5)
    return torchvision.models.resnet18(weights=None).state_dict()


def test_torchvisions_file_in_halves_without_counters(tmp_path, resnet18):
    path = tmp_path / "resnet18.pth"
    names = [name for name in resnet18 if not name.endswith("num_batches_tracked")]
    assert "fc.weight" in names
    torch.save({name: resnet18[name].half() for name in names}, path)
    state = build_model("resnet18", weights=path).base_model.state_dict()
    assert state["conv1.weight"].dtype == torch.float32
    for name in state.keys() & set(names):
        assert torch.equal(state[name], resnet18[name].half().float()), name


@pytest.mark.parametrize("counters", [True, False])
@pytest.mark.parametrize(
    "prefix, container",
    [
        ("", "state_dict"),
        ("", "net"),
        ("module.", "model_state_dict"),
        ("module.encoder_q.", "state_dict"),
        ("backbone.", ""),
        ("encoder._orig_mod.", "model"),
        ("student.backbone.", "state_dict"),
        ("module.base_model.", "state_dict_ema"),
    ],
)
def test_files_as_trainers_write_them(tmp_path, resnet18, caplog, prefix, container, counters):
    halves = {f"{prefix}{name}": value.half() for name, value in resnet18.items()}
    if not counters:
        halves = {name: v for name, v in halves.items() if "num_batches" not in name}
    halves[f"{prefix}projector.0.weight"] = torch.zeros(3, 512)
    content = {container: halves, "epoch": 3, "NMI": np.float64(0.5)} if container else halves
    torch.save(content, tmp_path / "trained.pt")
    weight = build_model("resnet18", weights=tmp_path / "trained.pt").base_model.conv1.weight
    assert torch.equal(weight, resnet18["conv1.weight"].half().float())
    said = bool(prefix.replace("module.", "")) or container != "state_dict"
    assert ("taking the tensors" in caplog.text) == said


def test_the_averaged_copy_is_taken(tmp_path, resnet18, caplog):
    other = {name: torch.zeros_like(value) for name, value in resnet18.items()}
    for averaged in ("teacher", "model_ema"):
        torch.save({"student": other, averaged: resnet18}, tmp_path / "pair.pth")
        model = build_model("resnet18", weights=tmp_path / "pair.pth")
        assert torch.equal(model.base_model.conv1.weight, resnet18["conv1.weight"])
        assert f"begin with {averaged}." in caplog.text


def test_the_average_of_a_model_is_taken(tmp_path, resnet18):
    model = torchvision.models.resnet18(weights=None)
    model.load_state_dict(resnet18)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    torch.save(averaged.state_dict(), tmp_path / "swa.pth")
    weight = build_model("resnet18", weights=tmp_path / "swa.pth").base_model.conv1.weight
    assert torch.equal(weight, resnet18["conv1.weight"])


def test_safetensors_are_known_by_their_content(tmp_path):
    state = build_model("resnet_small").base_model.state_dict()
    save_file({key: value.numpy() for key, value in state.items()}, tmp_path / "weights.bin")
    loaded = build_model("resnet_small", weights=tmp_path / "weights.bin").base_model
    assert torch.equal(loaded.conv1.weight, state["conv1.weight"])


def test_auto_takes_torchvisions_imagenet_weights(resnet18, monkeypatch):
    calls = []

    def get_state_dict(self, **options):
        calls.append((str(self), options["check_hash"]))
        return resnet18

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", get_state_dict)
    model = build_model("resnet18", weights="auto")
    assert calls == [("ResNet18_Weights.IMAGENET1K_V1", True)]
    assert torch.equal(model.base_model.conv1.weight, resnet18["conv1.weight"])


# ----------------------------------------------------------------------------------- refused


def assert_refused(path: Path, *words: str, backbone: str = "resnet_small") -> None:
    with pytest.raises(UserError) as caught:
        build_model(backbone, weights=path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    for word in words:
        assert word in message


def test_weights_of_another_backbone(tmp_path, resnet18):
    path = tmp_path / "resnet18.pth"
    torch.save(resnet18, path)
    assert_refused(path, "not the weights of resnet50", backbone="resnet50")
    assert_refused(
        path, "the file holds conv1.weight", "expected were 0.7x7_s2.weight", backbone="googlenet"
    )
    assert_refused(path, "layer1.2.conv1.weight is missing", backbone="resnet34")
    deeper = torchvision.models.resnet34(weights=None).state_dict()
    torch.save(deeper, path)
    assert_refused(path, "is not in this network", backbone="resnet18")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"layer2.0.conv1.weight": None}, "layer2.0.conv1.weight is missing (1 names"),
        ({"layer2.7.conv1.weight": torch.zeros(2)}, "layer2.7.conv1.weight is not in this network"),
        ({"layer1.0.bn1.bias": torch.zeros(5)}, "has the shape (5,), not (32,)"),
        ({"layer1.0.bn1.bias": torch.full((32,), torch.nan)}, "holds NaN or infinite values"),
        ({"layer1.0.bn1.bias": torch.zeros(32).to_sparse()}, "is not a plain tensor"),
    ],
)
def test_nearly_right_weights(tmp_path, changes, words):
    state = build_model("resnet_small").base_model.state_dict() | changes
    path = tmp_path / "near.pth"
    torch.save({name: value for name, value in state.items() if value is not None}, path)
    assert_refused(path, next(iter(changes)), words)


def test_files_without_weights(tmp_path):
    for content in ({"epoch": 3}, torch.zeros(3)):
        torch.save(content, tmp_path / "other.pth")
        assert_refused(tmp_path / "other.pth", "holds no named tensors")
    with h5py.File(tmp_path / "counts.h5", "w") as file:
        file["image_count"] = np.arange(4)
    assert_refused(tmp_path / "counts.h5", "holds no floating-point arrays")


@pytest.mark.parametrize(
    "name, save", [("a.pth", save_state), ("a.h5", save_hdf5), ("a.safetensors", save_file)]
)
def test_damaged_and_missing_files(tmp_path, name, save):
    path = tmp_path / name
    state = build_model("resnet_small").base_model.state_dict()
    save({key: value.numpy() for key, value in state.items()}, path)
    build_model("resnet_small", weights=path)
    content = path.read_bytes()
    for damaged in (b"", b"a plain text\n" * 20, content[: len(content) // 2], content[:-100]):
        path.write_bytes(damaged)
        assert_refused(path)
    assert_refused(tmp_path / f"none_{name}", "no such file")
    assert_refused(tmp_path, "a folder")


def test_a_failed_download_says_the_way_out(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise urllib.error.URLError("no route\nto host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"weights of resnet18 \(.*no route to host.*; fetch"):
        build_model("resnet18", weights="auto")


# ------------------------------------------------------------------ real weights, real images


@pytest.mark.shared
@pytest.mark.slow
def test_real_weights_retrieve_real_birds(shared):
    """Frozen features tell eight species apart, far above the chance of 1 in 8."""
    model = build_model("resnet18", weights=shared / "weights/resnet18_imagenet1k_v1_fp16.pth")
    species = sorted((shared / "data" / "cub200" / "images").iterdir())[::12][:8]
    files = [path for folder in species for path in sorted(folder.iterdir())[:20]]
    images = []
    for path in files:
        square = Image.open(path).convert("RGB").resize((256, 256), Image.Resampling.LANCZOS)
        images.append(np.asarray(square)[16:240, 16:240])
    batches = torch.from_numpy(np.stack(images)).split(40)
    (pooled,) = pooled_features(model, batches)
    embeddings = embeddings_of(model, pooled)
    assert pooled.shape == (160, 512) and embeddings.shape == (160, 128)
    labels = np.repeat(np.arange(8), 20)
    assert recall_at_k(torch.nn.functional.normalize(pooled), labels)[1] > 0.5
