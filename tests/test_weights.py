"""Pretrained backbone weights from every kind of file, and what is said of files that do not fit."""

from __future__ import annotations

import urllib.error
from pathlib import Path

import h5py
import hickle
import numpy as np
import pytest
import torch
import torchvision

from models import build_model, weights
from models.googlenet import CAFFE_BLOCKS
from models.weights import read_hdf5_arrays, read_torch_file
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
GOLDEN = Path(__file__).parent / "golden"
CAFFE_NAMES = {str(place): name for name, place in CAFFE_BLOCKS.items()}


@pytest.fixture(scope="module")
def caffe_arrays() -> dict[str, np.ndarray]:
    """A full GoogLeNet by its Caffe names, every value its own, and the classifier that such files hold too."""
    rng = np.random.default_rng(3)
    arrays = {}
    for name, value in build_model("googlenet").base_model.state_dict().items():
        place, rest = name.split(".", 1)
        arrays[f"{CAFFE_NAMES[place]}.{rest}"] = 0.01 * rng.standard_normal(value.shape).astype(np.float32)
    arrays["loss3.classifier.weight"] = rng.standard_normal((10, 1024)).astype(np.float32)
    arrays["loss3.classifier.bias"] = np.zeros(10, np.float32)
    return arrays


def assert_filled(model: torch.nn.Module, arrays: dict[str, np.ndarray]) -> None:
    state = model.base_model.state_dict()
    assert len(state) == len(arrays) - 2  # all but the classifier
    for name, value in state.items():
        place, rest = name.split(".", 1)
        np.testing.assert_array_equal(value.numpy(), arrays[f"{CAFFE_NAMES[place]}.{rest}"])


# ---------------------------------------------------------------- HDF5


@pytest.mark.parametrize("name", ["hickle_3_4_9_sample.h5", "hickle_5_0_3_sample.h5"])
def test_both_hickle_layouts(name):
    arrays = read_hdf5_arrays(GOLDEN / name)
    shapes = {key: tuple(value.shape) for key, value in arrays.items()}
    assert shapes == {"conv1.7x7_s2.weight": (4, 3, 2, 2), "inception_3a.3x3_reduce.bias": (4,)}
    stored = {}
    with h5py.File(GOLDEN / name) as file:
        file.visititems(lambda _, item: stored.update({item.shape: item[()]}) if hasattr(item, "dtype") else None)
    for value in arrays.values():
        assert value.dtype == torch.float32
        np.testing.assert_array_equal(value.numpy(), stored[tuple(value.shape)])
        assert len(value.unique()) > 1


@pytest.mark.parametrize("backbone", ["googlenet", "googlenet_caffe"])
def test_a_full_hickle_file_fills_the_backbone(tmp_path, caffe_arrays, backbone):
    path = tmp_path / "googlenet.h5"
    hickle.dump(caffe_arrays, path)
    assert_filled(build_model(backbone, weights=path), caffe_arrays)


@pytest.mark.parametrize("separator", ["/", "."])
def test_a_plain_hdf5_file_fills_the_backbone(tmp_path, caffe_arrays, separator):
    path = tmp_path / "plain.hdf5"
    with h5py.File(path, "w") as file:
        for name, value in caffe_arrays.items():
            block, layer, kind = name.split(".")
            file[separator.join((block, layer, kind))] = value
    assert_filled(build_model("googlenet", weights=str(path)), caffe_arrays)


def test_hdf5_is_known_by_its_content_too(tmp_path, caffe_arrays):
    path = tmp_path / "weights.bin"
    with h5py.File(path, "w") as file:
        for name, value in caffe_arrays.items():
            file[name] = value.astype(np.float64)
    assert_filled(build_model("googlenet", weights=path), caffe_arrays)


def test_auto_takes_the_file_beside_the_models(tmp_path, caffe_arrays, monkeypatch):
    path = tmp_path / "googlenet.h5"
    hickle.dump(caffe_arrays, path)
    monkeypatch.setattr(weights, "GOOGLENET_FILE", path)
    assert_filled(build_model("googlenet", weights="auto"), caffe_arrays)


@pytest.mark.parametrize("content", [{"image_count": np.arange(4)}, {}])
def test_hdf5_without_floating_point_arrays_is_refused(tmp_path, content):
    path = tmp_path / "counts.h5"
    with h5py.File(path, "w") as file:
        for name, value in content.items():
            file[name] = value
    with pytest.raises(UserError, match=f"{path}: holds no floating-point arrays"):
        build_model("googlenet", weights=path)


# ---------------------------------------------------------------- torch files


@pytest.mark.parametrize("wrap", [
    lambda state: state,
    lambda state: {"state_dict": state},
    lambda state: {"model": {f"module.base_model.{name}": value for name, value in state.items()}, "epoch": 3},
])  # fmt: skip
def test_a_torch_file_fills_the_backbone(tmp_path, caffe_arrays, wrap):
    path = tmp_path / "googlenet.pth"
    torch.save(wrap({name: torch.from_numpy(value) for name, value in caffe_arrays.items()}), path)
    assert_filled(build_model("googlenet", weights=path), caffe_arrays)


def test_a_checkpoint_of_this_network_gives_its_backbone(tmp_path):
    source = build_model("resnet_small", 7, 9)
    torch.save({"model": source.state_dict(), "epoch": 1}, tmp_path / "run.pth")
    model = build_model("resnet_small", 4, 3, tmp_path / "run.pth")
    for name, value in source.base_model.state_dict().items():
        assert torch.equal(model.base_model.state_dict()[name], value)


@pytest.fixture(scope="module")
def resnet18() -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return torchvision.models.resnet18(weights=None).state_dict()


def test_torchvisions_own_file_of_halves_with_its_classifier(tmp_path, resnet18):
    assert "fc.weight" in resnet18
    path = tmp_path / "resnet18.pth"
    torch.save({name: v.half() if v.is_floating_point() else v for name, v in resnet18.items()}, path)
    state = build_model("resnet18", weights=path).base_model.state_dict()
    assert state["conv1.weight"].dtype == torch.float32
    for name, value in state.items():
        expected = resnet18[name].half().float() if value.is_floating_point() else resnet18[name]
        assert torch.equal(value, expected), name


def test_counters_may_be_missing(tmp_path, resnet18):
    path = tmp_path / "old.pth"
    torch.save({name: v for name, v in resnet18.items() if not name.endswith("num_batches_tracked")}, path)
    model = build_model("resnet18", weights=path)
    assert torch.equal(model.base_model.layer4[1].bn2.weight, resnet18["layer4.1.bn2.weight"])


def test_auto_takes_torchvisions_imagenet_weights(resnet18, monkeypatch):
    def get_state_dict(self, *args, **kwargs):
        asked.append((str(self), kwargs.get("check_hash")))
        return resnet18

    asked = []
    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", get_state_dict)
    model = build_model("resnet18", weights="auto")
    assert asked == [("ResNet18_Weights.IMAGENET1K_V1", True)]
    assert torch.equal(model.base_model.conv1.weight, resnet18["conv1.weight"])


# ---------------------------------------------------------------- refused


def refused(path: Path, *words: str, backbone: str = "resnet_small") -> None:
    with pytest.raises(UserError) as caught:
        build_model(backbone, weights=path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    for word in words:
        assert word in message


def test_the_wrong_backbone_is_named(tmp_path, resnet18):
    path = tmp_path / "resnet18.pth"
    torch.save(resnet18, path)
    refused(path, "not the weights of resnet50", "choose the --backbone", backbone="resnet50")
    refused(path, "not the weights of googlenet", "0.7x7_s2.weight", backbone="googlenet")


def test_missing_arrays_are_counted_and_the_first_is_named(tmp_path):
    state = build_model("resnet_small").base_model.state_dict()
    del state["layer2.0.conv1.weight"], state["layer3.0.bn1.bias"]
    torch.save(state, tmp_path / "holes.pth")
    refused(tmp_path / "holes.pth", "2 of ", "the first is layer2.0.conv1.weight")


def test_wrong_shapes_are_named(tmp_path):
    state = build_model("resnet_small").base_model.state_dict()
    state["layer1.0.bn1.bias"] = torch.zeros(5)
    torch.save(state, tmp_path / "shapes.pth")
    refused(tmp_path / "shapes.pth", "layer1.0.bn1.bias has shape (5,), expected (32,)")


@pytest.mark.parametrize("content", [{"epoch": 3}, torch.zeros(3), [torch.zeros(3)], {}, {0: torch.zeros(3)}])
def test_a_torch_file_without_named_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "else.pth")
    refused(tmp_path / "else.pth", "holds no named tensors")


@pytest.mark.parametrize("name", ["weights.pth", "weights.h5"])
@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 100, b"a plain text\n" * 20, b"PK\x03\x04 no zip", b"\x89HDF\r\n\x1a\n"]
)
def test_other_files_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name)


def test_missing_files_and_folders_are_refused(tmp_path):
    refused(tmp_path / "none.pth", "no such file")
    refused(tmp_path, "a folder")
    with pytest.raises(UserError, match="no such file"):
        read_torch_file(tmp_path / "none.pth")
    with pytest.raises(UserError, match="not a readable HDF5 file"):
        read_hdf5_arrays(tmp_path / "none.h5")


@pytest.mark.parametrize("kind", ["zip", "legacy", "h5"])
def test_truncated_files_are_refused_wherever_they_end(tmp_path, kind):
    state = build_model("resnet_small").base_model.state_dict()
    whole = tmp_path / f"whole.{kind}"
    if kind == "h5":
        hickle.dump({name: value.numpy() for name, value in state.items() if value.dim()}, whole)
    else:
        torch.save(state, whole, _use_new_zipfile_serialization=kind == "zip")
    content = whole.read_bytes()
    build_model("resnet_small", weights=whole)
    for share in (0.001, 0.02, 0.3, 0.7, 0.95, 0.999):
        cut = tmp_path / f"cut.{kind}"
        cut.write_bytes(content[: int(share * len(content))])
        refused(cut)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_pickles_are_refused(tmp_path):
    """Any byte of the first part of a torch file may be wrong: never anything but a UserError, or the right shapes."""
    torch.save({"a": torch.zeros(2)}, tmp_path / "small.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "small.pth").read_bytes()
    rng, faults = np.random.default_rng(0), 0
    for _ in range(150):
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] = rng.integers(256)
        (tmp_path / "damaged.pth").write_bytes(damaged)
        try:
            read_torch_file(tmp_path / "damaged.pth")
        except UserError as error:
            faults += 1
            assert str(tmp_path / "damaged.pth") in str(error)
    assert faults > 50


@pytest.mark.parametrize("backbone", ["googlenet", "googlenet_caffe"])
def test_missing_googlenet_file_says_where_it_comes_from(tmp_path, monkeypatch, backbone):
    monkeypatch.setattr(weights, "GOOGLENET_FILE", tmp_path / "googlenet.h5")
    refused_words = ("github.com/vadimkantorov/metriclearningbench", "--weights FILE", "--backbone", "resnet18",
                     "--weights none")  # fmt: skip
    with pytest.raises(UserError) as caught:
        build_model(backbone, weights="auto")
    for word in (str(tmp_path / "googlenet.h5"), "no such file", *refused_words):
        assert word in str(caught.value)


@pytest.mark.parametrize("fault", [
    urllib.error.URLError("no route to host"), TimeoutError("timed out"), RuntimeError("invalid hash value"),
])  # fmt: skip
def test_a_failed_download_names_the_url_and_the_way_out(monkeypatch, tmp_path, fault):
    def fail(*args, **kwargs):
        raise fault

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError) as caught:
        build_model("resnet18", weights="auto")
    for word in ("https://download.pytorch.org/models/resnet18-", "--weights FILE", "--weights none", str(fault)):
        assert word in str(caught.value)


# ---------------------------------------------------------------- real weights on real images


@pytest.mark.shared
def test_real_weights_retrieve_real_birds(shared):
    """Frozen pooled features of eight species: far above the chance of 1 in 8."""
    from PIL import Image

    from utils.features import extract_features
    from utils.metrics import recall_at_k

    model = build_model("resnet18", weights=shared / "weights" / "resnet18_imagenet1k_v1_fp16.pth")
    folders = sorted((shared / "data" / "cub200" / "images").iterdir())[::12][:8]
    files = [(path, label) for label, folder in enumerate(folders) for path in sorted(folder.iterdir())[:20]]
    images = [
        np.asarray(Image.open(path).convert("RGB").resize((256, 256), Image.Resampling.LANCZOS))[16:240, 16:240]
        for path, _ in files
    ]
    batches = [torch.from_numpy(np.stack(images[i : i + 40])) for i in range(0, len(images), 40)]
    pooled, embeddings = extract_features(model, batches)
    assert pooled.shape == (len(files), 512) and embeddings.shape == (len(files), 128)
    recall = recall_at_k(pooled, torch.tensor([label for _, label in files]))
    assert len(files) == 160 and recall[1] > 0.5
