"""Bars on a terminal have a rate and the time left; in a log there is nothing of them."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import time
from utils.progress import progress
for _ in progress(range(12), 12, "epoch 1: train"):
    time.sleep(0.05)
"""


def run(stderr: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", PROGRAM], stderr=stderr, env=environment, cwd=ROOT, check=True, timeout=60)


def test_rate_and_time_left_on_a_terminal():
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))  # rows and columns
    run(theirs)
    assert select.select([ours], [], [], 1)[0], "nothing was shown"
    shown = os.read(ours, 65536).decode()
    os.close(theirs)
    os.close(ours)
    assert re.search(r"epoch 1: train: +\d+%.*\d+/12 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+it/s\]", shown), shown
    assert not shown.rpartition("\r")[2].strip()  # gone when done


def test_nothing_in_a_log(tmp_path):
    with open(tmp_path / "log", "wb") as log:
        run(log.fileno())
    assert (tmp_path / "log").read_bytes() == b""
