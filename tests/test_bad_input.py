"""What cannot be is refused: in one line that names it, with exit status 2, in time, and with no file changed.

The cases are a table: a script, its arguments, what is spoilt before, and what the line must say. Each starts from a
sound data set, a finished run of train.py and small raw folders, of which it gets its own copy.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from raw_folders import make_cars, make_cub, name_of, replace_line
from scipy.io import savemat
from scripts import Outcome, failed, path_of, run_in_process
from synthetic import shapes, write_dataset, write_split

from models import build_model
from utils.errors import DivergedError, UserError

pytestmark = pytest.mark.usefixtures("one_thread")
SECONDS = 20  # for a case; all but the real processes take a fraction of one
TRAIN, TEST = "train.py", "test.py"
CUB, CAR, GLYPHS = "pre_process_cub200.py", "pre_process_car196.py", "pre_process_glyphs.py"
BASE = {  # the arguments of a sound command line; {w} is the folder of the case
    TRAIN: {
        "data_dir": "{w}/data", "dataset": "tiny", "backbone": "resnet_small", "weights": "none", "device": "cpu",
        "n_epoch": 1, "batch_size": 8, "n_cluster": 4, "low_dim": 8, "checkpoint_dir": "{w}/runs", "model_name": "new",
    },
    TEST: {"data_dir": "{w}/data", "dataset": "tiny", "device": "cpu"},
    CUB: {"data_dir": "{w}/raw", "out_dir": "{w}/out", "image_size": 8, "workers": 1},
    CAR: {"data_dir": "{w}/raw", "out_dir": "{w}/out", "image_size": 8, "workers": 1},
    GLYPHS: {"data_dir": "{w}/raw", "out_dir": "{w}/out", "image_size": 8, "workers": 1, "per_class": 1},
}  # fmt: skip
FROZEN = {"backbone": "resnet_small", "weights": "none"}  # of test.py


class Case(NamedTuple):
    """A bad input: options that replace those of BASE (None leaves one out), words after them, what is done before."""

    script: str
    options: dict[str, object]
    says: tuple[str, ...]
    spoil: Callable[[Path], object] = lambda w: None
    more: tuple[str, ...] = ()


def argv_of(case: Case, folder: Path) -> list[str]:
    settings = {name: value for name, value in (BASE[case.script] | case.options).items() if value is not None}
    words = [f"--{name}={value}" for name, value in settings.items()] + list(case.more)
    return [word.replace("{w}", str(folder)) for word in words]


# ---------------------------------------------------------------- what is spoilt


def image_file(w: Path, half: str = "training", kind: str = "img", size: int = 32) -> Path:
    return w / "data" / "tiny" / f"{half}_tiny_{size}resized_{kind}.npy"


def put_array(array: np.ndarray, half: str = "training", kind: str = "img") -> Callable[[Path], None]:
    return lambda w: np.save(image_file(w, half, kind), array)


def put_bytes(content: bytes, half: str = "training", kind: str = "img") -> Callable[[Path], None]:
    return lambda w: image_file(w, half, kind).write_bytes(content)


def npy_header(text: str, version: bytes = b"\x01\x00", rest: bytes = bytes(64)) -> bytes:
    """A .npy file with a header of its own making."""
    return b"\x93NUMPY" + version + struct.pack("<H" if version[0] == 1 else "<I", len(text)) + text.encode() + rest


def header_of(shape: str, descr: str = "|u1") -> bytes:
    return npy_header(f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n")


def put_json(content: object) -> Callable[[Path], None]:
    text = content if isinstance(content, str) else json.dumps(content)
    return lambda w: (w / "options.json").write_text(text)


def last(w: Path) -> Path:
    return w / "runs" / "done" / "last.pth"


def change_last(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Write the finished run's last.pth anew after a change."""

    def spoil(w: Path) -> None:
        content = torch.load(last(w))
        change(content)
        torch.save(content, last(w))

    return spoil


def set_weight(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return change_last(lambda content: content["model"].update({name: value(content["model"][name])}))


def change_config(**changed: object) -> Callable[[Path], None]:
    def spoil(w: Path) -> None:
        path = w / "runs" / "done" / "config.json"
        config = json.loads(path.read_text()) | changed
        path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))

    return spoil


def in_an_epoch(**changed: object) -> Callable[[Path], None]:
    """The finished run as if stopped in its second epoch, of which some parts are changed (...: missing)."""
    current = {"positives": None, "clustering": {}, "losses": torch.ones(4, dtype=torch.float64), "step": 2,
               "seconds": {"features": 0.0, "train": 1.0}} | changed  # fmt: skip
    current = {name: value for name, value in current.items() if value is not ...}
    return change_last(lambda content: content.update(current=current))


def rezip(w: Path, compression: int = zipfile.ZIP_STORED, drop: str = "", cut: bool = False) -> None:
    """Write last.pth's archive anew: compressed, or without an entry, or with an entry cut."""
    with zipfile.ZipFile(last(w)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(last(w), "w", compression) as archive:
        for name, content in entries.items():
            if not (drop and name.endswith(drop)):
                archive.writestr(name, content[: len(content) // 2] if cut and name.endswith("data.pkl") else content)


def flip_bytes(w: Path) -> None:
    content = bytearray(last(w).read_bytes())
    content[len(content) // 2] ^= 0xFF
    last(w).write_bytes(content)


def torchscript(w: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its age
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(last(w)))


def hdf5(fill: Callable[[h5py.File], object]) -> Callable[[Path], None]:
    def spoil(w: Path) -> None:
        with h5py.File(w / "w.h5", "w") as file:
            fill(file)

    return spoil


def save_weights(change: Callable[[dict], object], backbone: str = "resnet_small") -> Callable[[Path], None]:
    def spoil(w: Path) -> None:
        state = dict(build_model(backbone).base_model.state_dict())
        change(state)
        torch.save(state, w / "w.pth")

    return spoil


def put_npy(path: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, IMAGES)


def put_npz(path: Path) -> None:
    with open(path, "wb") as file:
        np.savez(file, annotations=IMAGES)


def put_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jpg", "a")


def put_hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["annotations"] = [1.0]


def few_arrays(count: int) -> Callable[[Path], None]:
    """A training half of so many images."""

    def spoil(w: Path) -> None:
        np.save(image_file(w), IMAGES[:count])
        np.save(image_file(w, kind="label"), LABELS[:count])

    return spoil


def cub(w: Path) -> Path:
    return w / "raw" / "cub200"


FIRST = name_of(7, 150)  # of images.txt


def photo(write: Callable[[Path], object]) -> Callable[[Path], None]:
    """Put something else in the place of the first photo."""
    return lambda w: write(cub(w) / "images" / FIRST)


def photo_of(content: bytes) -> Callable[[Path], None]:
    return photo(lambda path: path.write_bytes(content))


def line_of_list(text: str) -> Callable[[Path], None]:
    """The second line of images.txt."""
    return lambda w: replace_line(cub(w) / "images.txt", 2, text)


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def gif_claiming(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + b";"


def animation_cut_short(path: Path) -> None:
    """A moving GIF whose first frame already ends too early."""
    frames = [Image.effect_noise((64, 64), 90 + 10 * n) for n in range(3)]
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:])
    path.write_bytes(path.read_bytes()[:1200])


def saved_as(kind: str, mode: str = "RGB", keep: float = 1.0) -> Callable[[Path], None]:
    """A picture of another kind under the name of a photo, of which only a share of the bytes is kept."""

    def write(path: Path) -> None:
        Image.effect_noise((48, 40), 90).convert(mode).save(path, format=kind)
        path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])

    return write


def replace_by_link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def annotations(rows: list[tuple[object, object]]) -> Callable[[Path], object]:
    return lambda w: make_cars(w / "raw" / "car196", rows)


MAT = Path("raw", "car196", "cars_annos.mat")
GOOD_CARS = [(f"car_ims/{n:06d}.jpg", label) for n, label in enumerate((196, 1, 98, 99, 1), 1)]
IMAGES, LABELS = shapes(24, range(1, 5), 32, seed=0)
SMALL = build_model("resnet_small", 4, 8).state_dict()
NUMBERED = torch.arange(24)
RESUME = {name: None for name in BASE[TRAIN]} | {"resume": "{w}/runs/done", "n_epoch": 2}
CHECKPOINT = {"checkpoint_path": "{w}/runs/done/last.pth"}
CONFIG = {"config": "{w}/options.json"}
WEIGHTS = {"weights": "{w}/w.pth"}

# ---------------------------------------------------------------- the table

CASES = {
    # options of train.py
    "lr nan": Case(TRAIN, {"lr": "nan"}, ("--lr", "nan")),
    "lr negative": Case(TRAIN, {"lr": -0.1}, ("--lr", "greater than 0", "-0.1")),
    "lr beyond float32": Case(TRAIN, {"lr": 1e39}, ("--lr", "at most 1e+30", "1e+39")),
    "lr underflows to zero": Case(TRAIN, {"lr": "1e-400"}, ("--lr", "greater than 0", "1e-400")),
    "t zero": Case(TRAIN, {"t": 0}, ("--t", "at least 1e-06", "got 0")),
    "t so small that 1 / t overflows": Case(TRAIN, {"t": 1e-300}, ("--t", "1e-300")),
    "alpha negative": Case(TRAIN, {"alpha": -1}, ("--alpha", "-1")),
    "mu infinite": Case(TRAIN, {"mu": "-inf"}, ("--mu", "-inf")),
    "ml no number": Case(TRAIN, {"ml": "0,9"}, ("--ml", "expected a number, got '0,9'")),
    "rim empty": Case(TRAIN, {"rim": ""}, ("--rim", "expected a number, got ''")),
    "recon hexadecimal": Case(TRAIN, {"recon": "0x1"}, ("--recon", "'0x1'")),
    "neg_m beyond floats": Case(TRAIN, {"neg_m": 10**400}, ("--neg_m", "at most 1000000")),
    "neg_m negative": Case(TRAIN, {"neg_m": -2}, ("--neg_m", "at least 1, got -2")),
    "K of one": Case(TRAIN, {"n_cluster": 1}, ("--n_cluster", "at least 2")),
    "K beyond the data": Case(TRAIN, {"n_cluster": 25}, ("--n_cluster 25", "24 training images")),
    "batch beyond the data": Case(TRAIN, {"batch_size": 25}, ("--batch_size 25", "24 images")),
    "batch zero": Case(TRAIN, {"batch_size": 0}, ("--batch_size", "at least 1")),
    "batch with a fraction": Case(TRAIN, {"batch_size": "8.0"}, ("--batch_size", "whole number", "'8.0'")),
    "embedding of one dimension": Case(TRAIN, {"low_dim": 1}, ("--low_dim", "at least 2")),
    "embedding beyond memory": Case(TRAIN, {"low_dim": 10**12}, ("--low_dim", "at most 65536", "1000000000000")),
    "epochs negative": Case(TRAIN, {"n_epoch": -1}, ("--n_epoch", "at least 0, got -1")),
    "interval zero": Case(TRAIN, {"interval": 0}, ("--interval", "at least 1")),
    "seed negative": Case(TRAIN, {"seed": -1}, ("--seed", "at least 0")),
    "seed beyond 32 bits": Case(TRAIN, {"seed": 2**32}, ("--seed", "at most 4294967295")),
    "seed of 5000 digits": Case(TRAIN, {"seed": "9" * 5000}, ("--seed", "whole number", " ... ")),
    "checkpoint_every_steps negative": Case(
        TRAIN, {"checkpoint_every_steps": -1}, ("--checkpoint_every_steps", "at least 0")
    ),
    "checkpoint_every_steps a share": Case(
        TRAIN, {"checkpoint_every_steps": 0.5}, ("--checkpoint_every_steps", "whole number", "'0.5'")
    ),
    "eval_memory_mb negative": Case(TRAIN, {"eval_memory_mb": -512}, ("--eval_memory_mb", "at least 1, got -512")),
    "eval_memory_mb of petabytes": Case(TRAIN, {"eval_memory_mb": 2**30}, ("--eval_memory_mb", "at most 16777216")),
    "eval_memory_mb zero": Case(TEST, FROZEN | {"eval_memory_mb": 0}, ("--eval_memory_mb", "at least 1")),
    "eval_memory_mb with a unit": Case(TEST, FROZEN | {"eval_memory_mb": "1G"}, ("--eval_memory_mb", "'1G'")),
    "eval_memory_mb beyond floats": Case(
        TEST, FROZEN | {"eval_memory_mb": 10**400}, ("--eval_memory_mb", "at most 16777216")
    ),
    "compile with a value": Case(TRAIN, {}, ("--compile", "'1'"), more=("--compile=1",)),
    "deterministic with a value": Case(TRAIN, {}, ("--deterministic", "'no'"), more=("--deterministic=no",)),
    "test_batch text": Case(TRAIN, {"test_batch": "all"}, ("--test_batch", "'all'")),
    "workers negative": Case(TRAIN, {"workers": -1}, ("--workers", "at least 0")),
    "workers beyond machines": Case(TRAIN, {"workers": 10**6}, ("--workers", "at most 1024")),
    "image_size tiny": Case(TRAIN, {"image_size": 7}, ("--image_size", "at least 8")),
    "image_size not there": Case(TRAIN, {"image_size": 48}, ("training_tiny_48resized_img.npy", "no such file")),
    "backbone misspelt": Case(TRAIN, {"backbone": "resnet-small"}, ("--backbone", "did you mean resnet_small?")),
    "backbone in capitals": Case(TRAIN, {"backbone": "GOOGLENET"}, ("'GOOGLENET'", "choose from googlenet")),
    "backbone too deep for the images": Case(
        TRAIN, {"backbone": "googlenet"}, ("--backbone googlenet", "at least 31 px", "cropped to 28", "resnet_small")
    ),
    "positives misspelt": Case(TRAIN, {"positives": "n"}, ("--positives", "did you mean nn?")),
    "pseudo_labels misspelt": Case(TRAIN, {"pseudo_labels": "kmean"}, ("did you mean kmeans?",)),
    "recon_target unknown": Case(TRAIN, {"recon_target": "pixels"}, ("--recon_target", "'pixels'", "input, image")),
    "precision unknown": Case(TRAIN, {"precision": "fp61"}, ("--precision", "fp32, bf16")),
    "device misspelt": Case(TRAIN, {"device": "gpu"}, ("--device", "auto, cpu, cuda")),
    "device with a number": Case(TRAIN, {"device": "cuda:0"}, ("did you mean cuda?",)),
    "data_on a device that is not there": Case(TRAIN, {"data_on": "device"}, ("--data_on device", "--data_on host")),
    "kmeans_engine without k-means": Case(
        TRAIN, {"kmeans_engine": "torch"}, ("--kmeans_engine torch", "--pseudo_labels kmeans")
    ),
    "no weights of that backbone": Case(TRAIN, {"weights": "auto"}, ("--weights auto", "--weights none")),
    "data set a path": Case(TRAIN, {"dataset": "../tiny"}, ("--dataset", "plain name", "'../tiny'")),
    "data set unknown": Case(TRAIN, {"dataset": "tinny"}, ("training_tinny_256resized_img.npy", "cub200, car196")),
    "data_dir empty": Case(TRAIN, {"data_dir": ""}, ("--data_dir", "expected a path")),
    "data_dir a file": Case(TRAIN, {"data_dir": "{w}/file"}, ("file/tiny/training_tiny_", "no such file")),
    "data_dir of two lines": Case(TRAIN, {"data_dir": "{w}/two\nlines"}, ("two\\nlines/tiny",)),
    "data_dir that would steer a terminal": Case(TRAIN, {"data_dir": "\x1b[2J"}, ("\\x1b[2J/tiny",)),
    "model_name absolute": Case(TRAIN, {"model_name": "/tmp/x"}, ("--model_name", "plain name")),
    "model_name of dots": Case(TRAIN, {"model_name": ".."}, ("--model_name", "plain name")),
    "model_name of two lines": Case(TRAIN, {"model_name": "a\nb"}, ("--model_name", "printable", "'a\\nb'")),
    "model_name too long for a file": Case(TRAIN, {"model_name": "b" * 253}, ("--model_name", "at most 200")),
    "model_name of long letters": Case(TRAIN, {"model_name": "\u00fc" * 120}, ("--model_name", "at most 200")),
    "checkpoint_dir a file": Case(TRAIN, {"checkpoint_dir": "{w}/file"}, ("file is not a folder", "--checkpoint_dir")),
    "checkpoint_dir below a file": Case(TRAIN, {"checkpoint_dir": "{w}/file/a/b"}, ("file is not a folder",)),
    "checkpoint_dir too long": Case(TRAIN, {"checkpoint_dir": "{w}/" + "c" * 300}, ("File name too long",)),
    "checkpoint_dir where nothing can be made": Case(
        TRAIN, {"checkpoint_dir": "/proc/runs"}, ("/proc/runs/new: cannot be written to", "--checkpoint_dir")
    ),
    "checkpoint_dir a dead link": Case(
        TRAIN, {"checkpoint_dir": "{w}/dead"}, ("dead is not a folder",), lambda w: (w / "dead").symlink_to("nowhere")
    ),
    "log_dir a file": Case(TRAIN, {"log_dir": "{w}/file"}, ("file is not a folder", "--log_dir")),
    "log_dir too long": Case(TRAIN, {"log_dir": "{w}/" + "d" * 300}, ("File name too long", "--log_dir")),
    "log a folder": Case(
        TRAIN, {"log_dir": "{w}/logs"}, ("new.log: is a folder",),
        lambda w: (w / "logs" / "new.log").mkdir(parents=True),
    ),
    "a run there already": Case(TRAIN, {"model_name": "done"}, ("runs/done", "--resume", "--overwrite")),
    "a folder in a run file's place": Case(
        TRAIN, {"model_name": "half"}, ("metrics.jsonl: is a folder",),
        lambda w: (w / "runs" / "half" / "metrics.jsonl").mkdir(parents=True), ("--overwrite",),
    ),
    "resume and config": Case(TRAIN, RESUME | CONFIG, ("leave out --config",), put_json({})),
    "resume and overwrite": Case(TRAIN, RESUME, ("--overwrite", "cannot change"), more=("--overwrite",)),
    "resume and another network": Case(TRAIN, RESUME | {"low_dim": 9}, ("--low_dim was 8", "cannot change")),
    "resume empty": Case(TRAIN, RESUME | {"resume": ""}, ("--resume", "expected a path")),
    "resume of a folder without a run": Case(TRAIN, RESUME | {"resume": "{w}/data"}, ("data/config.json",)),
    "a flag with a value": Case(TRAIN, {}, ("--overwrite", "'yes'"), more=("--overwrite=yes",)),
    "an option without its value": Case(TRAIN, {}, ("--lr", "expected one argument"), more=("--lr",)),
    "an option misspelt": Case(TRAIN, {}, ("--batchsize", "did you mean --batch_size?"), more=("--batchsize=8",)),
    "an option cut short": Case(TRAIN, {}, ("unknown option --mod",), more=("--mod=x",)),
    "an option of the released code": Case(TRAIN, {}, ("--norm", "leave it out"), more=("--norm=0.5",)),
    "a word too many": Case(TRAIN, {}, ("unrecognized arguments: cub200",), more=("cub200",)),
    "a word of two lines too many": Case(TRAIN, {}, ("unrecognized arguments: a\\nb",), more=("a\nb",)),
    "a short option": Case(TRAIN, {}, ("-e",), more=("-e",)),
    # config files of train.py
    "config missing": Case(TRAIN, {"config": "{w}/none.json"}, ("none.json", "No such file", "JSON")),
    "config a folder": Case(TRAIN, {"config": "{w}/data"}, ("data: Is a directory",)),
    "config empty": Case(TRAIN, CONFIG, ("options.json", "not valid JSON"), put_json("")),
    "config not UTF-8": Case(
        TRAIN, CONFIG, ("options.json", "not valid JSON"), lambda w: (w / "options.json").write_bytes(b'{"lr\xff": 1}')
    ),
    "config nested without end": Case(TRAIN, CONFIG, ("options.json", "not valid JSON"), put_json("[" * 50_000)),
    "config too large": Case(TRAIN, CONFIG, ("options.json", "larger than"), put_json('{"lr": 1}' + " " * 2**20)),
    "config without end": Case(TRAIN, {"config": "/dev/zero"}, ("/dev/zero", "larger than")),
    "config a list": Case(TRAIN, CONFIG, ("options.json", "expected a JSON object"), put_json(["lr", 1])),
    "config with a comment": Case(TRAIN, CONFIG, ("options.json", "line 1 column 12"), put_json('{"lr": 0.1 /*x*/}')),
    "config with a key twice": Case(TRAIN, CONFIG, ("'lr' is there twice",), put_json('{"lr": 0.1, "lr": 0.2}')),
    "config with an unknown key": Case(TRAIN, CONFIG, ("'leaning_rate'",), put_json({"leaning_rate": 1})),
    "config with a key near another": Case(TRAIN, CONFIG, ("did you mean 'n_epoch'?",), put_json({"n_epochs": 3})),
    "config with dashes": Case(TRAIN, CONFIG, ("'--lr'",), put_json({"--lr": 0.1})),
    "config with a released option": Case(TRAIN, CONFIG, ("batch_m", "had no effect"), put_json({"batch_m": 4})),
    "config within a config": Case(TRAIN, CONFIG, ("unknown option 'config'",), put_json({"config": "a.json"})),
    "config with an object": Case(TRAIN, CONFIG, ("lr takes a number",), put_json({"lr": {"start": 0.1}})),
    "config with true for a number": Case(TRAIN, CONFIG, ("n_epoch takes a number",), put_json({"n_epoch": True})),
    "config with a text for a flag": Case(
        TRAIN, CONFIG, ("overwrite is true or false",), put_json({"overwrite": "no"})
    ),
    "config with a number for a flag": Case(
        TRAIN, CONFIG, ("deterministic is true or false, got 1",), put_json({"deterministic": 1})
    ),
    "config with compile in words": Case(TRAIN, CONFIG, ("compile is true or false",), put_json({"compile": "yes"})),
    "config with steps below zero": Case(
        TRAIN, CONFIG, ("options.json", "--checkpoint_every_steps", "-5"), put_json({"checkpoint_every_steps": -5})
    ),
    "config with infinity": Case(TRAIN, CONFIG, ("options.json", "--alpha"), put_json('{"alpha": Infinity}')),
    "config with a fraction of an epoch": Case(TRAIN, CONFIG, ("--interval", "'1.5'"), put_json({"interval": 1.5})),
    "config with NUL in a path": Case(TRAIN, CONFIG, ("--log_dir", "'a\\x00b'"), put_json({"log_dir": "a\0b"})),
    "config with half a character": Case(TRAIN, CONFIG, ("--data_dir", "\\ud800"), put_json({"data_dir": "\ud800"})),
    "config with an empty name": Case(TRAIN, CONFIG, ("options.json", "--dataset"), put_json({"dataset": ""})),
    "config with a fault that the line covers": Case(TRAIN, CONFIG | {"t": 0.2}, ("--t", "-5"), put_json({"t": -5})),
    # settings of a run that is resumed
    "run without settings": Case(
        TRAIN, RESUME, ("done/config.json", "no run of train.py"), lambda w: (w / "runs/done/config.json").unlink()
    ),
    "run with torn settings": Case(
        TRAIN, RESUME, ("done/config.json", "not valid JSON"), lambda w: os.truncate(w / "runs/done/config.json", 99)
    ),
    "run with settings of something else": Case(
        TRAIN, RESUME, ("config.json", "no backbone"), change_config(backbone=..., lr=0.2)
    ),
    "run with an unknown setting": Case(TRAIN, RESUME, ("config.json", "'momentum'"), change_config(momentum=0.9)),
    "run with an impossible setting": Case(
        TRAIN, RESUME, ("config.json", "--batch_size"), change_config(batch_size=-4)
    ),
    "run with the settings of a larger network": Case(
        TRAIN, RESUME, ("done", "does not fit", "config.json"), change_config(low_dim=16)
    ),
    "run with the settings of another backbone": Case(
        TRAIN, RESUME, ("done", "does not fit", "config.json"), change_config(backbone="resnet18")
    ),
    "run whose data are gone": Case(
        TRAIN, RESUME, ("training_tiny_256resized_img.npy",), lambda w: shutil.rmtree(w / "data" / "tiny")
    ),
    "run without a checkpoint": Case(
        TRAIN, RESUME, ("last.pth: no such file", "without --resume"),
        lambda w: (last(w).unlink(), last(w).with_name("best.pth").unlink()),
    ),
    "run without its last checkpoint": Case(
        TRAIN, RESUME, ("last.pth: no such file", "--resume", "done/best.pth"), lambda w: last(w).unlink()
    ),
    "run to go on from an earlier checkpoint": Case(
        TRAIN, RESUME | {"resume": "{w}/runs/done/best.pth"}, ("done/last.pth is there, and would be lost",)
    ),
    "run whose data have changed": Case(
        TRAIN, RESUME, ("training_tiny_32resized_img.npy: not the file that the run began",), put_array(IMAGES[::-1])
    ),
    "run whose data have shrunk": Case(TRAIN, RESUME, ("uint8 (20, 32, 32, 3), it was uint8 (24,",), few_arrays(20)),
    "run with a torn checkpoint": Case(TRAIN, RESUME, ("last.pth",), lambda w: os.truncate(last(w), 50_000)),
    "run with a bare state_dict": Case(TRAIN, RESUME, ("last.pth", "no epoch"), lambda w: torch.save(SMALL, last(w))),
    "run with a list for a checkpoint": Case(
        TRAIN, RESUME, ("last.pth", "holds a list"), lambda w: torch.save([SMALL], last(w))
    ),
    "run without its optimiser": Case(
        TRAIN, RESUME, ("last.pth", "no optimizer"), change_last(lambda c: c.pop("optimizer"))
    ),
    "run with another optimiser": Case(
        TRAIN, RESUME, ("does not fit",), change_last(lambda c: c.update(optimizer={"state": {}, "param_groups": []}))
    ),
    "run with a text for its optimiser": Case(
        TRAIN, RESUME, ("does not fit",), change_last(lambda c: c.update(optimizer="SGD"))
    ),
    "run at a negative epoch": Case(
        TRAIN, RESUME, ("last.pth", "epoch is no"), change_last(lambda c: c.update(epoch=-1))
    ),
    "run at epoch true": Case(TRAIN, RESUME, ("last.pth", "epoch is no"), change_last(lambda c: c.update(epoch=True))),
    "run with metrics of numbers": Case(
        TRAIN, RESUME, ("metrics are no rows",), change_last(lambda c: c.update(metrics=[1]))
    ),
    "run with a random state cut short": Case(
        TRAIN, RESUME, ("does not fit",), change_last(lambda c: c["rng"].update(cpu=c["rng"]["cpu"][:9]))
    ),
    "run with a random state of floats": Case(
        TRAIN, RESUME, ("does not fit",), change_last(lambda c: c["rng"].update(cpu=c["rng"]["cpu"].float()))
    ),
    "run with the pseudo-labels of other images": Case(
        TRAIN, RESUME, ("pseudo_labels", "24 training images"),
        change_last(lambda c: c.update(pseudo_labels=torch.zeros(9, dtype=torch.int64))),
    ),
    "run with pseudo-labels of floats": Case(
        TRAIN, RESUME, ("pseudo_labels",), change_last(lambda c: c.update(pseudo_labels=torch.zeros(24)))
    ),
    "run with a pseudo-label beyond K": Case(
        TRAIN, RESUME, ("pseudo_labels", "in 4 clusters"), change_last(lambda c: c.update(pseudo_labels=NUMBERED))
    ),
    "run with metrics of tensors": Case(
        TRAIN, RESUME, ("metrics are no rows",), change_last(lambda c: c["metrics"][0].update(nmi=torch.zeros(1)))
    ),
    "run with a score in words": Case(
        TRAIN, RESUME, ("metrics are no rows",), change_last(lambda c: c["metrics"][0].update({"recall@1": "best"}))
    ),
    "run with the fingerprints of nothing": Case(
        TRAIN, RESUME, ("data are no fingerprints",), change_last(lambda c: c.update(data={"training": "abc"}))
    ),
    "run with the fingerprint of one half": Case(
        TRAIN, RESUME, ("data are no fingerprints",), change_last(lambda c: c["data"].pop("validation"))
    ),
    "run in an epoch of words": Case(
        TRAIN, RESUME, ("current is no epoch",), change_last(lambda c: c.update(current="epoch 1"))
    ),
    "run in an epoch without its step": Case(
        TRAIN, RESUME, ("current is no epoch",), in_an_epoch(step=...)
    ),
    "run in an epoch past its end": Case(TRAIN, RESUME, ("current is no epoch", "3 steps"), in_an_epoch(step=4)),
    "run in an epoch before its start": Case(TRAIN, RESUME, ("current is no epoch",), in_an_epoch(step=-1)),
    "run in an epoch with a loss too few": Case(
        TRAIN, RESUME, ("current is no epoch",), in_an_epoch(losses=torch.ones(3, dtype=torch.float64))
    ),
    "run in an epoch with positives beyond the images": Case(
        TRAIN, RESUME, ("current is no epoch", "24 images"), in_an_epoch(positives=NUMBERED + 1)
    ),
    "run in an epoch with seconds in words": Case(
        TRAIN, RESUME, ("current is no epoch",), in_an_epoch(seconds={"features": "1", "train": 2.0})
    ),
    "run in an epoch with a tensor to log": Case(
        TRAIN, RESUME, ("current is no epoch",), in_an_epoch(clustering={"cluster_sizes": torch.ones(4)})
    ),
    "run in an epoch of k-means without pseudo-labels": Case(
        TRAIN, RESUME, ("no pseudo_labels for the epoch",),
        lambda w: (in_an_epoch()(w), change_config(pseudo_labels="kmeans")(w)),
    ),
    "run that diverged": Case(
        TRAIN, RESUME, ("last.pth", "feat_ext.0.bias holds NaN"), set_weight("feat_ext.0.bias", lambda v: v * torch.nan)
    ),
    "run with tensors for a model": Case(
        TRAIN, RESUME, ("model is no state_dict",), change_last(lambda c: c.update(model=[1]))
    ),
    # pretrained weights
    "weights missing": Case(TRAIN, {"weights": "{w}/none.pth"}, ("none.pth: no such file",)),
    "weights a folder": Case(TRAIN, {"weights": "{w}/data"}, ("data: a folder",)),
    "weights a text": Case(TRAIN, {"weights": "{w}/file"}, ("file: not a file written by torch.save",)),
    "weights with NaN": Case(
        TRAIN, WEIGHTS, ("w.pth", "layer1.0.bn1.running_var holds NaN"),
        save_weights(lambda s: s.update({"layer1.0.bn1.running_var": torch.full((32,), torch.nan)})),
    ),
    "weights infinite in float32": Case(
        TRAIN, WEIGHTS, ("w.pth", "bn1.weight holds NaN or infinite"),
        save_weights(lambda s: s.update({"bn1.weight": torch.full((32,), 1e200, dtype=torch.float64)})),
    ),
    "weights of integers": Case(
        TRAIN, WEIGHTS, ("w.pth", "bn1.weight holds torch.int64", "floating point"),
        save_weights(lambda s: s.update({"bn1.weight": torch.ones(32, dtype=torch.int64)})),
    ),
    "weights that are complex": Case(
        TRAIN, WEIGHTS, ("w.pth", "bn1.bias is not a plain tensor"),
        save_weights(lambda s: s.update({"bn1.bias": torch.zeros(32, dtype=torch.complex64)})),
    ),
    "weights that are sparse": Case(
        TRAIN, WEIGHTS, ("w.pth", "bn1.bias is not a plain tensor"),
        save_weights(lambda s: s.update({"bn1.bias": torch.zeros(32).to_sparse()})),
    ),
    "weights without data": Case(
        TRAIN, WEIGHTS, ("w.pth", "bn1.bias is not a plain tensor"),
        save_weights(lambda s: s.update({"bn1.bias": torch.zeros(32, device="meta")})),
    ),
    "weights of another backbone": Case(
        TRAIN, WEIGHTS | {"backbone": "resnet18"}, ("not the weights of resnet18", "--backbone"),
        save_weights(dict.copy),
    ),
    "weights with a layer of another width": Case(
        TRAIN, WEIGHTS, ("conv1.weight has shape (32, 1, 3, 3)",),
        save_weights(lambda s: s.update({"conv1.weight": s["conv1.weight"][:, :1].clone()})),
    ),
    "weights in HDF5 of integers": Case(
        TEST, FROZEN | {"weights": "{w}/w.h5"}, ("w.h5: holds no floating-point arrays",),
        hdf5(lambda f: f.update(a=[1, 2])),
    ),
    "weights in HDF5 with NaN": Case(
        TEST, FROZEN | {"weights": "{w}/w.h5"}, ("w.h5: conv1.weight holds NaN",),
        hdf5(lambda f: f.update({"conv1/weight": np.full(3, np.nan, np.float32)})),
    ),
    "weights in HDF5 cut short": Case(
        TEST, FROZEN | {"weights": "{w}/w.h5"}, ("w.h5: not a readable HDF5 file",),
        lambda w: (hdf5(lambda f: f.update(a=np.ones(9999)))(w), os.truncate(w / "w.h5", 3000)),
    ),
    # checkpoints to score
    "checkpoint missing": Case(TEST, {"checkpoint_path": "{w}/none.pth"}, ("none.pth: no such file",)),
    "checkpoint a folder of another kind": Case(
        TEST, {"checkpoint_path": "{w}/data"}, ("data/best.pth: no such file",)
    ),
    "checkpoint empty": Case(TEST, CHECKPOINT, ("last.pth: not a file",), lambda w: last(w).write_bytes(b"")),
    "checkpoint a text": Case(TEST, CHECKPOINT, ("last.pth: not a file",), lambda w: last(w).write_text("PyTorch")),
    "checkpoint a picture": Case(TEST, CHECKPOINT, ("last.pth: not a file",), lambda w: saved_as("JPEG")(last(w))),
    "checkpoint torn": Case(
        TEST, CHECKPOINT, ("last.pth: damaged or truncated",), lambda w: os.truncate(last(w), 100_000)
    ),
    "checkpoint whose end is missing": Case(
        TEST, CHECKPOINT, ("last.pth: damaged",), lambda w: os.truncate(last(w), last(w).stat().st_size - 10)
    ),
    "checkpoint with a byte flipped": Case(TEST, CHECKPOINT, ("last.pth: damaged", "checksum"), flip_bytes),
    "checkpoint an archive of texts": Case(
        TEST, CHECKPOINT, ("last.pth: a zip archive of something else",),
        lambda w: put_zip(last(w)),
    ),
    "checkpoint an .npz": Case(
        TEST, CHECKPOINT, ("last.pth: a zip archive of something else",), lambda w: put_npz(last(w))
    ),
    "checkpoint a program": Case(TEST, CHECKPOINT, ("last.pth: a TorchScript program", "state_dict"), torchscript),
    "checkpoint without its table": Case(
        TEST, CHECKPOINT, ("last.pth", "zip archive"), partial(rezip, drop="data.pkl")
    ),
    "checkpoint with a torn table": Case(TEST, CHECKPOINT, ("last.pth",), partial(rezip, cut=True)),
    "checkpoint without a tensor": Case(TEST, CHECKPOINT, ("last.pth: damaged",), partial(rezip, drop="data/7")),
    "checkpoint an .npy": Case(TEST, CHECKPOINT, ("last.pth: not a file",), lambda w: put_npy(last(w))),
    "checkpoint in HDF5": Case(
        TEST, CHECKPOINT, ("last.pth: not a file",), lambda w: put_hdf5(last(w))
    ),
    "checkpoint a tensor": Case(TEST, CHECKPOINT, ("found Tensor",), lambda w: torch.save(torch.zeros(3), last(w))),
    "checkpoint of numbers": Case(TEST, CHECKPOINT, ("no state_dict",), lambda w: torch.save({"a": 1}, last(w))),
    "checkpoint of a backbone alone": Case(
        TEST, CHECKPOINT, ("not a CBSwR checkpoint", "feat_ext.0"),
        lambda w: torch.save(build_model("resnet_small").base_model.state_dict(), last(w)),
    ),
    "checkpoint with a layer too many": Case(
        TEST, CHECKPOINT, ("nearest is resnet_small", "extra.weight"),
        change_last(lambda c: c["model"].update({"extra.weight": torch.zeros(1)})),
    ),
    "checkpoint of two networks mixed": Case(
        TEST, CHECKPOINT, ("feat_ext.0.weight",), set_weight("feat_ext.0.weight", lambda v: torch.zeros(8, 512))
    ),
    "checkpoint of no clusters": Case(
        TEST, CHECKPOINT, ("K is 0",), set_weight("clustering.2.weight", lambda v: v[:0].clone())
    ),
    "checkpoint of K rows and another bias": Case(
        TEST, CHECKPOINT, ("clustering.2.bias",), set_weight("clustering.2.bias", lambda v: torch.zeros(9))
    ),
    "checkpoint of a flat head": Case(
        TEST, CHECKPOINT, ("no weights feat_ext.0",), set_weight("feat_ext.0.weight", lambda v: v.flatten())
    ),
    "checkpoint with NaN": Case(
        TEST, CHECKPOINT, ("last.pth: base_model.bn1.weight holds NaN",),
        set_weight("base_model.bn1.weight", lambda v: v.index_fill(0, torch.tensor([3]), torch.nan)),
    ),
    "checkpoint of integers": Case(
        TEST, CHECKPOINT, ("of another shape or kind", "feat_ext.0.bias"),
        set_weight("feat_ext.0.bias", lambda v: v.long()),
    ),
    "checkpoint with a name of two lines": Case(
        TEST, CHECKPOINT, ("a\\nb\\x1b[0m",), change_last(lambda c: c["model"].update({"a\nb\x1b[0m": torch.zeros(1)}))
    ),
    # options of test.py
    "nothing to score": Case(TEST, {}, ("--checkpoint_path", "--backbone")),
    "two things to score": Case(TEST, CHECKPOINT | FROZEN, ("either --checkpoint_path, or --backbone",)),
    "weights for a checkpoint": Case(TEST, CHECKPOINT | {"weights": "auto"}, ("--weights goes with --backbone",)),
    "json empty": Case(TEST, FROZEN | {"json": ""}, ("--json", "expected a path")),
    "json a folder": Case(TEST, FROZEN | {"json": "{w}/data"}, ("data: is a folder",)),
    "json below a file": Case(TEST, FROZEN | {"json": "{w}/file/a.json"}, ("file/a.json: its folder",)),
    "json where nothing can be made": Case(TEST, FROZEN | {"json": "/proc/a.json"}, ("/proc", "cannot be written to")),
    "json over the checkpoint": Case(TEST, CHECKPOINT | {"json": "{w}/runs/done/last.pth"}, ("would be overwritten",)),
    "json over the best checkpoint of a run": Case(
        TEST, {"checkpoint_path": "{w}/runs/done.pth", "json": "{w}/runs/done/best.pth"}, ("would be overwritten",)
    ),
    "json over the checkpoint by a link": Case(
        TEST, CHECKPOINT | {"json": "{w}/link"}, ("link: is read and would be overwritten",),
        lambda w: (w / "link").symlink_to(last(w)),
    ),
    "both results in one file": Case(
        TEST, FROZEN | {"json": "{w}/a.npy", "save_embeddings": "{w}/a.npy"},
        ("a.npy: is read and would be overwritten",),
    ),
    "embeddings not .npy": Case(TEST, FROZEN | {"save_embeddings": "{w}/a.txt"}, ("a.txt", "must end in .npy")),
    "embeddings over the data": Case(
        TEST, FROZEN | {"save_embeddings": "{w}/data/tiny/validation_tiny_32resized_img.npy"},
        ("data set's own arrays",),
    ),
    "nmi_engine misspelt": Case(TEST, FROZEN | {"nmi_engine": "scikit"}, ("--nmi_engine", "sklearn")),
    "seed beyond scikit-learn": Case(TEST, FROZEN | {"seed": 2**33, "nmi_engine": "sklearn"}, ("--seed", "4294967295")),
    "test_batch of minus one": Case(TEST, FROZEN | {"test_batch": -1}, ("--test_batch", "at least 1")),
    "a frozen backbone too deep for the images": Case(
        TEST, {"backbone": "googlenet_caffe", "weights": "none"}, ("--backbone googlenet_caffe", "at least 31 px")
    ),
    # arrays
    "images of floats": Case(TRAIN, {}, ("training_tiny_32resized_img.npy", "float32"), put_array(IMAGES.astype("f4"))),
    "images of signed bytes": Case(TRAIN, {}, ("found int8",), put_array(IMAGES.astype(np.int8))),
    "images without channels": Case(TRAIN, {}, ("(24, 32, 32)",), put_array(IMAGES[..., 0])),
    "images with alpha": Case(TRAIN, {}, ("(24, 32, 32, 4)",), put_array(np.concatenate([IMAGES, IMAGES[..., :1]], 3))),
    "images with channels first": Case(TRAIN, {}, ("(24, 3, 32, 32)",), put_array(IMAGES.transpose(0, 3, 1, 2).copy())),
    "images that are not square": Case(TRAIN, {}, ("(24, 16, 32, 3)",), put_array(IMAGES[:, :16])),
    "images of another size than their name": Case(
        TRAIN, {}, ("images of 16 px", "32 of its name"), put_array(IMAGES[:, :16, :16].copy())
    ),
    "images of the other half of another size": Case(
        TRAIN, {}, ("validation_tiny_32", "images of 16 px"), put_array(IMAGES[:, :16, :16].copy(), "validation")
    ),
    "images of one pixel": Case(
        TRAIN, {}, ("images of 1 px", "8 or more"),
        lambda w: (image_file(w).unlink(), np.save(image_file(w, size=1), IMAGES[:, :1, :1]),
                   np.save(image_file(w, kind="label", size=1), LABELS)),
    ),
    "images in Fortran's order": Case(TRAIN, {}, ("Fortran order",), put_array(np.asfortranarray(IMAGES))),
    "one image": Case(TRAIN, {}, ("holds 1 images",), few_arrays(1)),
    "no image": Case(TRAIN, {}, ("holds 0 images",), few_arrays(0)),
    "images of pickled objects": Case(TRAIN, {}, ("not a plain .npy array",), put_array(np.array([{}] * 24, object))),
    "images pickled as they are": Case(TRAIN, {}, ("not a plain .npy array",), put_bytes(pickle.dumps(IMAGES))),
    "images in an .npz": Case(TRAIN, {}, ("not a plain .npy",), lambda w: put_npz(image_file(w))),
    "images in half a zip": Case(TRAIN, {}, ("not a plain .npy",), put_bytes(b"PK\x03\x04 and no more")),
    "images cut short": Case(TRAIN, {}, ("truncated",), lambda w: os.truncate(image_file(w), 5000)),
    "images cut within the header": Case(TRAIN, {}, ("truncated",), lambda w: os.truncate(image_file(w), 40)),
    "images a folder": Case(TRAIN, {}, ("not a file",), lambda w: (image_file(w).unlink(), image_file(w).mkdir())),
    "images a pipe that nobody fills": Case(
        TRAIN, {}, ("not a file",), lambda w: (image_file(w).unlink(), os.mkfifo(image_file(w)))
    ),
    "images behind a dead link": Case(
        TRAIN, {}, ("no such file",), lambda w: replace_by_link(image_file(w), "nowhere.npy")
    ),
    "header of a huge shape": Case(
        TRAIN, {}, ("_img.npy", "truncated"), put_bytes(header_of("(1000000000, 32, 32, 3)"))
    ),
    "header of a shape beyond 64 bits": Case(TRAIN, {}, ("_img.npy",), put_bytes(header_of(f"({2**70}, 32, 32, 3)"))),
    "header of a shape that overflows to nothing": Case(
        TRAIN, {}, ("_img.npy",), put_bytes(header_of(f"({2**32}, {2**32}, 1, 3)"))
    ),
    "header of a negative shape": Case(TRAIN, {}, ("_img.npy",), put_bytes(header_of("(-1, 32, 32, 3)"))),
    "header that calls a function": Case(TRAIN, {}, ("_img.npy",), put_bytes(header_of("__import__('os').mkdir('x')"))),
    "header nested without end": Case(TRAIN, {}, ("_img.npy",), put_bytes(npy_header("(" * 9000))),
    "header of a wrong indentation": Case(TRAIN, {}, ("_img.npy",), put_bytes(npy_header("  {\n 'descr': [\n"))),
    "header of an unknown version": Case(TRAIN, {}, ("_img.npy",), put_bytes(npy_header("{}", b"\x09\x00"))),
    "labels of another length": Case(TRAIN, {}, ("24 images but 23 labels",), put_array(LABELS[:-1], kind="label")),
    "labels of floats": Case(
        TEST, FROZEN, ("validation_tiny_32resized_label.npy", "float64"), put_array(LABELS / 2, "validation", "label")
    ),
    "labels of texts": Case(TRAIN, {}, ("_label.npy", "<U"), put_array(LABELS.astype(str), kind="label")),
    "labels of truth": Case(TRAIN, {}, ("_label.npy", "bool"), put_array(LABELS > 2, kind="label")),
    "labels as a column": Case(TRAIN, {}, ("(24, 1)",), put_array(LABELS[:, None], kind="label")),
    "labels of objects": Case(TRAIN, {}, ("_label.npy",), put_array(LABELS.astype(object), kind="label")),
    "labels of a huge shape": Case(
        TRAIN, {}, ("_label.npy",), put_bytes(header_of(f"({10**12},)", "<i8"), kind="label")
    ),
    "labels missing": Case(
        TEST, FROZEN, ("_label.npy: no such file",), lambda w: image_file(w, "validation", "label").unlink()
    ),
    "one class to test on": Case(TEST, FROZEN, ("one class only",), put_array(LABELS * 0, "validation", "label")),
    "one class to test on, in training": Case(
        TRAIN, {}, ("one class only",), put_array(LABELS * 0, "validation", "label")
    ),
    "several sizes to choose from": Case(
        TEST, FROZEN, ("[24, 32]", "--image_size"),
        lambda w: write_split(w / "data", "tiny", "validation", *shapes(9, range(3), 24, 0)),
    ),
    # pre-processing: options
    "size of nothing": Case(CUB, {"image_size": 0}, ("--image_size", "at least 8")),
    "size beyond all photos": Case(CAR, {"image_size": 10**6}, ("--image_size", "at most 4096")),
    "no workers": Case(CUB, {"workers": 0}, ("--workers", "at least 1")),
    "workers without number": Case(CAR, {"workers": "two"}, ("--workers", "'two'")),
    "a million workers": Case(GLYPHS, {"workers": 10**6}, ("--workers", "at most 1024")),
    "no glyphs": Case(GLYPHS, {"per_class": 0}, ("--per_class", "at least 1")),
    "glyphs beyond memory": Case(GLYPHS, {"per_class": 10**9}, ("--per_class", "at most 10000")),
    "a seed below zero": Case(GLYPHS, {"seed": -3}, ("--seed", "at least 0")),
    "a seed of many digits": Case(GLYPHS, {"seed": "7" * 5000}, ("--seed", "whole number")),
    "pre-processing option misspelt": Case(CUB, {}, ("--wrokers", "did you mean --workers?"), more=("--wrokers=2",)),
    "pre-processing option cut short": Case(CAR, {}, ("unknown option --work",), more=("--work=2",)),
    "out_dir empty": Case(CUB, {"out_dir": ""}, ("--out_dir", "expected a path")),
    "out_dir a file": Case(CUB, {"out_dir": "{w}/file"}, ("file is not a folder", "--out_dir")),
    "out_dir where nothing can be made": Case(GLYPHS, {"out_dir": "/proc/x"}, ("/proc/x: cannot be written to",)),
    "raw folder missing": Case(
        CUB, {"data_dir": "{w}/nowhere"}, ("nowhere/cub200/images.txt: not found", "--data_dir")
    ),
    # pre-processing: lists
    "list a folder": Case(
        CUB, {}, ("images.txt: not found",),
        lambda w: ((cub(w) / "images.txt").unlink(), (cub(w) / "images.txt").mkdir()),
    ),
    "list of zeros": Case(CUB, {}, ("images.txt: line 1",), lambda w: (cub(w) / "images.txt").write_bytes(bytes(500))),
    "list in another encoding": Case(
        CUB, {}, ("images.txt: is not a text",),
        lambda w: (cub(w) / "images.txt").write_bytes("1 ü.jpg".encode("latin-1")),
    ),
    "list with a path of many dots": Case(
        CUB, {}, ("line 2", "leaves the data folder"), line_of_list("3 a/../../../../etc/passwd")
    ),
    "list with a Windows path": Case(CUB, {}, ("line 2", "leaves the data folder"), line_of_list(r"3 C:\a.jpg")),
    "list with dots and backslashes": Case(
        CUB, {}, ("line 2", "leaves the data folder"), line_of_list(r"3 a\..\..\b.jpg")
    ),
    "list with a path too long": Case(CUB, {}, ("File name too long",), line_of_list("3 " + "x" * 300)),
    "list with a steering character": Case(CUB, {}, ("line 2", "\\x1b"), line_of_list("3 \x1b[2J.jpg")),
    "list with a number of a million digits": Case(CUB, {}, ("line 2",), line_of_list("9" * 10**6 + " a.jpg")),
    "list that names a folder": Case(CUB, {}, ("no such file",), line_of_list(f"3 {FIRST.partition('/')[0]}")),
    "photo a link out of the folder": Case(
        CUB, {}, (FIRST, "link out of the data folder"), photo(lambda p: replace_by_link(p, "/etc/hostname"))
    ),
    "class folder a link out of the folder": Case(
        CUB, {}, ("link out of the data folder",),
        photo(lambda p: (p.parent.rename(p.parents[3] / "moved"), p.parent.symlink_to(p.parents[3] / "moved"))),
    ),
    "annotations with a link out of the folder": Case(
        CAR, {}, ("000002.jpg", "link out of the data folder"),
        lambda w: replace_by_link(w / "raw/car196/car_ims/000002.jpg", "../../../file"),
    ),
    "annotations with dots": Case(
        CAR, {}, ("annotation 6", "leaves the data folder"), annotations([*GOOD_CARS, ("car_ims/../../x.jpg", 3)])
    ),
    "annotations of no car": Case(
        CAR, {}, ("cars_annos.mat", "training classes"), annotations([("car_ims/000001.jpg", 196)])
    ),
    "annotations of an infinite class": Case(
        CAR, {}, ("annotation 1", "inf"), annotations([("car_ims/000001.jpg", np.inf), *GOOD_CARS])
    ),
    "annotations of a huge class": Case(
        CAR, {}, ("annotation 1", "is not one of 1-196"), annotations([("car_ims/000001.jpg", 1e300), *GOOD_CARS])
    ),
    "annotations of texts": Case(CAR, {}, ("cars_annos.mat",), lambda w: savemat(w / MAT, {"annotations": ["a", "b"]})),
    "annotations in an .npz": Case(CAR, {}, ("cars_annos.mat: cannot be read",), lambda w: put_npz(w / MAT)),
    "annotations in MATLAB 7.3": Case(CAR, {}, ("cars_annos.mat: cannot be read",), lambda w: put_hdf5(w / MAT)),
    # pre-processing: pictures that lie
    "picture of a huge PNG": Case(CUB, {}, (FIRST, "exceeds limit"), photo_of(png_claiming(100_000, 100_000))),
    "picture just past the limit": Case(CUB, {}, (FIRST, "exceeds limit"), photo_of(png_claiming(10_000, 9_000))),
    "picture wider than PNG can be": Case(CUB, {}, (FIRST,), photo_of(png_claiming(2**31, 1))),
    "picture of no pixels": Case(CUB, {}, (FIRST,), photo_of(png_claiming(0, 5))),
    "picture with fewer pixels than it claims": Case(
        CUB, {}, (FIRST, "cannot be read"), photo_of(png_claiming(400, 400))
    ),
    "picture of a huge GIF": Case(CUB, {}, (FIRST,), photo_of(gif_claiming(65535, 65535))),
    "picture of a GIF without a frame": Case(CUB, {}, (FIRST,), photo_of(gif_claiming(5, 5))),
    "picture moving and cut short": Case(CUB, {}, (FIRST, "cannot be read"), photo(animation_cut_short)),
    "picture a cut JPEG": Case(CUB, {}, (FIRST, "truncated"), photo(saved_as("JPEG", keep=0.6))),
    "picture a cut PNG by another name": Case(CUB, {}, (FIRST, "cannot be read"), photo(saved_as("PNG", keep=0.5))),
    "picture a cut WebP": Case(CUB, {}, (FIRST,), photo(saved_as("WEBP", keep=0.5))),
    "picture a cut TIFF": Case(CUB, {}, (FIRST,), photo(saved_as("TIFF", keep=0.5))),
    "picture a page of PostScript": Case(CUB, {}, (FIRST, "not an image"), photo(saved_as("EPS"))),
    "picture a PDF": Case(CUB, {}, (FIRST, "not an image"), photo(saved_as("PDF"))),
    "picture of floats": Case(CUB, {}, (FIRST, "no fixed range"), photo(saved_as("TIFF", "F"))),
    "picture a drawing in XML": Case(
        CUB, {}, (FIRST, "not an image"), photo(lambda p: p.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>"))
    ),
    "picture an archive": Case(CUB, {}, (FIRST, "not an image"), photo(put_zip)),
    "picture an array": Case(CUB, {}, (FIRST, "not an image"), photo(put_npy)),
    "picture a pipe that nobody fills": Case(
        CUB, {}, (FIRST, "no such file"), photo(lambda p: (p.unlink(), os.mkfifo(p)))
    ),
}  # fmt: skip
IN_A_PROCESS = (  # through real processes, too: what only their start, their imports or their end could spoil
    "lr nan", "t so small that 1 / t overflows", "config nested without end", "config with half a character",
    "a run there already", "checkpoint with a name of two lines", "json over the checkpoint", "embeddings not .npy",
    "glyphs beyond memory", "photo a link out of the folder",
    "picture of a huge PNG", "annotations of a huge class",
)  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A folder in which everything is as it should be."""
    w = tmp_path_factory.mktemp("sound") / "w"
    write_dataset(w / "data")
    (w / "file").write_text("in the way")
    make_cub(w / "raw" / "cub200")
    make_cars(w / "raw" / "car196")
    done = run_in_process(TRAIN, *argv_of(Case(TRAIN, {"model_name": "done"}, ()), w))
    assert (done.code, done.err) == (0, "")
    return w


@pytest.fixture
def folder(sound, tmp_path) -> Path:
    """The case's own copy."""
    return Path(shutil.copytree(sound, tmp_path / "w", symlinks=True))


def snapshot(folder: Path) -> dict[str, object]:
    """Everything below a folder: for a file its size, its time of change and a hash of its content."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        if path.is_file() and not path.is_symlink():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path.relative_to(folder))] = status.st_size, status.st_mtime_ns, content
        else:
            found[str(path.relative_to(folder))] = status.st_mode, path.is_symlink() and os.readlink(path)
    return found


@pytest.fixture
def settings_of_run_point_here(folder) -> None:
    """The copied run's data and its folder are the case's own."""
    change_config(data_dir=str(folder / "data"), checkpoint_dir=str(folder / "runs"))(folder)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("settings_of_run_point_here")
def test_refused(name, folder):
    case = CASES[name]
    case.spoil(folder)
    before = snapshot(folder.parent)
    outcome = run_in_process(case.script, *argv_of(case, folder), seconds=SECONDS)
    failed(outcome, *case.says, script=case.script)
    assert snapshot(folder.parent) == before


@pytest.mark.parametrize("name", IN_A_PROCESS)
@pytest.mark.usefixtures("settings_of_run_point_here")
def test_refused_by_a_process(name, folder):
    case = CASES[name]
    case.spoil(folder)
    before = snapshot(folder.parent)
    command = [sys.executable, str(path_of(case.script)), *argv_of(case, folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS * 3)
    failed(Outcome(done.returncode, done.stdout, done.stderr), *case.says, script=case.script)
    assert snapshot(folder.parent) == before


def test_the_table_is_large_and_starts_from_what_is_sound(folder):
    """No case may be refused for a reason that all share: the same command lines run where nothing is spoilt."""
    assert len(CASES) >= 120
    assert len({(case.script, str(case.options), case.spoil, case.more) for case in CASES.values()}) == len(CASES)
    change_config(data_dir=str(folder / "data"), checkpoint_dir=str(folder / "runs"))(folder)
    save_weights(dict.copy)(folder)
    sound_ones = (
        (TRAIN, {}), (TRAIN, RESUME), (TRAIN, WEIGHTS | {"model_name": "second"}), (TEST, CHECKPOINT), (TEST, FROZEN),
        (CUB, {}), (CAR, {}), (GLYPHS, {}),
    )  # fmt: skip
    for script, options in sound_ones:
        outcome = run_in_process(script, *argv_of(Case(script, options, ()), folder))
        assert (outcome.code, outcome.err) == (0, ""), outcome
    in_an_epoch()(folder)
    outcome = run_in_process(TRAIN, *argv_of(Case(TRAIN, RESUME | {"n_epoch": 3}, ()), folder))
    assert (outcome.code, outcome.err) == (0, "") and "continuing after epoch 2, step 2 of epoch 3" in outcome.out


def test_a_missing_faiss_is_said_before_anything_is_written(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)  # as where it is not installed
    before = snapshot(folder)
    with_kmeans = {"pseudo_labels": "kmeans", "kmeans_engine": "faiss"}
    for case in (Case(TRAIN, with_kmeans, ()), Case(TEST, FROZEN | {"nmi_engine": "faiss"}, ())):
        failed(run_in_process(case.script, *argv_of(case, folder)), "faiss cannot be imported", "torch")
    assert snapshot(folder) == before


def test_a_missing_compiler_is_said_before_anything_is_written(folder, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    before = snapshot(folder)
    failed(run_in_process(TRAIN, *argv_of(Case(TRAIN, {}, ()), folder), "--compile"), "--compile: needs a C++ compiler")
    assert snapshot(folder) == before


@pytest.mark.parametrize("script", [CUB, CAR])
@pytest.mark.parametrize("there", ["", "new", "new/deep"])
def test_a_refused_run_leaves_no_folder(script, there, folder):
    """Of the folders of --out_dir those that were there before stay, also when the last picture is the bad one."""
    (folder / there).mkdir(parents=True, exist_ok=True)
    pictures = sorted((folder / "raw").rglob("*.jpg"))
    for path in pictures:
        path.write_text("no picture")
    before = snapshot(folder)
    failed(run_in_process(script, *argv_of(Case(script, {"out_dir": "{w}/new/deep/er"}, ()), folder)), "not an image")
    assert snapshot(folder) == before


# ---------------------------------------------------------------- any command line at all

NUMBERS = (
    "0",
    "1",
    "2",
    "3",
    "-1",
    "24",
    "25",
    "1e-3",
    "0.5",
    "nan",
    "-inf",
    "1e39",
    "",
    "many",
    "9" * 400,
    "1_0",
    "０",
)
NAMES = ("tiny", "done", "other", "", "..", "a/b", "\x1b[0m", "two\nlines", "n" * 300, "\udcff", "résumé", "-x")
PATHS = ("{w}/data", "{w}/runs", "{w}/file", "{w}/nowhere", "{w}/runs/done", "{w}/runs/done/last.pth", "", "\udcff\n",
         "{w}/file/below", "/proc/none", "{w}/options.json", "{w}/data/tiny", "none", "auto")  # fmt: skip
WORDS = ("auto", "none", "cpu", "cuda", "self", "nn", "rim", "kmeans", "torch", "faiss", "fp32", "bf16", "device",
         "host", "image", "resnet_small", "googlenet", "Resnet_small", "")  # fmt: skip
RANDOM = {
    TRAIN: {
        **dict.fromkeys(("workers", "low_dim", "n_cluster", "batch_size", "seed", "test_batch", "interval", "neg_m",
                         "image_size", "t", "alpha", "mu", "ml", "rim", "recon", "lr", "checkpoint_every_steps",
                         "eval_memory_mb"), NUMBERS),
        **dict.fromkeys(("dataset", "model_name"), NAMES),
        **dict.fromkeys(("data_dir", "checkpoint_dir", "log_dir", "config", "resume", "weights"), PATHS),
        **dict.fromkeys(("backbone", "positives", "pseudo_labels", "kmeans_engine", "recon_target", "device",
                         "precision", "data_on"), WORDS),
        "n_epoch": ("0", "1", "-1", "0.5"), "overwrite": (None, "1"),
    },
    TEST: {
        **dict.fromkeys(("workers", "seed", "test_batch", "image_size", "eval_memory_mb"), NUMBERS),
        "dataset": NAMES, **dict.fromkeys(("checkpoint_path", "data_dir", "weights", "json", "save_embeddings"), PATHS),
        **dict.fromkeys(("backbone", "device", "precision", "nmi_engine"), WORDS),
    },
}  # fmt: skip


@st.composite
def command_lines(draw) -> tuple[str, dict[str, str | None]]:
    """A script with a few of its options changed at random."""
    script = draw(st.sampled_from((TRAIN, TRAIN, TEST)))
    names = draw(st.lists(st.sampled_from(sorted(RANDOM[script])), min_size=1, max_size=4, unique=True))
    return script, {name: draw(st.sampled_from(RANDOM[script][name])) for name in names}


@settings(max_examples=100, derandomize=True, deadline=None, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(line=command_lines())
@pytest.mark.usefixtures("settings_of_run_point_here")
def test_no_command_line_ends_in_a_traceback_or_changes_files_when_refused(line, folder, monkeypatch):
    script, changed = line
    monkeypatch.chdir(folder)
    monkeypatch.setattr("models.weights._download", no_download)
    base = BASE[script] | (FROZEN if script == TEST and "checkpoint_path" not in changed else {})
    options = {name: value for name, value in (base | changed).items() if value is not None}
    argv = [f"--{name}={value}".replace("{w}", str(folder)) for name, value in options.items()]
    argv += ["--overwrite"] if "overwrite" in changed and changed["overwrite"] is None else []
    before = snapshot(folder)
    outcome = run_in_process(script, *argv, seconds=SECONDS)  # anything but an exit fails the test
    if outcome.code == 0:
        assert outcome.err == ""
        shutil.rmtree(folder / "runs" / "new", ignore_errors=True)
        return
    diverged = outcome.code == DivergedError.status
    failed(outcome, script=script, code=DivergedError.status if diverged else UserError.status)
    began = diverged or "epoch 1" in outcome.err or "cannot score" in outcome.err
    if script == TEST or not began:  # a run that began has its folder
        assert snapshot(folder) == before


def no_download(*_: object) -> None:
    raise AssertionError("no test may fetch anything")
