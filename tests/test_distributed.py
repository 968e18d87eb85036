"""Many processes: their numbers are those of one, one of them speaks, none waits for the dead."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes as job
import pytest
import torch
from scripts import ROOT, failed
from synthetic import write_dataset, write_dataset_by_chance
from training import Run, options, resumed, same_weights, trained

from utils.distributed import ALONE

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {"recipe": "kmeans", "positives": "nn", "n_cluster": 4, "n_epoch": 2, "batch_size": 6}
SETTINGS |= {"test_batch": 5, "lr": 1e-4}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset_by_chance(tmp_path_factory.mktemp("data"))


# ---------------------------------------------------------------- losses, weights, features


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, torch.Tensor]]:
    return job.everything(ALONE)


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_many_processes_compute_what_one_does(alone, tmp_path, forks, count):
    done = forks.run(tmp_path, script="tests/processes.py", processes=count)
    assert done.code == 0, done.err
    many = torch.load(tmp_path / f"{count}.pt")
    for title, results in alone.items():
        exact = {"rtol": 0, "atol": 0} if title == "features" else {"rtol": 1e-9, "atol": 1e-11}
        assert many[title].keys() == results.keys()
        for name, value in results.items():
            assert value.isfinite().all()
            message = f"{title}: {name}: {{}}".format
            torch.testing.assert_close(many[title][name], value, **exact, msg=message)


# ---------------------------------------------------------------- train.py and test.py


@pytest.fixture(scope="module")
def single(data, tmp_path_factory) -> Run:
    """Two epochs of four steps in one process."""
    return trained(data, tmp_path_factory.mktemp("single"), **SETTINGS)


@pytest.fixture(scope="module")
def double(data, tmp_path_factory, forks) -> Run:
    """The same in two."""
    folder = tmp_path_factory.mktemp("double")
    printed = forks.run(*options(data, folder, **SETTINGS), processes=2)
    assert (printed.code, printed.err) == (0, "")
    return Run(folder / "run", printed.out)


def assert_near(run: Run, other: Run) -> None:
    """Compare two runs but for float32 sums in another order."""
    assert [row.keys() for row in run.rows] == [row.keys() for row in other.rows]
    for row, expected in zip(run.rows, other.rows, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    weights = [done.saved["method"] for done in (run, other)]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)
    assert torch.equal(run.saved["rng"]["cpu"], other.saved["rng"]["cpu"])


def test_a_run_is_that_of_one_process(single, double):
    assert_near(double, single)
    places = {"checkpoint_dir": "", "data_dir": ""}
    assert double.saved["config"] | places == single.saved["config"] | places
    assert {path.name for path in double.run.iterdir()} == {p.name for p in single.run.iterdir()}
    assert [double.out.count(f"epoch   {epoch}  ") for epoch in (1, 2)] == [1, 1]
    assert double.out == (double.run / "run.log").read_text()


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_scores_are_those_of_one_process_bit_for_bit(data, tmp_path, double, forks, count):
    results = []
    for n_processes in (1, count):
        scores = tmp_path / "scores.json"
        embeddings = tmp_path / "embeddings.npy"
        files = [f"--json={scores}", f"--save_embeddings={embeddings}"]
        argv = ["--dataset=tiny", f"--data_dir={data}", f"--checkpoint_path={double.run}", *files]
        argv += ["--device=cpu", "--test_batch=7"]
        done = forks.run(*argv, script="test.py", processes=n_processes)
        assert (done.code, done.err) == (0, "")
        results.append((json.loads(scores.read_text()), embeddings.read_bytes(), done.out))
    assert results[0] == results[1]
    assert 0 < results[0][0]["recall@1"] < 1


def test_two_processes_choose_the_start_that_one_chooses(tmp_path, forks):
    write_dataset(tmp_path / "data", count=104)
    argv = {"recipe": "best", "low_dim": None, "test_batch": 7}
    starts = []
    for count in (1, 2):
        words = options(tmp_path / "data", tmp_path / str(count), **argv, n_epoch=0)
        assert forks.run(*words, processes=count).code == 0
        saved = Run(tmp_path / str(count) / "run").saved
        starts.append((saved["config"], saved["model"]))
    chosen = ("stripes", "head_init", "whiten_power", "low_dim")
    assert [starts[0][0][name] for name in chosen] == [starts[1][0][name] for name in chosen]
    torch.testing.assert_close(starts[0][1], starts[1][1], rtol=0, atol=0)


def on(rank: int, action: str, step: int = 0) -> str:
    """Return Python text that has a process do something at one of its steps, or at its start."""
    if step == 0:
        return f"import os, signal, sys\nif os.environ['RANK'] == '{rank}':\n    {action}"
    return f"""
import os, signal
from utils.runs import State
end_step = State.end_step
calls = []
def counted(*args):
    calls.append(1)
    if len(calls) == {step} and os.environ["RANK"] == "{rank}":
        {action}
    return end_step(*args)
State.end_step = counted
"""


def test_one_process_is_asked_to_stop_and_all_do(data, tmp_path, forks, single, double):
    stop = on(1, "os.kill(os.getpid(), signal.SIGTERM)", step=3)
    result = forks.run(*options(data, tmp_path, **SETTINGS), before=stop, processes=2)
    assert result.code == 143
    assert "stopped by SIGTERM; continue with" in result.out
    run = tmp_path / "run"
    assert Run(run).saved["state"]["step"] == 3
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    assert forks.run("--resume", run, processes=2).code == 0
    assert same_weights(Run(run), double)
    assert Run(run).rows == double.rows
    assert_near(resumed(copy), single)  # in one process


@pytest.mark.slow
def test_a_stop_while_the_first_process_scores(data, tmp_path, forks, double):
    interrupted = "lambda *a, **k: (os.kill(os.getpid(), signal.SIGINT), score(*a, **k))[1]"
    stop = on(0, f"score = train.score; train.score = {interrupted}")
    result = forks.run(*options(data, tmp_path, **SETTINGS), before=stop, processes=2)
    assert result.code == 130
    assert Run(tmp_path / "run").saved["state"]["step"] == 4
    assert forks.run("--resume", tmp_path / "run", processes=2).code == 0
    assert same_weights(Run(tmp_path / "run"), double)


# ---------------------------------------------------------------- faults

FAULTS = {
    "no data": ({"dataset": "none"}, "", 2, "training_none_256resized_img.npy: no such file"),
    "no number": ({"batch_size": "x"}, "", 2, "argument --batch_size: expected a whole number"),
    "another option": ({}, on(1, "sys.argv.append('--mu=0.7')"), 2, "mu is 0.7 in process 1"),
    "first alone": ({"log_dir": "/dev/null"}, "", 2, "/dev/null"),
    "diverged": ({"lr": 1e30}, "", 3, "loss is not finite"),
    "no memory": ({}, on(1, "raise MemoryError", step=2), 2, "out of memory on the host"),
    "killed": (
        {},
        on(1, "os.kill(os.getpid(), signal.SIGKILL)", step=2),
        137,
        "one of the 2 processes ended without a message",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line(data, tmp_path, forks, name):
    changed, before, code, words = FAULTS[name]
    argv = options(data, tmp_path, **(SETTINGS | changed))
    failed(forks.run(*argv, before=before, processes=2), words, code=code)


@pytest.mark.slow
def test_a_process_killed_under_torchrun_ends_the_job(data, tmp_path, single):
    argv = options(data, tmp_path, **(SETTINGS | {"n_epoch": 10**6}))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=3", "train.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    metrics = tmp_path / "run" / "metrics.jsonl"
    with open(tmp_path / "printed", "w+") as printed:
        streams = {"stdout": printed, "stderr": subprocess.STDOUT}
        torchrun = subprocess.Popen([*command, *argv], cwd=ROOT, env=environment, **streams)
        try:
            while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
                assert torchrun.poll() is None
                time.sleep(0.1)
            children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text()
            os.kill(int(children.split()[1]), signal.SIGKILL)
            assert torchrun.wait(timeout=60) != 0
        finally:
            torchrun.kill()
    text = (tmp_path / "printed").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("train.py: error: "))
    assert "one of the 3 processes ended without a message" in line
    rows = Run(tmp_path / "run").rows
    assert rows[0]["loss"] == pytest.approx(single.rows[0]["loss"], rel=1e-3)
    resumed(tmp_path / "run", f"--n_epoch={len(rows) + 1}")
