"""A run that is stopped or killed anywhere goes on to the numbers of one that was not.

tests/test_golden_runs.py stops every recipe in the middle of an epoch.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import failed, path_of
from synthetic import write_dataset
from training import (
    Run,
    assert_same,
    before_call,
    execute,
    options,
    resumed,
    same_weights,
    stopped,
    trained,
)

import train
from methods.cbswr import CBSwRMethod
from models import build_model
from utils.errors import UserError
from utils.runs import RunFolder, State, find_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {"recipe": "kmeans", "n_epoch": 2, "batch_size": 4, "positives": "nn", "n_cluster": 4}


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> Run:
    """Two epochs of six steps."""
    return trained(data, tmp_path_factory.mktemp("undisturbed"), **SETTINGS)


@pytest.fixture
def run(undisturbed, tmp_path) -> Path:
    """A copy of the undisturbed run's folder."""
    return Path(shutil.copytree(undisturbed.run, tmp_path / "run"))


def change_checkpoint(run: Path, change: Callable[[dict], object]) -> None:
    """Write last.pth anew after a change."""
    saved = torch.load(run / "last.pth")
    change(saved)
    torch.save(saved, run / "last.pth")


# ---------------------------------------------------------------- stopped


@pytest.mark.parametrize(
    "owner, name, call, number, place",
    [
        (State, "end_step", 6, signal.SIGTERM, (0, 6)),
        (train, "score", 2, signal.SIGINT, (1, 6)),
        (CBSwRMethod, "begin_epoch", 2, signal.SIGTERM, (1, 0)),
        (CBSwRMethod, "begin_epoch", 1, signal.SIGHUP, (0, 0)),
        (train, "log_epoch", 1, signal.SIGINT, (1, 0)),
    ],
)
def test_stopped_and_resumed(data, tmp_path, undisturbed, owner, name, call, number, place):
    run = tmp_path / "run"
    with before_call(owner, name, call, lambda: signal.raise_signal(number)) as calls:
        result = execute(*options(data, tmp_path, **SETTINGS))
        assert result.code == 128 + number
        command = f"python {path_of('train.py')} --resume {run}\n"
        assert f"stopped by {number.name}; continue with: {command}" in result.out
        saved = Run(run).saved
        assert (saved["epoch"], saved["state"]["step"]) == place
        assert_same(resumed(run), undisturbed)
    # features and scores are computed anew, as the signal cut them short
    assert len(calls) == {"end_step": 12, "log_epoch": 2}.get(name, 2 + 1)
    log = (run / "run.log").read_text()
    assert [log.count(f"epoch {epoch:>3}  ") for epoch in (1, 2)] == [1, 1]


def test_stopped_several_times(data, tmp_path, undisturbed):
    run = stopped(data, tmp_path, 2, **SETTINGS)
    for _ in range(2):
        with before_call(State, "end_step", 4, lambda: signal.raise_signal(signal.SIGTERM)):
            assert execute("--resume", run).code == 143
        torch.manual_seed(99)  # what happens in between does not matter
    assert Run(run).saved["state"]["step"] == 4
    assert_same(resumed(run), undisturbed)


def test_checkpoint_every_steps(data, tmp_path, undisturbed):
    with (
        pytest.raises(ZeroDivisionError),
        before_call(State, "end_step", 11, lambda: 1 / 0),
    ):
        trained(data, tmp_path, checkpoint_every_steps=2, **SETTINGS)
    saved = torch.load(tmp_path / "run" / "last.pth")
    assert (saved["epoch"], saved["state"]["step"]) == (1, 4)
    assert_same(resumed(tmp_path / "run"), undisturbed)


@pytest.mark.slow
def test_a_second_signal_stops_at_once(data, tmp_path, forks):
    """It does not wait for the step of a minute that is under way."""
    sleep = """
import time
from utils.runs import State
end_step = State.end_step
def slow(self, *args):
    if self.step == 2:
        time.sleep(60)
    return end_step(self, *args)
State.end_step = slow
"""
    pid = forks.start(*options(data, tmp_path, checkpoint_every_steps=1, **SETTINGS), before=sleep)
    last = tmp_path / "run" / "last.pth"
    wait_for(lambda: last.exists() and torch.load(last)["state"]["step"] == 2)
    started = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: "a second signal stops at once" in (forks.folder / "err").read_text())
    os.kill(pid, signal.SIGINT)
    result = forks.finish()
    assert time.monotonic() - started < 10
    assert result.code == 130
    (line,) = result.err.splitlines()[1:]
    assert line.startswith("train.py: stopped at once by a second signal")
    assert torch.load(last)["state"]["step"] == 2
    with pytest.raises(UserError, match="holds no finished epoch yet"):
        find_checkpoint(str(last.parent))


def wait_for(holds: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


# ---------------------------------------------------------------- killed


@pytest.mark.slow
def test_killed_at_random_moments(data, tmp_path, forks, undisturbed, request):
    """What lies there after a kill is whole, and the run goes on from it."""
    n_kills = request.config.getoption("--kills")
    rng = random.Random()
    start = options(data, tmp_path, checkpoint_every_steps=1, **SETTINGS)
    argv = start
    duration = 0.5 + sum(sum(row["seconds"].values()) for row in undisturbed.full_rows)
    run = tmp_path / "run"
    n_survived = 0
    n_ended = 0
    while n_survived < n_kills or not n_ended:
        delay = rng.uniform(0, duration) if n_survived < n_kills else None
        result = forks.run(*argv, kill_after=delay)
        assert result.err == ""
        if result.code == 0:
            assert_same(Run(run), undisturbed)
            n_ended += 1
            shutil.rmtree(run)
            argv = start
        else:
            assert result.code == -signal.SIGKILL, (delay, result)
            n_survived += 1
            argv = ["--resume", run] if (run / "config.json").exists() else start
            if (run / "last.pth").exists():
                rows = Run(run).rows
                assert rows == undisturbed.rows[: len(rows)]


def test_killed_between_its_two_checkpoints(data, tmp_path, monkeypatch):
    """best.pth is there, last.pth is not yet: its copy is."""
    whole = trained(data, tmp_path / "whole", n_epoch=2)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("utils.runs._link", lambda *_: 1 / 0)
        trained(data, tmp_path, n_epoch=2)
    run = tmp_path / "run"
    failed(execute("--resume", run), "last.pth: no such file; copy best.pth there to go on from it")
    shutil.copyfile(run / "best.pth", run / "last.pth")
    assert_same(resumed(run), whole)


# ---------------------------------------------------------------- what is resumed


def test_a_run_without_a_checkpoint_begins_anew(run, undisturbed):
    for name in ("last.pth", "best.pth"):
        (run / name).unlink()
    (run / ".last.pth.123.part").write_bytes(b"of a process that was killed")
    assert_same(resumed(run), undisturbed)
    assert not list(run.glob(".*"))


def test_a_finished_run_stays_as_it_is(run, undisturbed):
    (run / "metrics.jsonl").unlink()  # as if killed just before it was written
    for words in ([], ["--n_epoch=1"]):
        assert resumed(run, *words).full_rows == undisturbed.full_rows
        assert (run / "last.pth").read_bytes() == (undisturbed.run / "last.pth").read_bytes()


def test_options_that_nothing_used_are_not_noted(run):
    noted = (run / "config.json").read_text()
    assert json.loads(noted)["lr"] != 7
    resumed(run, "--lr=7")
    assert (run / "config.json").read_text() == noted


def test_the_checkpoint_stands_for_its_run(run, undisturbed):
    assert execute("--resume", run / "last.pth").code == 0
    assert Run(run, "").full_rows == undisturbed.full_rows


def test_a_moved_run_gets_more_epochs(data, tmp_path, run):
    moved = tmp_path / "elsewhere" / "other"
    moved.parent.mkdir()
    run.rename(moved)
    again = resumed(moved, "--n_epoch=3", "--workers=1", "--batch_size=4")
    whole = trained(data, tmp_path / "whole", **SETTINGS | {"n_epoch": 3})
    assert again.rows == whole.rows
    assert same_weights(again, whole)
    assert not run.exists()


def test_one_process_a_folder(data, run):
    with RunFolder(run) as holder:
        holder.lock()
        message = f"{run}: another process is training in this folder"
        failed(execute("--resume", run, "--n_epoch=3"), message)
        failed(execute(*options(data, run.parent), "--overwrite"), message)
    assert execute("--resume", run, "--n_epoch=3").code == 0


@pytest.mark.slow
def test_deterministic(data, tmp_path, forks, undisturbed):
    """In a process of its own: the switch is the whole process's."""
    tell = """
import os, torch
def tell(*_):
    print("SWITCHED", torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark)
train.log_summary = tell
"""
    argv = options(data, tmp_path, **SETTINGS)
    assert "SWITCHED True False" in forks.run(*argv, "--deterministic", before=tell).out
    assert_same(Run(tmp_path / "run"), undisturbed)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("half", ["training", "validation"])
@pytest.mark.parametrize("kind", ["img", "label"])
def test_other_data_are_not_resumed(tmp_path, run, half, kind):
    data = write_dataset(tmp_path / "data")
    assert execute("--resume", run, f"--data_dir={data}").code == 0
    path = data / "tiny" / f"{half}_tiny_32resized_{kind}.npy"
    np.save(path, np.roll(np.load(path), 1))
    before = (run / "last.pth").read_bytes()
    result = execute("--resume", run, f"--data_dir={data}")
    failed(result, f"{run}/last.pth: the {half} half is not the one that the run began with")
    assert (run / "last.pth").read_bytes() == before


def test_a_run_has_the_default_of_an_option_that_is_younger(data, run):
    config = json.loads((run / "config.json").read_text())
    del config["momentum"]
    (run / "config.json").write_text(json.dumps(config))
    assert execute("--resume", run, f"--data_dir={data}", "--momentum=0").code == 0
    failed(execute("--resume", run, "--momentum=0.9"), f"--momentum was 0.0 in {run}")


def test_another_size_of_the_data_does_not_matter(data, run, tmp_path):
    copy = shutil.copytree(data, tmp_path / "copy")
    for path in copy.glob("*/*_32resized_*"):
        shutil.copy(path, path.with_name(path.name.replace("_32resized", "_24resized")))
    assert execute("--resume", run, f"--data_dir={copy}").code == 0


def test_a_run_of_an_earlier_version_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"metric_loss": "center", "backbone": "resnet_small"}')
    words = "an earlier version made it; it can be tested only"
    failed(execute("--resume", tmp_path), f"resume {tmp_path}: {words}")


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda run: (run / "config.json").unlink(), "no run lies there"),
        (lambda run: os.truncate(run / "config.json", 99), "config.json: not valid JSON"),
        (
            lambda run: os.truncate(run / "last.pth", 50_000),
            "last.pth: not a file that torch",
        ),
        (lambda run: change_checkpoint(run, lambda c: c.pop("optimizer")), "does not fit"),
        (lambda run: change_checkpoint(run, lambda c: c["method"].popitem()), "does not fit"),
        (
            lambda run: change_checkpoint(
                run, lambda c: c.update(model=build_model("resnet_small", 5, 16).state_dict())
            ),
            "does not fit the options of its run (Error(s) in loading state_dict",
        ),
    ],
)
def test_a_damaged_run_is_refused(run, spoil, words):
    spoil(run)
    failed(execute("--resume", run), words, run)
