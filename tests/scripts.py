"""The project's scripts, run in this process as their command lines would run them, and what they said."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from utils.errors import run_script

ROOT = Path(__file__).resolve().parents[1]


class Outcome(NamedTuple):
    """How a script ended: exit status, standard output, standard error."""

    code: int
    out: str
    err: str


class TooSlow(BaseException):
    """A script went past its time; no `except Exception` on the way can hold it."""


def path_of(script: str) -> Path:
    """The file of a script, from its plain name: `train.py`, `pre_process_cub200.py`."""
    return ROOT / "pre_process" / script if is_pre_processing(script) else ROOT / script


def is_pre_processing(script: str) -> bool:
    """Whether a script is one of the folder pre_process/."""
    return script.startswith("pre_process") or script == "download.py"


@cache
def module_of(script: str) -> ModuleType:
    """A script as a module; `test` is the name of a package of Python's own, so it gets another."""
    if script != "test.py":
        return importlib.import_module(".".join(path_of(script).relative_to(ROOT).with_suffix("").parts))
    spec = importlib.util.spec_from_file_location("test_script", path_of(script))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_in_process(script: str, *argv: object, seconds: float = 60) -> Outcome:
    """Run a script's last line with these arguments: what it prints, warnings included, and how it ends.

    Anything but an exit, a traceback on a command line, comes out as it is; `TooSlow` after so many seconds.
    """
    out, err = io.StringIO(), io.StringIO()
    main = module_of(script).main
    with process_as_before(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), within(seconds):
        sys.argv = [str(path_of(script)), *map(str, argv)]
        show_warnings_as_python_does()
        warnings.showwarning = lambda *what, **_: print(*what, file=err)  # pytest would keep them to itself
        try:
            run_script(main)
        except SystemExit as ended:
            return Outcome(ended.code or 0, out.getvalue(), err.getvalue())
    raise AssertionError("run_script returned")


def show_warnings_as_python_does() -> None:
    """The filters of a plain start of Python: pytest lets every kind through."""
    warnings.simplefilter("default")
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)


@contextlib.contextmanager
def process_as_before() -> Iterator[None]:
    """Put back what a script sets in its process: its arguments, its handlers of signals, of warnings."""
    argv = sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with warnings.catch_warnings():
            yield
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise `TooSlow` in the main thread when the block takes longer, but for times when it is stopped."""
    left = seconds

    def tick(*_: object) -> None:  # ticks of a stopped process come as one
        nonlocal left
        left -= 1
        if left <= 0:
            raise TooSlow(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, tick)
    signal.setitimer(signal.ITIMER_REAL, 1, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def failed(outcome: Outcome, *words: object, script: str = r"\w+\.py", code: int = 2) -> None:
    """Assert that a script ended with one line, `SCRIPT.py: error: ...`, with these words in it, and this status."""
    assert outcome.code == code, outcome
    assert re.fullmatch(rf"{script}: error: [^\n]+\n", outcome.err), outcome.err
    for word in words:
        assert str(word) in outcome.err, (word, outcome.err)
