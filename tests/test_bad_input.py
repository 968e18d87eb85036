"""Mistakes that people make end in one line that names them, with status 2 and no file changed.

The options alone are in tests/test_options.py, runs to resume in tests/test_resume.py, damaged
files in the tests of the rooms that read them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import ROOT, Outcome, failed, run_in_process
from synthetic import write_dataset
from training import options, trained

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGES = "data/tiny/validation_tiny_32resized_img.npy"
LAST = "runs/done/last.pth"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with data, a finished run, a run that has just begun, and odd files."""
    folder = tmp_path_factory.mktemp("place")
    write_dataset(folder / "data")
    trained(folder / "data", folder / "runs").run.rename(folder / "runs" / "done")
    (folder / "runs" / "begun").mkdir()
    (folder / "file").write_text("in the way")
    for ending in ("npy", "csv", "json"):
        (folder / f"rows.{ending}").write_text("of embed.py")
    (folder / "link.json").symlink_to(folder / LAST)
    (folder / "folder.json").mkdir()
    torch.save({"epoch": 3}, folder / "empty.pth")
    shutil.copytree(folder / "data" / "tiny", folder / "short" / "tiny")
    labels = folder / "short" / "tiny" / "training_tiny_32resized_label.npy"
    np.save(labels, np.load(labels)[1:])
    shutil.copytree(folder / "data" / "tiny", folder / "torn" / "tiny")
    os.truncate(folder / "torn" / "tiny" / "training_tiny_32resized_img.npy", 5000)
    return folder


def snapshot(folder: Path) -> dict[str, tuple]:
    """Return size and time of change of everything below a folder."""
    states = {str(path): path.lstat() for path in folder.rglob("*")}
    return {path: (state.st_size, state.st_mtime_ns) for path, state in states.items()}


TRAIN = [
    ("--norm=0.5", "--norm: weighted a loss that the released code did not have; leave it out"),
    ("--batchsize=8", "unknown option --batchsize; did you mean --batch_size?"),
    ("--mod=x", "unknown option --mod"),
    ("cub200", "unrecognized arguments: cub200"),
    ("--lr", "argument --lr: expected one argument"),
    ("--overwrite=yes", "'yes'"),
    ("--model_name=../up", "--model_name: expected a plain name"),
    ("--backbone=resnet-small", "did you mean resnet_small?"),
    ("--backbone=googlenet", "crop"),  # too deep for these images
    ("--weights=none.pth", "none.pth: no such file"),
    ("--weights=auto", "there are no pretrained weights for resnet_small"),
    ("--weights=file", "file: "),
    (f"--backbone=resnet18 --weights={LAST}", "resnet18"),
    ("--dataset=tinny", "training_tinny_256resized_img.npy: no such file; make it from a folder"),
    ("--dataset=cub200", "make it with python pre_process/pre_process_cub200.py"),
    ("--image_size=48", "training_tiny_48resized_img.npy: no such file"),
    ("--data_dir=short", "training_tiny_32resized_label.npy: expected 24 integer labels"),
    ("--data_dir=torn", "training_tiny_32resized_img.npy: not a plain .npy array"),
    ("--batch_size=25", "batch_size 25: there are 24 training images"),
    ("--n_cluster=25", "n_cluster 25: there are 24 training images"),
    ("--ml=0 --rim=0 --recon=0", "there is nothing to train"),
    ("--recipe=proxy_anchor --rim=0", "--rim: is not read by the method proxy_anchor"),
    ("--recipe=isif --batch_size=1", "a batch_size of at least 2"),
    ("--recipe=stml --batch_size=8", "batch_size 8: no multiple of the group of 5; try 5"),
    ("--layers=layer9", "layer9"),
    ("--pool=sum", "sum"),
    ("--stripes=0", "stripes"),
    ("--train_stages=9", "resnet_small has 3 stages that can be trained alone, fewer than 9"),
    ("--refit_head=auto", "--refit_head: a random head has no closed form; give --head_init pca"),
    ("--refit_head=maybe", "expected a number, got 'maybe'; or give off, start, auto"),
    ("--head_init=pca --refit_head=1", "go with --head_init whiten"),
    ("--head_init=pca --refit_head=auto", "goes with --head_init whiten or auto"),
    ("--head_init=pca --whiten_power=1", "go with --head_init whiten"),
    ("--recipe=best --momentum=0.9", "--momentum goes with --optimizer sgd"),
    ("--crop_area=0", "--crop_area: must be greater than 0, got 0"),
    ("--data_on=device", "there is no GPU to hold the images"),
    ("--model_name=done", "runs/done: holds a run already"),
    ("--checkpoint_dir=file", "is not a folder; choose another place for the run"),
    ("--resume=runs/done --overwrite", "--config and --overwrite do not go with --resume"),
    ("--resume=runs/begun", "runs/begun: no run lies there"),
    ("--resume=runs/done/last.ckpt", "runs/done/last.ckpt: no run lies there"),
    ("--resume=runs/done/best.pth", "runs/done/best.pth: no run lies there"),
]
TEST = [
    ("", "give --checkpoint_path, or --backbone for a frozen backbone"),
    (f"--checkpoint_path={LAST} --weights=none", "--weights goes with a frozen backbone"),
    ("--backbone=resnet_small --weights=none --dim=4", "--dim goes with --checkpoint_path"),
    ("--backbone=resnet_small --n_cluster=4", "--n_cluster goes with --checkpoint_path"),
    (f"--checkpoint_path={LAST} --backbone=resnet18", "was trained with the backbone resnet_small"),
    ("--checkpoint_path=no.pth", "no.pth: no such file"),
    ("--checkpoint_path=runs/done.5", "runs/done.5: no such file"),
    ("--checkpoint_path=runs/begun", "runs/begun: is not the folder of a run"),
    ("--checkpoint_path=file", "file: "),
    ("--checkpoint_path=empty.pth", "empty.pth: not a CBSwR checkpoint: it holds no named"),
    (f"--checkpoint_path={LAST} --json=file", "file: the name must end in .json"),
    (f"--checkpoint_path={LAST} --json=folder.json", "folder.json: is a folder; give the name"),
    (f"--checkpoint_path={LAST} --json=none/a.json", "none/a.json: its folder does not exist"),
    ("--checkpoint_path=a.json --json=a.json", "would overwrite what --checkpoint_path names"),
    (f"--checkpoint_path={LAST} --json=link.json", "would overwrite what --checkpoint_path names"),
    (f"--checkpoint_path={LAST} --json=runs/done/config.json", "belongs to the run "),
    (f"--checkpoint_path={LAST} --json=rows.json", "belongs to the embeddings rows.npy"),
    (f"--checkpoint_path={LAST} --save_embeddings=rows.npy", "belongs to the embeddings rows"),
    (f"--checkpoint_path={LAST} --save_embeddings=a.txt", "the name must end in .npy"),
    (f"--checkpoint_path={LAST} --save_embeddings={IMAGES}", "lies among the data set's arrays"),
]


@pytest.mark.parametrize("words, message", TRAIN)
def test_train(place, monkeypatch, words, message):
    monkeypatch.chdir(place)
    before = snapshot(place)
    argv = options(Path("data"), Path("runs"), model_name="new")
    argv = [] if "--resume" in words else argv
    result = run_in_process("train.py", *argv, *words.split())
    failed(result, message, script="train.py")
    assert snapshot(place) == before


@pytest.mark.parametrize("words, message", TEST)
def test_test(place, monkeypatch, words, message):
    monkeypatch.chdir(place)
    before = snapshot(place)
    argv = ["--dataset=tiny", "--data_dir=data", "--device=cpu", *words.split()]
    failed(run_in_process("test.py", *argv), message, script="test.py")
    assert snapshot(place) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_no_gpu(place):
    argv = options(place / "data", place / "runs", model_name="new", device="cuda")
    failed(run_in_process("train.py", *argv), "torch sees no CUDA device here; use the device cpu")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "test.py"])
def test_a_real_command_line(tmp_path, script):
    command = [sys.executable, ROOT / script, "--no_such_option=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    result = Outcome(done.returncode, done.stdout, done.stderr)
    failed(result, "unknown option --no_such_option", script=script)
    assert done.stdout == ""
