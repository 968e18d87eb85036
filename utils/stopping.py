"""Requests to stop: Ctrl-C, and the signals by which a system asks a process to end."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(KeyboardInterrupt):
    """A request to stop, met where the work is whole. `status`: the exit status, 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number


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
    """

    def __init__(self) -> None:
        self._number: int | None = None
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
        if self._number is not None:
            raise Stopped(self._number)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal raise `Stopped` anywhere in the block."""
        self._raises = True
        try:
            self.check()  # one that came before the block
            yield
            self.check()  # one whose exception a library has swallowed
        finally:
            self._raises = False

    def _note(self, number: int, _frame: object) -> None:
        if self._number is not None:
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
    """A line on stderr, from a signal handler: print may be in the middle of a line."""
    with suppress(OSError):
        os.write(2, f"{os.path.basename(sys.argv[0])}: {what}\n".encode())
