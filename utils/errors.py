"""Mistakes that the user can mend, and how a script reports them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

LONGEST_MESSAGE = 1500  # characters


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


def run_script(main: Callable[[], int | None]) -> None:
    """Run the `main` of a script and exit; a user's mistake or a file error becomes one line.

    Exit status: 2 for a `UserError` or an OSError, 3 for a `DivergedError`, 130 for Ctrl-C, 128 +
    number for another signal (see `utils.signals`). Everything else is a bug and ends in its
    traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(
            stream, "reconfigure"
        ):  # a file name outside the terminal's encoding must not end a run
            stream.reconfigure(errors="backslashreplace")
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
