"""Files from strangers: nothing in them runs, none reaches out of its folder, none unpacks to more than it is worth.

Every kind of file that the project reads is here: checkpoints, pretrained weights (torch and HDF5), arrays, lists of
images, annotations, images, settings.
"""

from __future__ import annotations

import ast
import copy
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import hickle
import numpy as np
import pytest
import torch
from PIL import Image
from raw_folders import make_cars, make_cub, save_photo
from scipy.io import savemat
from scripts import ROOT, failed, run_in_process
from synthetic import Malicious, write_dataset

from datasets import load_split
from models import build_model, load_checkpoint
from models.weights import read_hdf5_arrays, read_torch_file
from pre_process import image_arrays
from pre_process.pre_process_car196 import MOST_MEMORY, load_annotations
from utils.errors import UserError
from utils.process import memory_limited

pytestmark = pytest.mark.usefixtures("one_thread")
SPARE = 200 * 2**20  # bytes that a refusal may take: far below what each bomb here claims


def refused(read: Callable[[], object], *words: str) -> None:
    """`read` raises a UserError with these words, and takes little memory: with more than `SPARE` it could not."""
    with memory_limited(SPARE), pytest.raises(UserError) as caught:
        read()
    message = str(caught.value)
    assert "MemoryError" not in message
    for word in words:
        assert str(word) in message, message


# ---------------------------------------------------------------- pickles that run code


def save_zip(content: object, path: Path) -> None:
    torch.save(content, path)


def save_legacy(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def state_of(n_cluster: int = 4) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return build_model("resnet_small", n_cluster, 8).state_dict()


HOLDERS = {  # where in the content of a torch file the object lies
    "alone": lambda bomb: bomb,
    "beside the weights": lambda bomb: {"model": state_of(), "epoch": 1, "config": bomb},
    "among the weights": lambda bomb: {"model": state_of() | {"bomb": bomb}, "epoch": 1},
    "as a key": lambda bomb: {"model": state_of(), "epoch": 1, "config": {(1, bomb): 2}},
}


@pytest.mark.parametrize("save", [save_zip, save_legacy, save_pickle])
@pytest.mark.parametrize("holder", HOLDERS)
def test_a_pickle_in_a_torch_file_does_not_run(tmp_path, save, holder):
    trace, path = tmp_path / "executed", tmp_path / "a.pth"
    save(HOLDERS[holder](Malicious(trace)), path)
    commands = {
        "checkpoint": ("test.py", "--checkpoint_path", path),
        "weights of test.py": ("test.py", "--backbone", "resnet_small", "--weights", path),
        "weights of train.py": ("train.py", "--backbone", "resnet_small", "--weights", path, "--batch_size", 8,
                                "--n_cluster", 4, "--checkpoint_dir", tmp_path / "runs"),
    }  # fmt: skip
    write_dataset(tmp_path / "data")
    for command in commands.values():
        outcome = run_in_process(*command, "--data_dir", tmp_path / "data", "--dataset", "tiny", "--device", "cpu")
        failed(outcome, f"{path}: refused", "")
    assert not trace.exists() and not (tmp_path / "runs").exists()
    if save is save_pickle:
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert trace.exists()  # the test would prove nothing if the object were harmless


def test_a_pickle_in_a_run_that_is_resumed_does_not_run(tmp_path):
    write_dataset(tmp_path / "data")
    options = ["--data_dir", tmp_path / "data", "--dataset", "tiny", "--backbone", "resnet_small", "--weights", "none",
               "--device", "cpu", "--batch_size", 8, "--n_cluster", 4, "--n_epoch", 0]  # fmt: skip
    where = ["--checkpoint_dir", tmp_path / "runs", "--model_name", "run"]
    assert run_in_process("train.py", *options, *where).code == 0
    last, trace = tmp_path / "runs" / "run" / "last.pth", tmp_path / "executed"
    for name in ("metrics", "rng", "optimizer"):
        torch.save(torch.load(last) | {name: Malicious(trace)}, tmp_path / "bad.pth")
        kept = last.read_bytes()
        (tmp_path / "bad.pth").replace(last)
        failed(run_in_process("train.py", "--resume", last.parent, "--n_epoch", 1), f"{last}: refused", "run code")
        assert not trace.exists()
        last.write_bytes(kept)


def test_a_pickle_in_googlenet_h5_does_not_run(tmp_path):
    path, trace = tmp_path / "googlenet.h5", tmp_path / "executed"
    arrays = {name: v.numpy() for name, v in build_model("resnet_small").base_model.state_dict().items() if v.dim()}
    with pytest.warns(hickle.lookup.SerializedWarning):
        hickle.dump({**arrays, "bomb": Malicious(trace)}, path)
    model = build_model("resnet_small", weights=path)
    np.testing.assert_array_equal(model.base_model.conv1.weight.detach().numpy(), arrays["conv1.weight"])
    assert not trace.exists()
    hickle.load(path)  # the test would prove nothing if the object were harmless
    assert trace.exists()


@pytest.mark.parametrize("half", ["training", "validation"])
@pytest.mark.parametrize("kind", ["img", "label"])
@pytest.mark.parametrize("form", ["npy", "npz", "pickle"])
def test_a_pickle_in_an_array_does_not_run(tmp_path, half, kind, form):
    write_dataset(tmp_path)
    path, trace = tmp_path / "tiny" / f"{half}_tiny_32resized_{kind}.npy", tmp_path / "executed"
    bomb = np.array([Malicious(trace)] * 24, dtype=object)
    with open(path, "wb") as file:
        if form == "npy":
            np.save(file, bomb)
        elif form == "npz":
            np.savez(file, bomb)
        else:
            pickle.dump(bomb, file)
    refused(lambda: load_split(tmp_path, "tiny", half), path, "not a plain .npy array")
    assert not trace.exists()
    loaded = np.load(path, allow_pickle=True)  # the test would prove nothing if the object were harmless
    assert (loaded["arr_0"] if form == "npz" else loaded) is not None and trace.exists()


@pytest.mark.parametrize("name", ["options.json", "cars_annos.mat", "images.txt", "photo.jpg"])
def test_a_pickle_in_any_other_place_does_not_run(tmp_path, name):
    trace = tmp_path / "executed"
    raw = {"cars_annos.mat": make_cars, "images.txt": make_cub, "photo.jpg": make_cub}.get(name)
    folder = raw(tmp_path / ("car196" if raw is make_cars else "cub200")) if raw else tmp_path
    path = next(folder.rglob("*.jpg")) if name == "photo.jpg" else folder / name
    path.write_bytes(pickle.dumps(Malicious(trace)))
    if raw is None:
        outcome = run_in_process("train.py", "--config", path)
    else:
        outcome = run_in_process(f"pre_process_{folder.name}.py", "--data_dir", tmp_path, "--workers", 1)
    failed(outcome, path)
    assert not trace.exists()


# what can run code in a file, and with which argument it does not
UNSAFE = {"pickle.load", "pickle.loads", "pickle.Unpickler", "hickle.load", "joblib.load", "marshal.loads", "eval",
          "exec", "yaml.load", "shelve.open", "torch.hub.load", "torch.jit.load", "np.genfromtxt"}  # fmt: skip
SAFE_WITH = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "np.lib.format.read_array": ("allow_pickle", False),
}


def test_no_file_is_read_in_a_way_that_could_run_it():
    """Of all calls in the project's own code."""
    seen = set()
    for path in sorted(ROOT.rglob("*.py")):
        if {"tests", ".venv"} & set(path.relative_to(ROOT).parts):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                seen.add(called)
                assert called not in UNSAFE, (path, node.lineno)
                if called in SAFE_WITH:
                    name, value = SAFE_WITH[called]
                    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                    default = str(value) if called.startswith("np.") else None  # numpy's own since 1.16.3
                    assert given.get(name, default) == str(value), (path, node.lineno)
    assert {"torch.load", "np.lib.format.open_memmap"} <= seen


# ---------------------------------------------------------------- paths


OUTSIDE = ["../secret.jpg", "a/../../secret.jpg", "/secret.jpg", "//host/secret.jpg", r"..\secret.jpg",
           r"C:\secret.jpg", r"C:secret.jpg", r"\\host\share\secret.jpg", "a/b/../../../secret.jpg", ".."]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("dataset", ["cub200", "car196"])
def test_listed_paths_stay_in_the_data_folder(tmp_path, dataset, name):
    raw = tmp_path / dataset
    save_photo(tmp_path / "secret.jpg", seed=1)
    save_photo(raw / "secret.jpg", seed=1)
    if dataset == "cub200":
        make_cub(raw)
        with open(raw / "images.txt", "a") as images, open(raw / "image_class_labels.txt", "a") as labels:
            images.write(f"99 {name}\n")
            labels.write("99 1\n")
    else:
        make_cars(raw, [("car_ims/000001.jpg", 196), ("car_ims/000002.jpg", 1), (name, 2)])
    outcome = run_in_process(f"pre_process_{dataset}.py", "--data_dir", tmp_path, "--workers", 1)
    failed(outcome, "leaves the data folder", repr(name)[1:-1])
    assert not list(raw.glob("*.npy"))


def test_links_stay_in_the_data_folder(tmp_path):
    """A link within the folder is as good as a file; the one that leads out is told from it."""
    folder = tmp_path / "images"
    save_photo(folder / "a" / "real.jpg", seed=1)
    save_photo(tmp_path / "secret.jpg", seed=2)
    links = {"a/inside.jpg": "real.jpg", "a/out.jpg": "../../secret.jpg", "a/gone.jpg": "/nowhere/a.jpg",
             "a/loop.jpg": "loop.jpg", "b": "..", "c": "a"}  # fmt: skip
    for name, target in links.items():
        (folder / name).symlink_to(target)
    for name in ("a/real.jpg", "a/inside.jpg", "c/real.jpg", "a/loop.jpg"):
        assert image_arrays.image_path(folder, name, "list") == folder / name
    for name in ("a/out.jpg", "a/gone.jpg", "b/secret.jpg", "c/out.jpg"):
        refused(
            lambda name=name: image_arrays.image_path(folder, name, "list"), "list: ", name, "out of the data folder"
        )
    (tmp_path / "moved").symlink_to(folder)  # the user's own link to where the images are
    assert image_arrays.image_path(tmp_path / "moved", "a/real.jpg", "list") == tmp_path / "moved" / "a" / "real.jpg"
    assert image_arrays.image_path(tmp_path, "moved/a/real.jpg", "list", linked="moved").is_file()


def test_weights_kept_in_another_hdf5_file_are_not_followed(tmp_path):
    (tmp_path / "elsewhere.bin").write_bytes(np.ones(4, np.float32).tobytes())
    with h5py.File(tmp_path / "elsewhere.h5", "w") as file:
        file["secret"] = np.ones(4, np.float32)
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource(str(tmp_path / "elsewhere.h5"), "secret", (4,))
    with h5py.File(tmp_path / "links.h5", "w") as file:
        file.create_dataset("external", (4,), "f4", external=[(str(tmp_path / "elsewhere.bin"), 0, 16)])
        file.create_virtual_dataset("virtual", layout)
        file["linked"] = h5py.ExternalLink(str(tmp_path / "elsewhere.h5"), "secret")
        file["own"] = np.zeros(2, np.float32)
        assert file["external"][()].sum() == file["virtual"][()].sum() == file["linked"][()].sum() == 4
    assert list(read_hdf5_arrays(tmp_path / "links.h5")) == ["own"]


# ---------------------------------------------------------------- bombs


def entries_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_a_compressed_checkpoint_is_refused(tmp_path):
    """300 MB of zeros in a file of 2 MB, which torch itself would unpack."""
    path = tmp_path / "bomb.pth"
    torch.save({"model": {"a": torch.zeros(9)}}, path)
    entries = entries_of(path)
    storage = next(name for name in entries if name.endswith("/data/0"))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in entries.items():
            if name == storage:
                with archive.open(name, "w") as out:
                    for _ in range(300):
                        out.write(bytes(2**20))
            else:
                archive.writestr(name, content)
    assert path.stat().st_size < 2 * 10**6
    refused(lambda: load_checkpoint(path), path, "refused: it unpacks to more than it holds")


def test_a_checkpoint_whose_parts_overlap_is_refused(tmp_path):
    """The same bytes listed under many names, as the densest archives do."""
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", bytes(10_000))
        for n in range(100):
            again = copy.copy(archive.filelist[0])
            again.filename = f"a/data/{n}"
            archive.filelist.append(again)
    refused(lambda: read_torch_file(path), path, "refused: it unpacks to more than it holds")


def claims(folder: Path, kind: str) -> Path:
    """A small file with a tensor that says it has 2 ** 30 numbers."""
    path = folder / "claims.pth"
    state = state_of()
    if kind == "repeated":  # a single number, seen from everywhere
        state["feat_ext.0.weight"] = torch.zeros(()).expand(2**23, 128)
        torch.save({"model": state}, path)
        return path
    torch.save({"model": {"feat_ext.0.weight": torch.zeros(4)}}, path, _use_new_zipfile_serialization=kind != "legacy")
    small, large = b"K\x04\x85", b"J" + struct.pack("<i", 2**30) + b"\x85"  # the pickled sizes (4,) and (2**30,)
    if kind == "legacy":
        content = path.read_bytes()
        assert content.count(small) == 1
        path.write_bytes(content.replace(small, large))
        return path
    entries = entries_of(path)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            assert content.count(small) == name.endswith("data.pkl")
            archive.writestr(name, content.replace(small, large))
    return path


@pytest.mark.parametrize("kind", ["repeated", "zip", "legacy"])
def test_a_tensor_that_claims_more_than_its_file_is_refused(tmp_path, kind):
    path = claims(tmp_path, kind)
    assert path.stat().st_size < 5 * 10**6
    refused(lambda: load_checkpoint(path), path)
    refused(lambda: build_model("resnet_small", weights=path), path)


@pytest.mark.parametrize("form", [{"chunks": (1024, 1024)}, {"chunks": (1024, 1024), "compression": "gzip"}])
def test_an_hdf5_dataset_that_claims_a_huge_shape_is_refused(tmp_path, form):
    path = tmp_path / "claims.h5"
    with h5py.File(path, "w") as file:
        file["small"] = np.zeros(3, np.float32)
        file.create_dataset("conv1.weight", (2**20, 2**20), "f4", **form)
    assert path.stat().st_size < 10**5
    refused(lambda: read_hdf5_arrays(path), path, "conv1.weight claims the shape (1048576, 1048576)")


def test_many_hdf5_datasets_that_claim_too_much_together_are_refused(tmp_path):
    path = tmp_path / "claims.h5"
    with h5py.File(path, "w") as file:
        for n in range(33):
            file.create_dataset(f"a{n:02d}", (2**12, 2**11), "f4", chunks=(1024, 1024))
    with pytest.raises(UserError, match=r"a32 claims the shape \(4096, 2048\)"):  # 32 of them are 1 GiB
        read_hdf5_arrays(path)


@pytest.mark.parametrize("kind", ["img", "label"])
@pytest.mark.parametrize("count", [10**9, 10**12, 2**62, 2**64])
def test_an_array_that_claims_a_huge_shape_takes_no_memory(tmp_path, kind, count):
    write_dataset(tmp_path)
    shape, descr = ((count, 32, 32, 3), "|u1") if kind == "img" else ((count,), "<i8")
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    path = tmp_path / "tiny" / f"training_tiny_32resized_{kind}.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(1000))
    refused(lambda: load_split(tmp_path, "tiny", "training"), path, "truncated")


def mat_with(path: Path, change: Callable[[bytes], bytes]) -> Path:
    annotations = np.empty((1, 3), dtype=[("relative_im_path", object), ("class", object)])
    for n in range(3):
        annotations[0, n] = (f"car_ims/{n}.jpg", n + 1)
    savemat(path, {"annotations": annotations})
    path.write_bytes(change(path.read_bytes()))
    return path


def test_annotations_that_claim_a_huge_shape_are_refused(tmp_path):
    dimensions = struct.pack("<iiii", 5, 8, 1, 3)  # tag and values of the size 1 x 3
    huge = struct.pack("<iiii", 5, 8, 2**15, 2**16)

    def change(content: bytes) -> bytes:
        assert content.count(dimensions) == 1
        return content.replace(dimensions, huge)

    path = mat_with(tmp_path / "cars_annos.mat", change)
    with pytest.raises(UserError, match=f"claims arrays of more than {MOST_MEMORY // 10**6} MB"):
        load_annotations(path)


def test_annotations_that_unpack_without_end_are_refused(tmp_path):
    """A compressed variable that says it has 2 GB of zeros, of which the first 20 MB are there."""
    size = 2**31 - 2**20
    squeeze = zlib.compressobj(9)
    head = struct.pack("<IIIIII", 14, size, 6, 8, 6, 0) + struct.pack("<iiii", 5, 8, 1, size // 8)
    head += struct.pack("<II", 1, 11) + b"annotations".ljust(16, b"\0") + struct.pack("<II", 9, size // 8 * 8)
    packed = squeeze.compress(head) + squeeze.compress(bytes(20 * 2**20)) + squeeze.flush()
    path = mat_with(
        tmp_path / "cars_annos.mat", lambda content: content[:128] + struct.pack("<II", 15, len(packed)) + packed
    )
    with pytest.raises(UserError, match="claims arrays of more than"):
        load_annotations(path)


def test_an_image_of_too_many_pixels_is_refused(tmp_path, monkeypatch):
    Image.new("L", (100, 101)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 101)
    assert image_arrays.read_image(tmp_path / "a.png", 8).shape == (8, 8, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 101 - 1)  # Pillow itself would only warn
    refused(lambda: image_arrays.read_image(tmp_path / "a.png", 8), "a.png: ", "exceeds limit")


@pytest.mark.parametrize("kind", ["zTXt", "iCCP"])
def test_remarks_in_an_image_are_not_unpacked_without_end(tmp_path, kind):
    """250 MB in a chunk beside the pixels: the image is read without it, or refused."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    squeeze = zlib.compressobj(1)
    packed = b"".join(squeeze.compress(bytes(2**20)) for _ in range(250)) + squeeze.flush()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    end_of_header = content.index(b"IDAT") - 4
    bomb = chunk(kind.encode(), b"name\0\0" + packed)
    (tmp_path / "a.png").write_bytes(content[:end_of_header] + bomb + content[end_of_header:])
    with memory_limited(SPARE):
        try:
            assert image_arrays.read_image(tmp_path / "a.png", 8).shape == (8, 8, 3)
        except UserError as error:
            assert "a.png" in str(error) and "MemoryError" not in str(error)


def test_settings_of_any_size_are_not_read(tmp_path):
    with open(tmp_path / "a.json", "wb") as file:
        file.truncate(10**12)  # zeros that take no place on the disk
    with memory_limited(SPARE):
        failed(run_in_process("train.py", "--config", tmp_path / "a.json"), "a.json: larger than")
    (tmp_path / "b.json").write_text(json.dumps({"lr": 0.1}))
    assert os.path.getsize(tmp_path / "b.json") < 100


def test_the_limit_of_memory_holds_and_is_lifted():
    """In a process of its own: this one holds freed memory, which it may use again."""
    code = (
        "from utils.process import memory_limited\n"
        "try:\n"
        "    with memory_limited(50 * 2**20): bytearray(200 * 2**20)\n"
        "except MemoryError: print('held', len(bytearray(200 * 2**20)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == (f"held {200 * 2**20}\n", "")
