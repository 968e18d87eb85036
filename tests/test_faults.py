"""What happens to machines: full and read-only disks, data that changes, no memory, numbers that are not finite."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scripts import failed
from synthetic import write_dataset
from torch import nn
from training import execute, options, outcome, same_weights, trained

import train as script
from losses import cbswr
from utils.errors import DivergedError
from utils.finite import LossWatch, check_weights

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {"n_epoch": 2}
BYTES_OF_A_CHECKPOINT = 2_280_000  # as of these settings; asserted where it matters


@pytest.fixture
def data(tmp_path) -> Path:
    return write_dataset(tmp_path / "data")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> SimpleNamespace:
    """Two epochs of three steps."""
    return trained(write_dataset(tmp_path_factory.mktemp("data")), tmp_path_factory.mktemp("undisturbed"), **SETTINGS)


def assert_resumes(run: Path, undisturbed: SimpleNamespace, *more: object) -> None:
    result = execute("--resume", run, *more)
    assert (result.code, result.err) == (0, "")
    assert outcome(run).rows == undisturbed.rows and same_weights(outcome(run), undisturbed)


# ---------------------------------------------------------------- disks


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of its own that has room for one checkpoint and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount(folder, "-t", "tmpfs", "-o", f"size={BYTES_OF_A_CHECKPOINT * 3 // 2}", "none")
    yield folder
    subprocess.run(["umount", folder], check=True)


def mount(folder: Path, *options: object) -> None:
    done = subprocess.run(["mount", *options, folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"may not mount a file system here: {done.stderr.strip()}")


def test_a_full_disk_keeps_the_checkpoint_before(data, small_disk, tmp_path, undisturbed):
    assert 0.7 < (undisturbed.run / "last.pth").stat().st_size / BYTES_OF_A_CHECKPOINT < 1.2
    logs = tmp_path / "logs"
    result = execute(*options(data, small_disk, log_dir=logs, **SETTINGS))
    run = small_disk / "run"
    failed(result, f"{run}/", "pth: cannot be written (No space left on device); free space there", f"--resume {run}")
    assert outcome(run).saved["epoch"] == 1 and outcome(run).rows == undisturbed.rows[:1]
    assert {path.name for path in run.iterdir()} == {"config.json", "metrics.jsonl", "last.pth", "best.pth"}
    mount(small_disk, "-o", f"remount,size={BYTES_OF_A_CHECKPOINT * 9}")
    assert_resumes(run, undisturbed)


def test_a_quota_at_the_first_checkpoint(data, tmp_path, undisturbed, forks):
    """Files may not grow beyond a limit, which a process of its own sets itself."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({BYTES_OF_A_CHECKPOINT // 2},) * 2)"
    result = forks.run(*options(data, tmp_path, **SETTINGS), before=limit)
    run = tmp_path / "run"
    failed(result, f"{run}/best.pth: cannot be written (File too large)")
    assert {path.name for path in run.iterdir()} == {"config.json", "metrics.jsonl", "run.log"}
    assert_resumes(run, undisturbed)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_log_that_cannot_be_written(data, tmp_path, undisturbed):
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "run.log").symlink_to("/dev/full")
    failed(execute(*options(data, tmp_path, log_dir=logs, **SETTINGS)), f"{logs}/run.log: cannot be written")
    assert_resumes(tmp_path / "run", undisturbed, "--log_dir", tmp_path)


def test_a_read_only_folder(data, tmp_path, undisturbed):
    folder = tmp_path / "runs"
    folder.mkdir()
    run = folder / "run"
    trained(data, folder, **{**SETTINGS, "n_epoch": 1})
    with read_only(folder):
        before = {path.name: path.read_bytes() for path in run.iterdir()}
        failed(execute("--resume", run, "--n_epoch=2"), f"{run}: cannot be written to (", "make it writable")
        failed(execute(*options(data, folder, model_name="other")), f"{folder / 'other'}: cannot be written to (")
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert_resumes(run, undisturbed, "--n_epoch=2")


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Without the right to write; for root, whom rights do not hold, a read-only mount of the folder on itself."""
    if os.getuid() == 0:
        mount(folder, "--bind", folder)
        try:
            mount(folder, "-o", "remount,bind,ro")
            yield
        finally:
            subprocess.run(["umount", folder], check=True)
        return
    folders = [folder, *(path for path in folder.iterdir() if path.is_dir())]
    for path in folders:
        path.chmod(0o555)
    try:
        yield
    finally:
        for path in folders:
            path.chmod(0o755)


# ---------------------------------------------------------------- data


def image_file(data: Path, half: str = "training") -> Path:
    return data / "tiny" / f"{half}_tiny_32resized_img.npy"


def before_step(monkeypatch, number: int, action) -> None:
    calls, step = [], script.train_step

    def counted(*args):
        calls.append(1)
        if len(calls) == number:
            action()
        return step(*args)

    monkeypatch.setattr(script, "train_step", counted)


@pytest.mark.parametrize("workers, step", [(0, 4), (2, 3)])  # with 2, an epoch's three batches are cut ahead at once
@pytest.mark.parametrize("how", ["truncated", "changed"])
def test_data_changed_under_a_run(data, tmp_path, monkeypatch, undisturbed, how, workers, step):
    path = image_file(data)
    whole = path.read_bytes()

    def damage() -> None:
        time.sleep(0.1)  # the batches that are cut ahead are done
        if how == "truncated":
            os.truncate(path, 1000)
        else:
            with open(path, "r+b") as file:
                file.seek(5000)
                file.write(b"another pixel")

    with monkeypatch.context() as patch:
        before_step(patch, step, damage)
        result = execute(*options(data, tmp_path, workers=workers, **SETTINGS))
    failed(result, f"{path}: was changed while it was in use; put the old file back")
    run = tmp_path / "run"
    saved = outcome(run).saved
    assert (saved["epoch"], saved["current"]["step"]) == (1, step % 3)
    refused = execute("--resume", run)
    failed(refused, str(path), "truncated" if how == "truncated" else "its content has changed")
    path.write_bytes(whole)
    assert_resumes(run, undisturbed)


def test_data_changed_under_an_evaluation(data, tmp_path, monkeypatch, undisturbed):
    path = image_file(data, "validation")
    whole, evaluate = path.read_bytes(), script.evaluate

    def damaged(*args):
        os.truncate(path, 1000)
        return evaluate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(script, "evaluate", damaged)
        failed(execute(*options(data, tmp_path, **SETTINGS)), f"{path}: was changed while it was in use")
        path.write_bytes(whole)
    assert outcome(tmp_path / "run").saved["current"]["step"] == 3
    assert_resumes(tmp_path / "run", undisturbed)


def test_a_file_put_in_the_place_of_an_open_one_does_no_harm(data, tmp_path, monkeypatch, undisturbed):
    path = image_file(data)

    def replace() -> None:
        np.save(path.with_name("new.npy"), np.zeros((30, 32, 32, 3), np.uint8))
        path.with_name("new.npy").replace(path)

    before_step(monkeypatch, 2, replace)
    assert trained(data, tmp_path, **SETTINGS).rows == undisturbed.rows
    failed(execute("--resume", tmp_path / "run", "--n_epoch=3"), str(path), "30 images but 24 labels")


@pytest.mark.parametrize("half", ["training", "validation"])
@pytest.mark.parametrize("part, change, words", [
    ("img", lambda a: np.concatenate([a[:-1], a[-1:] ^ 1]), "its content has changed"),
    ("label", lambda a: np.roll(a, 1), "its content has changed"),
    ("both", lambda a: a[:20], "uint8 (20, 32, 32, 3), it was uint8 (24, 32, 32, 3)"),
])  # fmt: skip
def test_other_data_is_not_resumed(data, tmp_path, undisturbed, half, part, change, words):
    before = (undisturbed.run / "last.pth").read_bytes()
    paths = [image_file(data, half).with_name(image_file(data, half).name.replace("_img", f"_{name}"))
             for name in (("img", "label") if part == "both" else (part,))]  # fmt: skip
    for path in paths:
        np.save(path, change(np.load(path)))
    failed(execute("--resume", undisturbed.run, "--data_dir", data), f"{paths[0]}: not the file", words)
    assert (undisturbed.run / "last.pth").read_bytes() == before


# ---------------------------------------------------------------- memory


def no_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of ...")


def test_no_memory_in_a_step(data, tmp_path, monkeypatch, undisturbed):
    calls, function = [], cbswr.cbswr_losses
    with monkeypatch.context() as patch:
        patch.setattr(cbswr, "cbswr_losses", lambda *a, **k: (
            calls.append(1), len(calls) == 5 and no_memory(), function(*a, **k))[-1])  # fmt: skip
        result = execute(*options(data, tmp_path, checkpoint_every_steps=1, **SETTINGS))
    failed(result, "out of memory on the GPU; lower --batch_size (8)", "--test_batch (100)", "--precision bf16",
           "--data_on host", f"--resume {tmp_path / 'run'}")  # fmt: skip
    assert outcome(tmp_path / "run").saved["current"]["step"] == 1
    assert_resumes(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("fault", [no_memory, lambda *_: torch.empty(1 << 50)])
def test_no_memory_in_an_evaluation(data, tmp_path, monkeypatch, undisturbed, fault):
    with monkeypatch.context() as patch:
        patch.setattr(script, "evaluate", fault)
        result = execute(*options(data, tmp_path, **SETTINGS))
    failed(result, f"out of memory on the {'GPU' if fault is no_memory else 'host'}; lower", "--test_batch (100)")
    assert outcome(tmp_path / "run").saved["current"]["step"] == 3  # the epoch's steps are not lost
    assert_resumes(tmp_path / "run", undisturbed)


def test_other_faults_of_torch_stay_what_they_are(data, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "evaluate", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        trained(data, tmp_path)
    assert outcome(tmp_path / "run").saved["current"]["step"] == 3


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_keeps_the_last_good_state(data, tmp_path, monkeypatch, undisturbed, value):
    calls, function = [], cbswr.total_loss
    with monkeypatch.context() as patch:
        patch.setattr(cbswr, "total_loss", lambda *a: (
            calls.append(1), function(*a) * (value if len(calls) == 5 else 1))[-1])  # fmt: skip
        result = execute(*options(data, tmp_path, checkpoint_every_steps=1, **SETTINGS))
    run = tmp_path / "run"
    failed(result, f"epoch 2, step 2 of 3: the loss is not finite (loss {value:g}".replace("inf", ""), ", metric ",
           ", rim ", ", reconstruction ", f"python train.py --resume {run} --lr 0.005", code=3)  # fmt: skip
    saved = outcome(run).saved
    assert (saved["epoch"], saved["current"]["step"]) == (1, 1)
    assert all(v.isfinite().all() for v in saved["model"].values() if v.is_floating_point())
    assert_resumes(run, undisturbed)


def test_loss_watch_names_the_step_and_each_loss():
    watch = LossWatch(("loss", "metric", "rim"))
    watch.add("step 1", torch.tensor([1.0, 2.0, float("nan")]))  # a part of weight zero
    with pytest.raises(DivergedError, match=r"^step 2: the loss is not finite \(loss inf, metric -2, rim 3\)$"):
        watch.add("step 2", torch.tensor([float("inf"), -2.0, 3.0]))
    watch.finish()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: on the CPU losses are read at once")
def test_loss_watch_looks_later_on_a_gpu():
    watch = LossWatch(("loss",))
    watch.add("step 1", torch.tensor([float("nan")], device="cuda"))
    for step in range(2, 9):
        watch.add(f"step {step}", torch.zeros(1, device="cuda"))
    with pytest.raises(DivergedError, match=r"^step 1: "):
        watch.add("step 9", torch.zeros(1, device="cuda"))
    watch.add("step 10", torch.tensor([float("inf")], device="cuda"))
    with pytest.raises(DivergedError, match=r"^step 10: "):
        watch.finish()


@pytest.mark.parametrize("name", ["0.weight", "1.running_var"])
def test_weights_that_are_not_finite_are_named(name):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    check_weights(model, "here")
    model.state_dict()[name].view(-1)[-1] = float("inf")
    with pytest.raises(DivergedError, match=f"^here: the weights are not finite, the first is {name}$"):
        check_weights(model, "here")
