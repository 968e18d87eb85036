"""Progress bars: with a rate and the time left on a terminal, and nothing in a log."""

from __future__ import annotations

import os
import re
import struct
import sys
import time
from contextlib import suppress

import pytest

from utils.progress import progress

fcntl = pytest.importorskip("fcntl", reason="needs a Unix terminal")
pty = pytest.importorskip("pty")
termios = pytest.importorskip("termios")
SIZE = struct.pack("HHHH", 30, 100, 0, 0)  # rows and columns


def iterate() -> None:
    numbers = []
    for number in progress(range(12), "epoch 1"):
        numbers.append(number)
        time.sleep(0.02)
    assert numbers == list(range(12))


def test_rate_and_time_left_on_a_terminal(monkeypatch):
    terminal, stderr = pty.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, SIZE)
    with open(stderr, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        iterate()
    content = b""
    with suppress(OSError):  # where the content of a closed terminal ends
        while chunk := os.read(terminal, 4096):
            content += chunk
    os.close(terminal)
    text = content.decode()
    assert re.search(r"epoch 1: +\d+%.*\d+/12 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+it/s\]", text), text
    assert not text.rpartition("\r")[2].strip()  # gone when done


@pytest.mark.parametrize("rank", ["0", "1"])
def test_nothing_in_a_log(capsys, monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    iterate()
    assert capsys.readouterr().err == ""
