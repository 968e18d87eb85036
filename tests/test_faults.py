"""What happens to machines: full and read-only disks, no memory, numbers that are not finite."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from scripts import failed
from training import Run, assert_same, before_call, execute, options, resumed, trained

import train
from methods import cbswr
from utils.errors import DivergedError
from utils.runs import check_finite

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {"n_epoch": 2}
CHECKPOINT_BYTES = 2_290_000  # about


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> Run:
    """Two epochs of three steps."""
    return trained(data, tmp_path_factory.mktemp("undisturbed"), **SETTINGS)


# ---------------------------------------------------------------- disks


def mount(folder: Path, *words: object) -> None:
    """Mount a file system, or skip the test where that is not allowed."""
    done = subprocess.run(["mount", *words, folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"may not mount a file system here: {done.stderr.strip()}")


@contextlib.contextmanager
def mounted(folder: Path, *words: object) -> Iterator[None]:
    """Mount a file system for a block."""
    folder.mkdir(exist_ok=True)
    mount(folder, *words)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_keeps_the_checkpoint_before(data, tmp_path, undisturbed):
    folder = tmp_path / "disk"
    run = folder / "run"
    room = CHECKPOINT_BYTES * 3 // 2  # for one checkpoint and a half
    with mounted(folder, "-t", "tmpfs", "-o", f"size={room}", "none"):
        result = execute(*options(data, folder, log_dir=tmp_path / "logs", **SETTINGS))
        words = ("pth: cannot be written (No space left on device); free space there, then resume",)
        failed(result, f"{run}/", *words, run)
        assert Run(run).saved["epoch"] == 1
        names = {path.name for path in run.iterdir()}
        assert names == {"config.json", "metrics.jsonl", "last.pth", "best.pth"}
        mount(folder, "-o", f"remount,size={9 * CHECKPOINT_BYTES}")
        assert_same(resumed(run), undisturbed)


@pytest.mark.slow
def test_a_quota_at_the_first_checkpoint(data, tmp_path, undisturbed, forks):
    """A process of its own limits the size of its files."""
    limit = CHECKPOINT_BYTES // 2
    quota = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    result = forks.run(*options(data, tmp_path, **SETTINGS), before=quota)
    run = tmp_path / "run"
    failed(result, f"{run}/best.pth: cannot be written (File too large)")
    assert {path.name for path in run.iterdir()} == {"config.json", "metrics.jsonl", "run.log"}
    assert_same(resumed(run), undisturbed)


@pytest.mark.slow
def test_a_read_only_folder(data, tmp_path, undisturbed):
    folder = tmp_path / "runs"
    run = trained(data, folder, n_epoch=1).run
    with mounted(folder, "--bind", folder):
        mount(folder, "-o", "remount,bind,ro")
        before = {path.name: path.read_bytes() for path in run.iterdir()}
        failed(execute("--resume", run, "--n_epoch=2"), run)
        failed(execute(*options(data, folder, model_name="other")), folder / "other", "cannot be")
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert_same(resumed(run, "--n_epoch=2"), undisturbed)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_that_cannot_be_written(data, tmp_path):
    (tmp_path / "run.log").symlink_to("/dev/full")
    result = execute(*options(data, tmp_path, log_dir=tmp_path))
    failed(result, f"{tmp_path}/run.log: cannot be written")


def test_places_that_cannot_be_written(data, tmp_path):
    (tmp_path / "file").write_text("in the way")
    failed(
        execute(*options(data, tmp_path / "file")),
        tmp_path / "file",
        "is not a folder; choose another place",
    )
    result = execute(*options(data, tmp_path, log_dir=tmp_path / "file"))
    failed(result, tmp_path / "file", "choose another folder for the log")


# ---------------------------------------------------------------- memory


def no_memory(*_: object, **__: object) -> None:
    """Fail as torch does on a GPU."""
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB.")


def test_no_memory_in_a_step(data, tmp_path, undisturbed):
    with before_call(cbswr, "cbswr_losses", 5, no_memory):
        result = execute(*options(data, tmp_path, checkpoint_every_steps=1, **SETTINGS))
    failed(result, "out of memory on the GPU; lower --batch_size or --test_batch", "--precision")
    assert Run(tmp_path / "run").saved["state"]["step"] == 1
    assert_same(resumed(tmp_path / "run"), undisturbed)


def test_no_memory_on_the_host(data, tmp_path):
    with before_call(train, "score", 1, lambda: torch.empty(1 << 50)):
        result = execute(*options(data, tmp_path))
    failed(result, "out of memory on the host; lower --batch_size")


def test_other_faults_of_torch_stay_what_they_are(data, tmp_path):
    fault = before_call(train, "score", 1, lambda: torch.zeros(2) @ torch.zeros(3))
    with fault, pytest.raises(RuntimeError, match="size"):
        execute(*options(data, tmp_path))


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_keeps_the_last_good_state(
    data, tmp_path, monkeypatch, undisturbed, value
):
    n_calls = []
    total_loss = cbswr.total_loss

    def spoiled(*args: object) -> torch.Tensor:
        n_calls.append(1)
        loss = total_loss(*args)
        return loss * value if len(n_calls) == 5 else loss

    with monkeypatch.context() as patch:
        patch.setattr(cbswr, "total_loss", spoiled)
        result = execute(*options(data, tmp_path, **SETTINGS))
    run = tmp_path / "run"
    failed(result, "epoch 2, step 3 or before: loss is not finite", "a lower rate", code=3)
    saved = Run(run).saved
    assert (saved["epoch"], saved["state"]["step"]) == (1, 0)
    assert_same(resumed(run), undisturbed)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"lr": 1e30}, "epoch 1, step 3 or before: loss is not finite"),
        ({"lr": 1e30, "batch_size": 24, "n_epoch": 2}, "the network's features are not finite"),
    ],
)
def test_divergence_is_one_line(data, tmp_path, settings, words):
    result = execute(*options(data, tmp_path, **settings))
    failed(result, words, code=3)
    assert not (tmp_path / "run" / "last.pth").exists()


def test_the_tensor_that_is_not_finite_is_named():
    tensors = {"a": torch.ones(3), "count": torch.tensor(7), "b": torch.tensor([1, torch.inf])}
    with pytest.raises(DivergedError, match="here: b is not finite"):
        check_finite(tensors, "here")
