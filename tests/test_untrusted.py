"""Files from strangers: nothing in them runs, and what is harmless in them is read."""

from __future__ import annotations

import argparse
import ast
import datetime
import pickle
from pathlib import Path

import hickle
import numpy as np
import pytest
import torch
from synthetic import Malicious, write_dataset

from datasets.arrays import load_split
from models import build_model, load_checkpoint
from utils.errors import UserError
from utils.runs import RunFolder
from utils.torch_files import read_torch_file

pytestmark = pytest.mark.usefixtures("one_thread")


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return build_model("resnet_small", 4, 8).state_dict()


def save_zip(content: object, path: Path) -> None:
    torch.save(content, path)


def save_legacy(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


HOLDERS = {  # where in a torch file the object lies
    "alone": lambda bomb: bomb,
    "beside the weights": lambda bomb: {"model": state(), "epoch": 1, "config": bomb},
    "among the weights": lambda bomb: {"model": state() | {"bomb": bomb}, "epoch": 1},
    "in an array": lambda bomb: {"model": state(), "NMI": np.array([bomb], dtype=object)},
}


@pytest.mark.parametrize("save", [save_zip, save_legacy, save_pickle])
@pytest.mark.parametrize("holder", HOLDERS)
def test_a_pickle_in_a_torch_file_does_not_run(tmp_path, save, holder):
    trace = tmp_path / "executed"
    path = tmp_path / "last.pth"
    save(HOLDERS[holder](Malicious(trace)), path)
    with pytest.raises(UserError, match=str(path)):
        load_checkpoint(path)
    with pytest.raises(UserError, match=str(path)):
        build_model("resnet_small", weights=path)
    with pytest.raises(UserError, match=str(path)):
        RunFolder(tmp_path).load({})
    assert not trace.exists()
    if save is save_pickle:
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert trace.exists()  # the test would prove nothing if the object were harmless


def test_a_pickle_in_an_hdf5_file_does_not_run(tmp_path):
    path = tmp_path / "googlenet.h5"
    trace = tmp_path / "executed"
    backbone = build_model("resnet_small").base_model
    arrays = {name: v.numpy() for name, v in backbone.state_dict().items() if v.dim()}
    with pytest.warns(hickle.lookup.SerializedWarning):
        hickle.dump({**arrays, "bomb": Malicious(trace)}, path)
    weights = build_model("resnet_small", weights=path).base_model.conv1.weight
    np.testing.assert_array_equal(weights.detach().numpy(), arrays["conv1.weight"])
    assert not trace.exists()
    hickle.load(path)
    assert trace.exists()


@pytest.mark.parametrize("kind", ["img", "label"])
@pytest.mark.parametrize("write", [np.save, np.savez, lambda file, bomb: pickle.dump(bomb, file)])
def test_a_pickle_in_an_array_does_not_run(tmp_path, kind, write):
    write_dataset(tmp_path)
    path = tmp_path / "tiny" / f"training_tiny_32resized_{kind}.npy"
    trace = tmp_path / "executed"
    with open(path, "wb") as file:
        write(file, np.array([Malicious(trace)] * 24, dtype=object))
    with pytest.raises(UserError, match=f"{path}: not a plain .npy array"):
        load_split(tmp_path, "tiny", "training")
    assert not trace.exists()
    loaded = np.load(path, allow_pickle=True)
    if write is np.savez:
        assert loaded["arr_0"].shape == (24,)
    assert trace.exists()


# ----------------------------------------------------------------------------- numpy's values


NUMPY_VALUES = {
    "NMI": np.float64(0.559),
    "recall": np.float32(0.475),
    "best": np.int64(7),
    "is_best": np.bool_(True),
    "history": np.array([[0.4, 0.5], [0.45, 0.51]]),
    "labels": np.arange(5),
}


def test_options_and_paths_beside_the_weights_are_read(tmp_path):
    path = tmp_path / "trainer.pth"
    options = argparse.Namespace(lr=0.1, out=Path("runs"))
    torch.save({"model": state(), "epoch": 3, "args": options}, path)
    assert load_checkpoint(path)[1]["epoch"] == 3


def test_what_is_refused_is_named(tmp_path):
    torch.save({"model": state(), "when": datetime.date(2020, 1, 1)}, tmp_path / "dated.pth")
    with pytest.raises(UserError, match=r"holds Python objects \(datetime.date\)"):
        load_checkpoint(tmp_path / "dated.pth")
    (tmp_path / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="it begins with b'version https://git-"):
        load_checkpoint(tmp_path / "pointer.pth")


@pytest.mark.parametrize("save", [save_zip, save_legacy])
def test_numpy_values_beside_the_weights_are_read(tmp_path, save):
    path = tmp_path / "authors.pth"
    save({"model": state(), "epoch": 3, **NUMPY_VALUES}, path)
    content = read_torch_file(path)
    for name, value in NUMPY_VALUES.items():
        np.testing.assert_array_equal(content[name], value)
        assert content[name].dtype == value.dtype
    assert load_checkpoint(path)[1]["epoch"] == 3


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_numpy_values_of_any_version_are_read(tmp_path, module):
    """numpy 1 and numpy 2 have their functions in different modules."""
    path = tmp_path / "authors.pth"
    save_legacy({"model": state(), "epoch": 3, **NUMPY_VALUES}, path)
    modules = {b"numpy.core.multiarray", b"numpy._core.multiarray"}
    (other,) = modules - {module}
    content = path.read_bytes().replace(other, module)
    assert content.count(module) >= 2 and other not in content
    path.write_bytes(content)
    loaded = read_torch_file(path)
    assert loaded["NMI"] == 0.559 and loaded["history"].tolist() == [[0.4, 0.5], [0.45, 0.51]]


# ------------------------------------------------------------------------- calls that run code


UNSAFE = {"pickle.load", "pickle.loads", "pickle.Unpickler", "hickle.load", "joblib.load"}
UNSAFE |= {"marshal.loads", "eval", "exec", "yaml.load", "shelve.open", "np.genfromtxt"}
UNSAFE |= {"torch.hub.load", "torch.jit.load"}


def test_no_file_is_read_in_a_way_that_could_run_it(root):
    names = set()
    for path in [*root.glob("*.py"), *root.glob("[!t]*/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            names.add(name)
            call = ast.unparse(node)
            assert name not in UNSAFE, (path, node.lineno)
            assert name != "torch.load" or "weights_only=True" in call, (path, node.lineno)
            assert "allow_pickle=True" not in call, (path, node.lineno)
    assert {"torch.load", "np.lib.format.open_memmap"} <= names
