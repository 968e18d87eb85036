"""The exceptions for what a user can mend, and how a script reports them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

LONGEST = 1500  # characters of an error
REQUIRED = {"torch", "torchvision", "numpy", "scipy", "sklearn", "PIL", "tqdm", "h5py", "matplotlib", "bokeh", "jinja2"}


class UserError(Exception):
    """A mistake of the user's that a message can mend: it names the file or value and says what to do next."""

    status = 2  # of the process that ends with it


class DivergedError(UserError):
    """Training whose numbers are no longer finite; exit status 3."""

    status = 3


def one_line(text: str) -> str:
    """The text on one line: what is not printable as its escape, so that no name can steer a terminal; long ones cut.

    Names in a message may come from a stranger's file.
    """
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's `main`; a `UserError` or a fault of the file system becomes one line and exit status 2.

    Ctrl-C becomes one line and 130, another signal (`utils.stopping`) 128 + its number.
    """
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal's encoding lacks must not end a run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    status = 2
    try:
        sys.exit(main())
    except UserError as error:
        message, status = str(error), error.status
    except ModuleNotFoundError as error:
        if error.name not in REQUIRED:
            raise
        message = (f"the package {error.name} is missing in {sys.executable}; run .venv/bin/python after make demo, or "
                   f"pip install -r requirements.txt")  # fmt: skip
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except KeyboardInterrupt as stop:
        print(f"{Path(sys.argv[0]).name}: interrupted; what was finished is saved", file=sys.stderr)
        sys.exit(getattr(stop, "status", 130))
    print(f"{Path(sys.argv[0]).name}: error: {one_line(message)}", file=sys.stderr)
    sys.exit(status)
