"""Settings of this process: how well it uses a CPU (make these before the first tensor), how much memory it takes."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of glibc's <malloc.h>


class Place(NamedTuple):
    """This process's number among all `count` of a job, and among those of its machine."""

    rank: int
    local_rank: int
    count: int


def place() -> Place | None:
    """Where torchrun has put this process; None if it did not start it."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not all(name in os.environ for name in names):
        return None
    return Place(*(int(os.environ[name]) for name in names[:3]))


def is_first() -> bool:
    """Whether this process is the one of its job that speaks to the user."""
    here = place()
    return here is None or here.rank == 0


def share_cores() -> None:
    """Let OpenMP's threads sleep soon when they wait for each other, unless the environment says how; before torch.

    By default they spin, which on a busy machine takes the core from the very thread they wait for: two runs side by
    side on two cores took 8 times as long as one, and with this setting twice as long; alone nothing changes.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for the next allocation instead of giving it back; False on other C libraries.

    By default every large tensor is a fresh mapping whose pages the kernel clears again, step after step: about a
    tenth of a ResNet-18 step on the CPU. The process then holds on to its largest size.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    largest = 2**31 - 1
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, largest), (_M_TOP_PAD, 64 * 2**20))
    return all([mallopt(option, value) == 1 for option, value in settings])


@contextmanager
def memory_limited(more: int) -> Iterator[None]:
    """Let this process take at most `more` bytes above what it has, for a block; then MemoryError. Linux alone.

    For readers of files from a stranger that believe any size a file claims.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    allowed = [limit for limit in (held + more, *before) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(allowed), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
