"""Whole processes of a script that start in milliseconds: forks of one that imported torch."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from scripts import ROOT, Outcome
from torch.distributed import TCPStore

import train
from utils.errors import run_script

LONGEST = 300  # seconds, of a process


class Forks:
    """Processes of a script, and of one job at a time."""

    def __init__(self, folder: Path) -> None:
        """folder: where the output of the scripts goes."""
        self.folder = folder
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["forks"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
            forkserver.ensure_running()

    def start(
        self, *argv: object, before: str = "", script: str = "train.py", processes: int = 1
    ) -> int:
        """Start a script and return the id of its first process.

        Args:
            before: Python text that is run first; `train` is the module.
            processes: of a job, as torchrun starts it, but that none is ended when another one is.
        """
        for name in ("out", "err"):
            (self.folder / name).write_text("")
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        job = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.store.port}
        self.jobs = []
        for rank in range(processes):
            place = job | {"RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_USE_AGENT_STORE": True}
            order = (script, [str(word) for word in argv], before, place, self.folder)
            self.jobs.append(self.context.Process(target=carry_out, args=order))
            self.jobs[-1].start()
        return self.jobs[0].pid

    def finish(self) -> Outcome:
        """Wait for the script.

        Its code is minus the number of the signal that ended it, of a job the largest status, 128 +
        number for a signal.
        """
        for job in self.jobs:
            job.join()
        codes = [job.exitcode for job in self.jobs]
        if len(codes) > 1:
            codes = [128 - code if code < 0 else code for code in codes]
        texts = [(self.folder / name).read_text() for name in ("out", "err")]
        return Outcome(max(codes), *texts)

    def run(self, *argv: object, kill_after: float | None = None, **how: object) -> Outcome:
        """Start and finish a script; with `kill_after`, SIGKILL after so many seconds."""
        self.start(*argv, **how)
        if kill_after is not None:
            time.sleep(kill_after)
            self.jobs[0].kill()
        return self.finish()


def carry_out(script: str, argv: list[str], before: str, place: dict, folder: Path) -> None:
    """Run a script in a process of its own, as its command line would run it."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_APPEND), number)
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    signal.alarm(LONGEST)
    sys.argv = [script, *argv]
    if before:
        exec(before, {"train": train})
    if script == "train.py":
        run_script(train.main)
    runpy.run_path(str(ROOT / script), run_name="__main__")
