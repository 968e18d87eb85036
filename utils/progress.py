"""Progress bars."""

from __future__ import annotations

import os
from collections.abc import Iterable

from tqdm import tqdm


def progress(items: Iterable, title: str, total: int | None = None) -> Iterable:
    """Iterate `items` under a bar of `total` steps (default: of their length), gone when done.

    It is shown on a terminal alone, and by the first process.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    disable = None if is_first else True  # None: off where stderr is no terminal
    return tqdm(items, title, total, leave=False, disable=disable, dynamic_ncols=True)
