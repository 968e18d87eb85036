"""Many processes: the numbers are those of one, nobody speaks twice, nobody waits for the dead."""

from __future__ import annotations

import subprocess
import sys

import processes as job
import pytest
import torch

from utils.distributed import ALONE

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[int, dict[str, dict[str, torch.Tensor]]]:
    """Number of processes -> what they found (every process the very same)."""
    folder = tmp_path_factory.mktemp("jobs")
    jobs = subprocess.Popen([sys.executable, job.__file__, str(folder), "2", "3"])
    alone = job.everything(ALONE)
    assert jobs.wait(timeout=300) == 0
    return {1: alone, 2: torch.load(folder / "2.pt"), 3: torch.load(folder / "3.pt")}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("what", [*job.CASES, "batch norm"])
def test_many_processes_compute_what_one_does(found, count, what):
    if what not in found[count]:
        pytest.skip("large: with two processes only")
    one, many = found[1][what], found[count][what]
    assert many.keys() == one.keys() and all(value.isfinite().all() for value in one.values())
    for name, value in one.items():
        torch.testing.assert_close(many[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("count", [2, 3])
def test_features_are_those_of_one_process_bit_for_bit(found, count):
    one, many = found[1]["features"], found[count]["features"]
    assert many.keys() == one.keys()
    assert all(torch.equal(many[name], value) for name, value in one.items())
