"""The project's scripts, run in this process as their command lines would run them."""

from __future__ import annotations

import contextlib
import importlib
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
# what Python itself does not show
HIDDEN = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)


class Outcome(NamedTuple):
    """How a script ended: exit status, standard output, standard error."""

    code: int
    out: str
    err: str


class TooSlow(BaseException):
    """A script went past its time; no `except Exception` on the way can hold it."""


def path_of(script: str) -> Path:
    """Return the file of a script by its plain name: `train.py`, `pre_process_cub200.py`."""
    is_pre_processing = script.startswith("pre_process") or script == "download.py"
    return ROOT / "pre_process" / script if is_pre_processing else ROOT / script


@cache
def module_of(script: str) -> ModuleType:
    """Import a script; `test` is a package of Python's own, so test.py gets another name."""
    if script != "test.py":
        parts = path_of(script).relative_to(ROOT).with_suffix("").parts
        return importlib.import_module(".".join(parts))
    spec = importlib.util.spec_from_file_location("test_script", path_of(script))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_in_process(script: str, *argv: object, seconds: int = 60) -> Outcome:
    """Run a script and return what it prints, warnings included, and how it ends.

    Raises what would end in a traceback, and `TooSlow` after so many seconds.
    """
    out = io.StringIO()
    err = io.StringIO()
    main = module_of(script).main
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with process_as_before(), streams[0], streams[1], within(seconds):
        sys.argv = [str(path_of(script)), *map(str, argv)]
        warnings.simplefilter("default")
        for category in HIDDEN:
            warnings.simplefilter("ignore", category)
        warnings.showwarning = lambda *parts, **_: print(*parts, file=err)  # pytest would keep them
        try:
            run_script(main)
        except SystemExit as end:
            return Outcome(end.code or 0, out.getvalue(), err.getvalue())
    raise AssertionError("run_script returned")


@contextlib.contextmanager
def process_as_before() -> Iterator[None]:
    """Put back what a script sets in its process: arguments, handlers of signals and warnings."""
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
def within(seconds: int) -> Iterator[None]:
    """Raise `TooSlow` in the main thread when the block takes longer."""

    def stop(*_: object) -> None:
        raise TooSlow(f"still running after {seconds} s")

    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


def failed(outcome: Outcome, *words: object, script: str = r"\w+\.py", code: int = 2) -> None:
    """Assert that a script ended with this status and one line that holds these words."""
    assert outcome.code == code, outcome
    assert re.fullmatch(rf"{script}: error: [^\n]+\n", outcome.err), outcome.err
    for word in words:
        assert str(word) in outcome.err, (word, outcome.err)
