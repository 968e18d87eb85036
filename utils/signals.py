"""Requests to stop: Ctrl-C, and the signals by which a system asks a process to end."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))


class Stopped(KeyboardInterrupt):
    """A request to stop, raised where the state is whole. `status` is the exit status, 128 +
    signal number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number


class StopRequest:
    """Context in which the first signal is only noted, and the second one ends the process at once.

    Work calls `check()` where its state is whole. Inside `at_once()` a signal raises `Stopped`
    wherever it arrives: for work whose partial result nobody needs. Signals that were ignored
    before (nohup) stay ignored.
    """

    def __init__(self) -> None:
        self.agree: Callable[[int], int] | None = None
        """Of several processes: the largest of their numbers. All of them then stop at the same
        `check()`.
        """
        self._number = 0
        self._raises = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise `Stopped` if a signal has arrived (in any process, see `agree`)."""
        number = self.agree(self._number) if self.agree else self._number
        if number:
            raise Stopped(number)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal raise `Stopped` anywhere in the block; with several processes only at its
        two ends.
        """
        self.check()
        previous, self._raises = self._raises, self.agree is None
        try:
            yield
        finally:
            self._raises = previous
        self.check()

    def _note(self, number: int, _frame: object) -> None:
        if self._number:
            _tell("stopped at once by a second signal")
            os._exit(128 + number)
        self._number = number
        if self._raises:
            raise Stopped(number)
        _tell("stopping as soon as the state is whole; a second signal stops at once")


def _tell(text: str) -> None:
    """Write a line to stderr from a signal handler, which may have interrupted a print."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):  # the terminal may be gone, which is often why to stop
            os.write(2, f"{os.path.basename(sys.argv[0])}: {text}\n".encode())
