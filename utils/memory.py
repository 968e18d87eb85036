"""How the C library keeps memory, which decides how much of a CPU step is spent on page faults."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of glibc's <malloc.h>


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for the next allocation instead of giving it back; False on other C libraries.

    By default every large tensor is a fresh mapping whose pages the kernel clears again, step after step.
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
