"""Many processes: their numbers are those of one, one of them speaks, and none waits for the dead."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import processes as job
import pytest
import torch
from scripts import failed
from synthetic import write_dataset_by_chance
from training import options, outcome, same_weights, trained

import train as script
from utils.distributed import ALONE

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {"n_epoch": 2, "batch_size": 6, "positives": "nn", "pseudo_labels": "kmeans", "kmeans_engine": "torch",
            "test_batch": 5, "lr": 1e-4}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The test half has labels by chance: scores in the middle, where a fault would show."""
    return write_dataset_by_chance(tmp_path_factory.mktemp("data"))


# ---------------------------------------------------------------- losses, gradients, weights, features


@pytest.fixture(scope="module")
def found(tmp_path_factory, forks) -> dict[int, dict[str, dict[str, torch.Tensor]]]:
    """Number of processes -> what they found (every process the very same)."""
    folder = tmp_path_factory.mktemp("jobs")
    for count in (2, 3):
        done = forks.run(folder, script="tests/processes.py", processes=count)
        assert done.code == 0, done.err
    return {1: job.everything(ALONE), 2: torch.load(folder / "2.pt"), 3: torch.load(folder / "3.pt")}


@pytest.mark.parametrize("count, what", [
    (count, what) for count in (2, 3) for what in [*job.CASES, "batch norm"] if (count, what) != (3, "googlenet")
])  # fmt: skip
def test_many_processes_compute_what_one_does(found, count, what):
    one, many = found[1][what], found[count][what]
    assert many.keys() == one.keys() and all(value.isfinite().all() for value in one.values())
    for name, value in one.items():
        torch.testing.assert_close(many[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("count", [2, 3])
def test_features_are_those_of_one_process_bit_for_bit(found, count):
    one, many = found[1]["features"], found[count]["features"]
    assert many.keys() == one.keys()
    assert all(torch.equal(many[name], value) for name, value in one.items())


# ---------------------------------------------------------------- train.py and test.py


@pytest.fixture(scope="module")
def one(data, tmp_path_factory) -> SimpleNamespace:
    """Two epochs of four steps in one process."""
    return trained(data, tmp_path_factory.mktemp("one"), **SETTINGS)


@pytest.fixture(scope="module")
def two(data, tmp_path_factory, forks) -> SimpleNamespace:
    """The same in two, with what they printed."""
    folder = tmp_path_factory.mktemp("two")
    printed = forks.run(*options(data, folder, **SETTINGS), processes=2)
    assert printed.code == 0, printed.err
    return SimpleNamespace(**vars(outcome(folder / "run")), printed=printed)


def assert_near(many: SimpleNamespace, one: SimpleNamespace) -> None:
    """The same but for float32 sums in another order."""
    assert [row.keys() for row in many.rows] == [row.keys() for row in one.rows]
    for a, b in zip(many.rows, one.rows, strict=True):
        assert {name: a[name] for name in a if "loss" in name} == pytest.approx(
            {name: b[name] for name in b if "loss" in name}, rel=1e-3
        )
    for name, value in one.saved["model"].items():
        torch.testing.assert_close(many.saved["model"][name], value, rtol=1e-3, atol=1e-4)
    assert torch.equal(many.saved["rng"]["cpu"], one.saved["rng"]["cpu"])


def test_a_run_is_that_of_one_process(one, two):
    assert_near(two, one)
    assert two.saved["config"] | {"checkpoint_dir": ""} == one.saved["config"] | {"checkpoint_dir": ""}
    assert {path.name for path in two.run.iterdir()} == {path.name for path in one.run.iterdir()}
    assert two.printed.err == ""
    assert "2 processes" in two.printed.out and [two.printed.out.count(f"epoch   {e}  ") for e in (1, 2)] == [1, 1]
    assert two.printed.out == (two.run / "run.log").read_text()


def test_scores_and_embeddings_are_those_of_one_process_bit_for_bit(data, tmp_path, two, forks):
    scores, embeddings = tmp_path / "scores.json", tmp_path / "embeddings.npy"
    argv = ["--dataset=tiny", f"--data_dir={data}", f"--checkpoint_path={two.run}", "--device=cpu", "--test_batch=7",
            f"--json={scores}", f"--save_embeddings={embeddings}"]  # fmt: skip
    results = []
    for count in (1, 2, 3):
        done = forks.run(*argv, script="test.py", processes=count)
        assert (done.code, done.err) == (0, "")
        results.append((json.loads(scores.read_text()), embeddings.read_bytes(), done.out))
        scores.unlink()
        embeddings.unlink()
    assert results[0] == results[1] == results[2]
    assert 0 < results[0][0]["recall@1"] < 1


def on(rank: int, what: str, call: int = 0) -> str:
    """Python text that has process `rank` do `what` at its `call`-th step (0: at its start)."""
    if call == 0:
        return f"import os, signal, sys\nif os.environ['RANK'] == '{rank}':\n    {what}"
    return on(rank, f"""step, calls = train.train_step, []
    def counted(*args):
        calls.append(0)
        if len(calls) == {call}:
            {what}
        return step(*args)
    train.train_step = counted""")  # fmt: skip


def test_one_process_is_asked_to_stop_and_all_do(data, tmp_path, forks, one, two):
    stop = on(1, "os.kill(os.getpid(), signal.SIGTERM)", call=3)
    result = forks.run(*options(data, tmp_path, **SETTINGS), before=stop, processes=2)
    assert result.code == 143
    assert "stopped by SIGTERM after epoch 0, step 3 of epoch 1; all is saved" in result.out
    copies = [tmp_path / "three", tmp_path / "alone"]
    for copy in copies:
        subprocess.run(["cp", "-r", tmp_path / "run", copy], check=True)
    assert forks.run("--resume", tmp_path / "run", processes=2).code == 0
    resumed = outcome(tmp_path / "run")
    assert same_weights(resumed, two) and resumed.rows == two.rows
    assert forks.run("--resume", copies[0], processes=3).code == 0
    assert_near(outcome(copies[0]), one)
    assert script.main(["--resume", str(copies[1])]) == 0
    assert_near(outcome(copies[1]), one)


def test_a_stop_while_the_first_process_scores(data, tmp_path, forks, two):
    scoring = "import utils.evaluation as e; e.score = lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)"
    result = forks.run(*options(data, tmp_path, **SETTINGS), before=on(0, scoring), processes=2)
    assert result.code == 130
    assert "stopped by SIGINT after epoch 0, step 4 of epoch 1; all is saved" in result.out
    assert forks.run("--resume", tmp_path / "run", processes=2).code == 0
    assert same_weights(outcome(tmp_path / "run"), two)


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("changed, before, code, words", [
    ({"dataset": "none"}, "", 2, "training_none_256resized_img.npy: no such file"),
    ({"batch_size": 7}, "", 2, "--batch_size 7: 2 processes cannot share a batch evenly; give a multiple of 2"),
    ({"batch_size": "x"}, "", 2, "argument --batch_size: expected a whole number"),
    ({}, on(1, "sys.argv.append('--mu=0.7')"), 2, "--mu is 0.7 in process 1 and 1.0 in process 0"),
    ({}, on(1, "sys.argv.append('--weights=no.pth')"), 2, "--weights is no.pth in process 1"),
    ({"log_dir": "/dev/null"}, "", 2, "/dev/null"),  # a mistake that the first process alone can notice
    ({"lr": 1e30}, "", 3, "the last good state stays in"),
    ({}, on(1, "raise MemoryError", call=2), 2, "out of memory on the host; lower --batch_size"),
    ({}, on(1, "os.kill(os.getpid(), signal.SIGKILL)", call=2), 137, "one of the 2 processes ended without a message"),
], ids=["no data", "batch not shared", "wrong value", "another option", "another file", "first alone", "diverged",
        "no memory", "killed"])  # fmt: skip
def test_a_fault_is_one_line(data, tmp_path, forks, changed, before, code, words):
    started = time.monotonic()
    result = forks.run(*options(data, tmp_path, **(SETTINGS | changed)), before=before, processes=2)
    assert time.monotonic() - started < 60
    failed(result, words, code=code)


@pytest.mark.parametrize("argv, words", [
    (["--json={run}"], "/run: is a folder; give the name of a file"),
    (["--dataset=none"], "validation_none_256resized_img.npy: no such file"),
])  # fmt: skip
def test_a_fault_of_scoring_is_one_line(data, two, forks, argv, words):
    argv = ["--dataset=tiny", f"--data_dir={data}", f"--checkpoint_path={two.run}", "--device=cpu", *argv]
    result = forks.run(*(word.replace("{run}", str(two.run)) for word in argv), script="test.py", processes=2)
    failed(result, words, script="test.py")


def test_a_process_killed_under_torchrun_ends_the_job(data, tmp_path, one):
    """The real thing, in an epoch too long to wait for."""
    argv = options(data, tmp_path, **(SETTINGS | {"n_epoch": 10**6}))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(ROOT / "train.py"), *argv]
    with open(tmp_path / "printed", "w+") as printed:
        torchrun = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT,
                                    env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
        metrics = tmp_path / "run" / "metrics.jsonl"
        try:
            while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
                assert torchrun.poll() is None
                time.sleep(0.1)
            workers = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
            os.kill(int(workers[1]), signal.SIGKILL)
            assert torchrun.wait(timeout=60) != 0
        finally:
            torchrun.kill()
        text = (tmp_path / "printed").read_text()
    lines = [line for line in text.splitlines() if line.startswith("train.py: error: ")]
    assert len(lines) == 1 and "one of the 2 processes ended without a message" in lines[0]
    rows = outcome(tmp_path / "run").rows
    assert [row["loss"] for row in rows[:2]] == pytest.approx([row["loss"] for row in one.rows], rel=1e-3)
    assert script.main(["--resume", str(tmp_path / "run"), f"--n_epoch={len(rows) + 1}"]) == 0


@pytest.mark.parametrize("method", [
    {"recipe": "best", "metric_loss": "contextual", "group": 4, "teacher_momentum": 0.9},
    {"baseline": "stml", "group": 2, "distill_dim": 48},
    {"recipe": "best", "kmeans_engine": "torch"}, {"baseline": "deepcluster", "kmeans_engine": "torch"},
    {"metric_loss": "multi_similarity", "ml": 1, "rim": 0, "recon": 0, "group": 4, "train_stages": 1},
])  # fmt: skip
def test_the_other_losses_train_in_two_processes_as_in_one(data, tmp_path, forks, method):
    settings = method | {"n_epoch": 2, "batch_size": 8, "test_batch": 5, "lr": 1e-4, "positives": "self"}
    one = trained(data, tmp_path / "one", **settings)
    printed = forks.run(*options(data, tmp_path / "two", **settings), processes=2)
    assert printed.code == 0, printed.err
    two = outcome(tmp_path / "two" / "run")
    for a, b in zip(one.rows, two.rows, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3) and a["recall@1"] == pytest.approx(b["recall@1"])
    for part in ("model", "step"):
        for name, value in one.saved[part].items():
            torch.testing.assert_close(two.saved[part][name], value, rtol=1e-2, atol=1e-3, msg=lambda m, n=name: n + m)
