"""Progress bars."""

from __future__ import annotations

import math
from collections.abc import Iterable

from utils.process import is_first


def progress(items: Iterable, total: float, title: str) -> Iterable:
    """Iterate `items` under a bar of `total` steps, rounded up: on a terminal, nothing in a log; gone when done.

    Of many processes the first alone has bars.
    """
    from tqdm import tqdm

    disable = None if is_first() else True
    return tqdm(items, title, total=math.ceil(total), leave=False, disable=disable, dynamic_ncols=True)
