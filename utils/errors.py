"""Mistakes that the user can mend, and how a script reports them."""

from __future__ import annotations

import difflib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

LONGEST_MESSAGE = 1500  # characters
STREAMS = {1: "standard output", 2: "standard error"}


class UserError(ValueError):
    """A mistake in options or files: the message names what is wrong and says what to do next."""

    status = 2  # exit status of the script


class DivergedError(UserError):
    """The numbers of a training are no longer finite."""

    status = 3


def one_line(text: str) -> str:
    """Return the text on one line: unprintable characters escaped, a long text cut in its middle.

    File names and file contents that reach a message may come from strangers.
    """
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(text) <= LONGEST_MESSAGE:
        return text
    return f"{text[: LONGEST_MESSAGE // 2]} ... {text[-LONGEST_MESSAGE // 2 :]}"


class LastingFile(io.FileIO):
    """A standard stream: what a pipe or terminal no longer reads is dropped.

    Another error, such as of a full disk, is raised once.
    """

    has_failed = False

    def write(self, content: bytes) -> int:
        """Write bytes, and return how many."""
        try:
            return super().write(content)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO) and not self.has_failed:
                self.has_failed = True
                raise OSError(error.errno, error.strerror, STREAMS[self.name]) from None
            return len(content)


def lasting_stream(number: int) -> io.TextIOWrapper:
    """Open a standard stream by its number, 1 or 2, so that no work ends for want of a reader.

    A stream that was closed leads nowhere. Names outside of the terminal's encoding are escaped.
    """
    try:
        os.fstat(number)
    except OSError:  # or else a file would get its number, and what is printed with it
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    file = io.BufferedWriter(LastingFile(number, "w", closefd=False))
    encoding = getattr(sys.__stdout__, "encoding", "utf-8")
    return io.TextIOWrapper(file, encoding, "backslashreplace", line_buffering=True)


def run_script(main: Callable[[], int | None]) -> None:
    """Run the `main` of a script and exit; a user's mistake or a file error becomes one line.

    Exit status: 2 for a `UserError` or an OSError, 3 for a `DivergedError`, 130 for Ctrl-C, 128 +
    number for another signal (see `utils.signals`). Everything else is a bug and ends in its
    traceback.
    """
    if sys.stdout is sys.__stdout__:  # not in a test that reads what is printed
        sys.stdout, sys.stderr = lasting_stream(1), lasting_stream(2)
    script = Path(sys.argv[0]).name
    try:
        sys.exit(main())
    except UserError as error:
        message, status = str(error), error.status
    except OSError as error:
        if error.errno is None:
            raise
        message, status = f"{error.filename}: {error.strerror}", 2
        if error.filename is None:
            message = str(error)
    except KeyboardInterrupt as stop:
        message, status = "interrupted", getattr(stop, "status", 130)
    print(f"{script}: error: {one_line(message)}", file=sys.stderr)
    sys.exit(status)


def nearest_hint(name: str, names: Iterable[str]) -> str:
    """Return "; did you mean ...?" with the most similar of the names, or "" if none is similar."""
    close = difflib.get_close_matches(name, list(names), 1)
    return f"; did you mean {close[0]}?" if close else ""
