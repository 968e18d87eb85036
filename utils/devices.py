"""Where to compute."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from utils.errors import UserError


def choose_device(name: str) -> torch.device:
    """The device for --device auto, cpu or cuda. Raises UserError when cuda is asked for and not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def compute_deterministically() -> None:
    """Have torch take, for every operation, the algorithm that gives the same bits each time on one machine.

    Called before the first tensor of a GPU. An operation that has no such algorithm raises RuntimeError.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


@contextmanager
def memory_faults(advice: Callable[[], str]) -> Iterator[None]:
    """Turn a lack of memory, on the GPU or the host, into a UserError with `advice()`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        on_host = isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
        if not on_host and not isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(f"out of memory on the {'host' if on_host else 'GPU'}; {advice()}") from None
