"""Requests to stop: noted, met where the work is whole, or at once."""

from __future__ import annotations

import contextlib
import errno
import signal
from collections.abc import Iterator

import pytest

from utils.signals import SIGNALS, Stopped, StopRequest


@pytest.fixture(autouse=True)
def handlers() -> Iterator[dict]:
    """The handlers of before, which stand again afterwards."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield before
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_met_at_the_next_check(number, capfd):
    with StopRequest() as stop:
        stop.check()
        signal.raise_signal(number)
        with pytest.raises(Stopped, match=number.name) as caught:
            stop.check()
        assert caught.value.status == 128 + number
    err = capfd.readouterr().err
    assert "stopping as soon as the state is whole; a second signal stops at once" in err


def test_a_terminal_that_is_gone_is_no_error(monkeypatch):
    def write(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.write", write)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGHUP)
        with pytest.raises(Stopped, match="SIGHUP"):
            stop.check()


@pytest.mark.parametrize("is_early", [False, True])
def test_a_signal_ends_work_whose_parts_nobody_needs(is_early):
    reached = []
    with StopRequest() as stop:
        if is_early:
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped), stop.at_once():
            signal.raise_signal(signal.SIGTERM)
            reached.append("after")
    assert not reached


def test_an_exception_that_a_library_swallows_is_raised_again():
    reached = []
    with StopRequest() as stop, pytest.raises(Stopped), stop.at_once():
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        reached.append("after")
    assert reached


def test_several_processes_stop_together():
    with StopRequest() as stop:
        stop.agree = lambda number: max(number, signal.SIGINT)  # of another process
        with pytest.raises(Stopped, match="SIGINT"):
            stop.check()


def test_a_signal_that_the_process_ignores_stays_ignored(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            stop.check()
    finally:
        signal.signal(signal.SIGHUP, handlers[signal.SIGHUP])
