"""Standard streams that are closed, or whose reader goes away: the work is done all the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from photos import make_photos, save_network
from scripts import ROOT, run_in_process
from synthetic import write_dataset
from training import options

pytestmark = pytest.mark.slow


@pytest.fixture
def command(tmp_path) -> str:
    """A search that writes hits.json."""
    photos = make_photos(tmp_path / "photos")
    network = ("--checkpoint_path", save_network(tmp_path / "net.pth"))
    argv = ("--images", photos, *network, "--out", tmp_path / "e.npy")
    assert run_in_process("embed.py", *argv).code == 0
    files = f"--embeddings {tmp_path}/e.npy --query {photos} --json {tmp_path}/hits.json"
    return f"{sys.executable} {ROOT}/search.py {files}"


def run(line: str) -> tuple[int, str]:
    """Run a line of bash; returns its status and all that it says."""
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("end", ["| head -1", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_search(command, tmp_path, end):
    status, said = run(f"{command} {end}")
    assert status == 0 and len(said.splitlines()) == {"| head -1": 1, "2>&-": 133}.get(end, 0)
    assert len(json.loads((tmp_path / "hits.json").read_text())) == 12


def test_a_terminal_that_goes_away(command, tmp_path):
    ours, theirs = os.openpty()
    process = subprocess.Popen(command.split(), stdout=theirs, stderr=subprocess.DEVNULL)
    os.close(ours)
    os.close(theirs)
    assert process.wait() == 0
    assert len(json.loads((tmp_path / "hits.json").read_text())) == 12


def test_a_full_disk_below_stdout(command, tmp_path):
    status, said = run(f"{command} > /dev/full")
    assert status == 2 and said.splitlines() == [
        "search.py: error: standard output: No space left on device"
    ]


def test_mistakes_have_their_status_without_a_stream(command):
    assert run(f"{command} --k 0 2>&-") == (2, "")


def test_a_training(tmp_path):
    write_dataset(tmp_path / "data")
    argv = " ".join(map(str, options(tmp_path / "data", tmp_path / "runs", n_epoch=2)))
    status, said = run(f"{sys.executable} {ROOT}/train.py {argv} | head -1")
    assert status == 0 and len(said.splitlines()) == 1
    (log,) = Path(tmp_path / "runs").rglob("*.log")
    assert "epoch   2" in log.read_text()
