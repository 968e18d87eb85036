"""A run that is stopped or killed anywhere goes on to the very numbers of one that was not."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forks import ROOT
from scripts import failed
from synthetic import write_dataset
from training import execute, options, outcome, same_weights, trained

import train as script
from utils.runs import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {"n_epoch": 3, "batch_size": 4, "positives": "nn", "pseudo_labels": "kmeans", "kmeans_engine": "torch"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> SimpleNamespace:
    """Three epochs of six steps."""
    return trained(data, tmp_path_factory.mktemp("undisturbed"), **SETTINGS)


def assert_same(one: SimpleNamespace, other: SimpleNamespace) -> None:
    assert one.rows == other.rows and len(one.rows) == 3
    assert same_weights(one, other)
    assert torch.equal(one.saved["pseudo_labels"], other.saved["pseudo_labels"])
    assert torch.equal(one.saved["rng"]["cpu"], other.saved["rng"]["cpu"])
    best = [torch.load(run.run / "best.pth") for run in (one, other)]
    assert best[0]["epoch"] == best[1]["epoch"]
    assert same_weights(SimpleNamespace(saved=best[0]), SimpleNamespace(saved=best[1]))


def at_call(monkeypatch, name: str, when: int, action) -> list[int]:
    """Do `action` before the `when`-th call of train.py's function `name`; the list grows with every call."""
    calls, function = [], getattr(script, name)

    def counted(*args):
        calls.append(len(calls) + 1)
        if len(calls) == when:
            action()
        return function(*args)

    monkeypatch.setattr(script, name, counted)
    return calls


# ---------------------------------------------------------------- stopped


@pytest.mark.parametrize("function, call, number, where, left", [
    ("train_step", 3, signal.SIGINT, "after epoch 0, step 3 of epoch 1", (15, 2, 3)),
    ("evaluate", 2, signal.SIGINT, "after epoch 1, step 6 of epoch 2", (6, 1, 2)),
    ("pseudo_label_images", 2, signal.SIGTERM, "after epoch 1;", (12, 2, 2)),
    ("pseudo_label_images", 1, signal.SIGHUP, "after epoch 0;", (18, 3, 3)),
    ("print_epoch", 1, signal.SIGINT, "after epoch 1;", (12, 2, 2)),
])  # fmt: skip
def test_stopped_and_resumed(data, tmp_path, monkeypatch, undisturbed, function, call, number, where, left):
    with monkeypatch.context() as patch:
        at_call(patch, function, call, lambda: os.kill(os.getpid(), number))
        result = execute(*options(data, tmp_path, **SETTINGS))
    run = tmp_path / "run"
    assert result.code == 128 + number
    assert (
        f"stopped by {number.name} {where.rstrip(';')}; all is saved, continue with: python train.py --resume {run}\n"
        in result.out
    )
    calls = [at_call(monkeypatch, name, 0, None) for name in ("train_step", "pseudo_label_images", "evaluate")]
    resumed = execute("--resume", run)
    assert (resumed.code, resumed.err) == (0, "")
    assert f"continuing {where.rstrip(';')}\n" in resumed.out
    assert tuple(map(len, calls)) == left  # nothing is done twice
    assert_same(outcome(run), undisturbed)
    log = (run / "run.log").read_text()
    assert [log.count(f"epoch {epoch:>3}  ") for epoch in (1, 2, 3)] == [1, 1, 1]


def test_stopped_several_times_in_one_epoch(data, tmp_path, monkeypatch):
    """Losses and pseudo-labels of the cluster head; each part of the epoch in its own go."""
    settings = {"n_epoch": 1, "batch_size": 4, "positives": "self"}
    whole = trained(data, tmp_path / "whole", **settings)
    argv = options(data, tmp_path, **settings)
    for _ in range(3):
        with monkeypatch.context() as patch:
            at_call(patch, "train_step", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
            assert execute(*argv).code == 143
        argv = ["--resume", tmp_path / "run" / "last.pth"]
        torch.manual_seed(5)  # what happened in between does not matter
    assert outcome(tmp_path / "run").saved["current"]["step"] == 6
    assert execute(*argv).code == 0
    assert same_weights(outcome(tmp_path / "run"), whole) and outcome(tmp_path / "run").rows == whole.rows


def test_checkpoint_every_steps(data, tmp_path, monkeypatch, undisturbed):
    steps = at_call(monkeypatch, "train_step", 11, lambda: pytest.fail("a fault in step 5 of epoch 2"))
    with pytest.raises(pytest.fail.Exception):
        trained(data, tmp_path, checkpoint_every_steps=2, **SETTINGS)
    saved = torch.load(tmp_path / "run" / "last.pth")
    assert (saved["epoch"], saved["current"]["step"]) == (1, 4)
    assert script.main(["--resume", str(tmp_path / "run")]) == 0
    assert len(steps) == 11 + 8
    assert_same(outcome(tmp_path / "run"), undisturbed)


def test_a_second_signal_stops_at_once(data, tmp_path, forks):
    """The step of a minute under way is not waited for; the checkpoint before it stands."""
    slow = (
        "step, calls = train.train_step, []\n"
        "train.train_step = lambda *a: (calls.append(1), len(calls) == 3 and __import__('time').sleep(60)) and step(*a)"
    )
    pid = forks.start(*options(data, tmp_path, checkpoint_every_steps=1, **SETTINGS), before=slow)
    wait_for(lambda: saved_step(tmp_path / "run") == 2)
    time.sleep(0.2)
    started = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: "a second signal stops at once" in (forks.folder / "err").read_text())
    os.kill(pid, signal.SIGINT)
    result = forks.finish()
    assert time.monotonic() - started < 10
    assert result.code == 130
    assert result.err.splitlines()[1:] == ["train.py: stopped at once by a second signal; the last checkpoint is whole"]
    assert saved_step(tmp_path / "run") == 2


def saved_step(run: Path) -> int | None:
    return torch.load(run / "last.pth")["current"]["step"] if (run / "last.pth").exists() else None


def wait_for(holds) -> None:
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


@pytest.mark.parametrize("name, module", [("test.py", "utils.arguments"), ("train.py", "torch.nn")])
def test_ctrl_c_in_the_imports_is_one_line(tmp_path, name, module):
    code = (
        "import runpy, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == {module!r}: signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    argv = [str(ROOT / name), *(["--checkpoint_path", "none.pth"] if name == "test.py" else [])]
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=tmp_path, capture_output=True, text=True,
                          timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"{name}: interrupted before it began\n")


# ---------------------------------------------------------------- killed


def test_killed_at_random_moments(data, tmp_path, forks, undisturbed, request):
    """Every kill falls somewhere between a run's first instant and its end; after each, what lies there is whole."""
    kills = request.config.getoption("--kills")
    argv, rng, survived, ended = options(data, tmp_path, checkpoint_every_steps=1, **SETTINGS), random.Random(), 0, 0
    duration = 0.5 + sum(row["seconds"]["epoch"] for row in undisturbed.full_rows)  # with the set-up, about
    run = tmp_path / "run"
    while survived < kills or not ended:
        delay = rng.uniform(0, duration) if survived < kills else None
        result = forks.run(*argv, kill_after=delay)
        assert result.err == "" and result.code in (0, -signal.SIGKILL), (delay, result)
        if result.code == 0:
            assert_same(outcome(run), undisturbed)
            ended += 1
            shutil.rmtree(run)
            argv = options(data, tmp_path, checkpoint_every_steps=1, **SETTINGS)
        else:
            survived += 1
            assert_whole(run, undisturbed)
            if (run / "config.json").exists():
                argv = ["--resume", run]
    print(f"{survived} kills survived, {ended} runs ended with the numbers of the undisturbed one")


def assert_whole(run: Path, undisturbed: SimpleNamespace) -> None:
    """Each file of a killed run is absent or whole, and says what the undisturbed run says."""
    if (run / "metrics.jsonl").exists():
        text = (run / "metrics.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        assert text == "" or text.endswith("\n")
        assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
        assert [row["loss"] for row in rows] == [row["loss"] for row in undisturbed.rows[: len(rows)]]
    if (run / "config.json").exists():
        assert json.loads((run / "config.json").read_text())["seed"] == 3
    for name in ("last.pth", "best.pth"):
        if (run / name).exists():
            assert torch.load(run / name)["epoch"] <= 3
    if (run / "run.log").exists():
        log = (run / "run.log").read_text()
        assert max(log.count(f"epoch {epoch:>3}  ") for epoch in (1, 2, 3)) <= 1


# ---------------------------------------------------------------- what --resume takes


def test_a_run_without_a_checkpoint_begins_anew(data, tmp_path, undisturbed):
    (tmp_path / "run").mkdir()
    shutil.copyfile(undisturbed.run / "config.json", tmp_path / "run" / "config.json")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    (tmp_path / "run" / ".last.pth.123.part").write_bytes(b"left by a killed process")
    result = execute("--resume", tmp_path / "run")
    assert result.code == 0 and "continuing after epoch 0\n" in result.out
    assert_same(outcome(tmp_path / "run"), undisturbed)
    assert not list((tmp_path / "run").glob(".*"))


def test_an_earlier_checkpoint(data, tmp_path, monkeypatch):
    epochs = {"n_epoch": 2, "batch_size": 8}
    monkeypatch.setattr(script, "evaluate", lambda *_: scores(0.5))  # the first epoch stays the best
    done = trained(data, tmp_path, **epochs)
    before = (done.run / "last.pth").read_bytes()
    failed(execute("--resume", done.run / "best.pth"), f"{done.run / 'last.pth'} is there, and would be lost")
    assert (done.run / "last.pth").read_bytes() == before
    (done.run / "last.pth").unlink()
    failed(execute("--resume", done.run), f"no such file; continue from the best epoch with --resume {done.run}/best")
    result = execute("--resume", done.run / "best.pth")
    assert result.code == 0 and "continuing after epoch 1\n" in result.out
    again = outcome(done.run)
    assert same_weights(again, done) and again.rows == done.rows


def scores(recall: float) -> dict:
    return {f"recall@{k}": recall for k in (1, 2, 4, 8)} | {"nmi": 0.5, "nmi_protocol": "none"}


def test_the_rate_may_change(data, tmp_path, undisturbed):
    trained(data, tmp_path, **{**SETTINGS, "n_epoch": 2})
    assert script.main(["--resume", str(tmp_path / "run"), "--n_epoch=3", "--lr=0.01"]) == 0
    changed = outcome(tmp_path / "run")
    assert [row["lr"] for row in changed.rows] == [0.05, 0.05, 0.01]
    assert changed.rows[:2] == undisturbed.rows[:2] and changed.rows[2]["loss"] != undisturbed.rows[2]["loss"]
    assert changed.saved["optimizer"]["param_groups"][0]["lr"] == changed.saved["config"]["lr"] == 0.01


def test_one_process_a_folder(data, tmp_path):
    done = trained(data, tmp_path)
    other = RunFolder(done.run)
    other.lock()
    failed(execute("--resume", done.run, "--n_epoch=2"), f"{done.run}: another process is training in this folder")
    failed(execute(*options(data, tmp_path), "--overwrite"), "another process is training in this folder")
    assert outcome(done.run).rows == done.rows
    other.close()
    assert execute("--resume", done.run, "--n_epoch=2").code == 0


def test_a_finished_epoch_costs_nothing_again(data, tmp_path, monkeypatch):
    """Killed between best.pth and last.pth: the epoch is made again, to the same files."""
    whole = trained(data, tmp_path / "whole", n_epoch=2)
    with monkeypatch.context() as patch:
        patch.setattr("utils.runs._link", lambda *_: pytest.fail("killed here"))
        with pytest.raises(pytest.fail.Exception):
            trained(data, tmp_path, n_epoch=2)
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {"best.pth", "config.json", "metrics.jsonl", "run.log"}
    assert script.main(["--resume", str(run / "best.pth")]) == 0
    assert same_weights(outcome(run), whole) and outcome(run).rows == whole.rows


# ---------------------------------------------------------------- the same bits


def test_deterministic(data, tmp_path, forks, undisturbed):
    """In a process of its own, for the switch is the whole process's."""
    after = (
        "import os, torch\n"
        "save = train.save\n"
        "train.save = lambda *a: (save(*a), print('SWITCHED', torch.are_deterministic_algorithms_enabled(), "
        "torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, os.environ['CUBLAS_WORKSPACE_CONFIG']))"
    )
    result = forks.run(*options(data, tmp_path, **SETTINGS), "--deterministic", before=after)
    assert result.code == 0 and "SWITCHED True True False :4096:8" in result.out
    assert_same(outcome(tmp_path / "run"), undisturbed)  # a CPU computes the same bits anyway
