"""Requests to stop: noted, met where the work is whole, or at once."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import pytest

from utils.stopping import SIGNALS, Stopped, StopRequest


@pytest.fixture(autouse=True)
def handlers() -> Iterator[dict]:
    """The handlers of before, which stand again after."""
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
    assert capfd.readouterr().err.endswith(
        "stopping as soon as what is under way is whole; a second signal stops at once\n"
    )


def test_a_signal_ends_an_interruptible_block_in_its_middle():
    reached = []
    with StopRequest() as stop, pytest.raises(Stopped), stop.at_once():
        signal.raise_signal(signal.SIGTERM)
        reached.append("after")
    assert not reached


def test_a_signal_from_before_an_interruptible_block_ends_it_at_its_start():
    reached = []
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped), stop.at_once():
            reached.append("inside")
    assert not reached


def test_an_exception_that_a_library_swallows_is_raised_again():
    reached = []
    with StopRequest() as stop, pytest.raises(Stopped), stop.at_once():
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        reached.append("after")
    assert reached


def test_a_signal_that_the_process_ignores_stays_ignored(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            stop.check()
    finally:
        signal.signal(signal.SIGHUP, handlers[signal.SIGHUP])
