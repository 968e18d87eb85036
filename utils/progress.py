"""Progress bars."""

from __future__ import annotations

import math
from collections.abc import Iterable


def progress(items: Iterable, total: float, title: str) -> Iterable:
    """Iterate `items` under a bar of `total` steps, rounded up: on a terminal, nothing in a log; gone when done."""
    from tqdm import tqdm

    return tqdm(items, title, total=math.ceil(total), leave=False, disable=None, dynamic_ncols=True)
