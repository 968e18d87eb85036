"""Whole processes of a script that start in milliseconds: forks of one that has imported everything.

Each is a process of its own for whatever is sent to it; torch alone would take seconds to import every time.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from scripts import ROOT, Outcome

LONGEST = 300  # seconds: a process that waits for ever fails its test


class Forks:
    """The process that forks; `start` and `finish` one run at a time."""

    def __init__(self, folder: Path) -> None:
        """folder: where the output of the runs goes."""
        self.folder = folder
        self.server = subprocess.Popen(
            [sys.executable, __file__], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        )  # fmt: skip

    def close(self) -> None:
        self.server.stdin.close()
        self.server.stdout.close()
        self.server.wait()

    def start(self, *argv: object, before: str = "", script: str = "train.py", processes: int = 1) -> int:
        """Start a script with these arguments, after the Python text `before`; the process id.

        processes: of a job, started as torchrun does, but none is ended because another one was; the process id is
        of the one that waits for them.
        """
        order = {"argv": [str(word) for word in argv], "before": before, "folder": str(self.folder), "script": script,
                 "processes": processes}  # fmt: skip
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def finish(self) -> Outcome:
        """Wait for the run; `code` as of subprocess (minus the signal for a killed one), `out`, `err`."""
        self.server.stdin.write("\n")
        self.server.stdin.flush()
        code = os.waitstatus_to_exitcode(int(self.server.stdout.readline()))
        return Outcome(code, (self.folder / "out").read_text(), (self.folder / "err").read_text())

    def run(self, *argv: object, kill_after: float | None = None, **how: object) -> Outcome:
        """Start and finish; with `kill_after`, SIGKILL after so many seconds."""
        pid = self.start(*argv, **how)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)  # perhaps too late: the id stays its own until `finish`
        return self.finish()


def _child(order: dict) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(order["folder"]) / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_APPEND), number)
    if order["processes"] > 1:
        _fork_processes(order["processes"])
    signal.alarm(LONGEST)
    sys.argv = [order["script"], *order["argv"]]
    if order["script"] != "train.py":
        runpy.run_path(str(ROOT / order["script"]), run_name="__main__")
        raise SystemExit(0)
    import train
    from utils.errors import run_script

    exec(order["before"], {"train": train})
    run_script(train.main)


def _fork_processes(count: int) -> None:
    """Return in the processes of a job, each with its place; the process that forked them holds the store of the job,
    as torchrun does, waits for them and exits.

    The exit status is the largest of theirs, 128 + the signal's number for one that was killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
              "TORCHELASTIC_USE_AGENT_STORE": True}  # fmt: skip
    ids = []
    for rank in range(count):
        ids.append(os.fork())
        if ids[-1] == 0:
            place = shared | {"RANK": rank, "LOCAL_RANK": rank}
            os.environ.update({name: str(value) for name, value in place.items()})
            return
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ids]
    del store
    raise SystemExit(max(128 - code if code < 0 else code for code in codes))


def _serve() -> None:
    import torch
    import torchvision  # noqa: F401

    import datasets  # noqa: F401
    import models  # noqa: F401
    import utils.evaluation
    import utils.features
    import utils.finite  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                _child(json.loads(line))
            except SystemExit as end:
                status = end.code or 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        print(pid, flush=True)
        sys.stdin.readline()  # until `finish`, so that the id of a process that has ended is given to no other
        print(os.waitpid(pid, 0)[1], flush=True)


if __name__ == "__main__":
    _serve()
