"""Files of torch.save: read without executing anything in them, written whole."""

from __future__ import annotations

import argparse
import os
import pathlib
import pickle
import re
import warnings
from pathlib import Path

import numpy as np
import torch

from utils.errors import UserError
from utils.files import written_whole

REFUSED_CLASS = re.compile(r"GLOBAL (\S+) was not an allowed global")
FIRST_BYTES = (b"PK", b"\x80")  # of what torch.save writes: a zip archive, once a pickle


def _numpy_globals() -> list:
    """Return what pickled numpy scalars and arrays consist of, under the names of numpy 1 and 2."""
    scalar_class, _ = np.float64(0).__reduce__()[:2]
    array_function = np.zeros(1).__reduce__()[0]
    names = []
    for function in (scalar_class, array_function):
        for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            names.append((function, f"{module}.{function.__name__}"))
    dtypes = {type(np.dtype(code)) for code in "?bhilqBHILQefd"}
    return [*names, np.ndarray, np.dtype, *dtypes]


def _harmless_globals() -> list:
    """Return what torch may make beside tensors: numbers, arrays, and the options of a script."""
    return [*_numpy_globals(), argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath]


def read_torch_file(path: str | os.PathLike) -> object:
    """Load a file written by `torch.save` on the CPU, without executing anything in it.

    Tensors, plain values, numpy scalars and arrays, and argparse's options are read. Raises
    UserError that names the file if it is missing, damaged, or holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {kind}; give a file that torch.save wrote, or a run's folder")
    with open(path, "rb") as file:
        start = file.read(20)
    if not start.startswith(FIRST_BYTES):
        raise UserError(
            f"{path}: not a file that torch.save wrote, as it begins with {start!r}; take another "
            "file"
        )
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_harmless_globals()):
            warnings.simplefilter("ignore")  # about the way in which it was pickled
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = REFUSED_CLASS.search(str(error))
        if "Unsupported" in str(error) or "weights_only" in str(error).lower():
            kind = f" ({refused[1]})" if refused else ""
            raise UserError(
                f"{path}: holds Python objects{kind} beyond tensors and plain values, which could "
                "run code, or is damaged; save a plain state_dict"
            ) from None
        raise UserError(
            f"{path}: not a file that torch.save wrote, or damaged; take another file"
        ) from None
    except Exception as error:  # a damaged file fails anywhere, with no common class of error
        reason = type(error).__name__
        raise UserError(
            f"{path}: not a file that torch.save wrote, or damaged ({reason}); take another file"
        ) from None


def write_torch_file(path: Path, content: dict) -> None:
    """Save whole. Raises OSError for a fault of the disk, which torch hides in a RuntimeError."""
    with written_whole(path) as beside, open(beside, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
