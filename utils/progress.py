"""Progress bars."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable

from tqdm import tqdm


def progress(items: Iterable, total: float, title: str) -> Iterable:
    """Iterate `items` under a bar of `total` steps: on a terminal and in the first process only,
    gone when done.
    """
    disable = (
        None if os.environ.get("RANK", "0") == "0" else True
    )  # None: off where stderr is no terminal
    return tqdm(
        items, title, total=math.ceil(total), leave=False, disable=disable, dynamic_ncols=True
    )
