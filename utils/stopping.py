"""Requests to stop: Ctrl-C, and the signals by which a system asks a process to end."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from utils.process import is_first

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(KeyboardInterrupt):
    """A request to stop, met where the work is whole. `status`: the exit status, 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number, self.status = number, 128 + number


def interrupt_in_one_line() -> None:
    """From now on a signal ends the process with one line; for a script's imports, before a `StopRequest` takes over.

    An exception would end as a traceback there, or be swallowed by a library that imports another at will.
    """

    def end(number: int, _frame: object) -> None:
        _end_at_once(number, "interrupted before it began")

    _handle(end)


class StopRequest:
    """Inside `with`, the first signal is noted and met at the next `check`; the second ends the process at once.

    Work whose partial result nobody needs goes under `at_once`, where the first signal is met wherever it comes.
    Signals that the process was started to ignore (a shell's background job, nohup) stay ignored.

    agree: of many processes, the largest of all their numbers. Each of them then meets a request at the same `check`,
    also those that it did not reach: one that left by itself would leave the others waiting for it.
    """

    def __init__(self) -> None:
        self.agree: Callable[[int], int] | None = None
        self._number = 0  # of the signal that has come
        self._raises = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        self._before = _handle(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise `Stopped` if a signal has come."""
        number = self.agree(self._number) if self.agree else self._number
        if number:
            raise Stopped(number)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal raise `Stopped` anywhere in the block; of many processes at its ends alone."""
        before, self._raises = self._raises, self.agree is None
        try:
            self.check()  # one that came before the block
            yield
            self.check()  # one whose exception a library has swallowed
        finally:
            self._raises = before

    def caught(self, work: Callable[[], Any]) -> tuple[Any, int]:
        """What `work`, which no other process has a part in, gives, and 0; or None and the signal that has ended it."""
        before, self._raises = self._raises, True
        try:
            if self._number:
                return None, self._number
            return work(), self._number
        except Stopped as stopped:
            return None, stopped.number
        finally:
            self._raises = before

    def _note(self, number: int, _frame: object) -> None:
        if self._number:
            _end_at_once(number, "stopped at once by a second signal; the last checkpoint is whole")
        self._number = number
        if self._raises:
            raise Stopped(number)
        _tell("stopping as soon as what is under way is whole; a second signal stops at once")


def _handle(handler) -> dict[int, object]:
    """Set the handler of every signal that is not ignored; the handlers before. Other threads cannot set any."""
    before = {}
    for number in SIGNALS:
        found = signal.getsignal(number)
        if found not in (signal.SIG_IGN, None):
            try:
                signal.signal(number, handler)
            except ValueError:  # not in the main thread
                return before
            before[number] = found
    return before


def _end_at_once(number: int, what: str) -> None:
    _tell(what)
    os._exit(128 + number)


def _tell(what: str) -> None:
    """A line on stderr, from a signal handler: print may be in the middle of a line. The first of many speaks."""
    if not is_first():
        return
    with suppress(OSError):
        os.write(2, f"{os.path.basename(sys.argv[0])}: {what}\n".encode())
