"""A map that runs in threads, in order and a few tasks ahead: Pillow lets other threads work."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial


@contextmanager
def worker_pool(workers: int) -> Iterator[Callable[[Callable, Iterable], Iterable]]:
    """Give a `map` that runs in `workers` threads; with one worker in this thread."""
    if workers == 1:
        yield map
        return
    pool = ThreadPoolExecutor(workers)
    try:
        yield partial(map_in_pool, pool, 2 * workers)
    finally:
        pool.shutdown(cancel_futures=True)


def map_in_pool(
    pool: ThreadPoolExecutor, ahead: int, function: Callable, tasks: Iterable
) -> Iterator:
    """Map in order with at most `ahead` tasks handed out, so that results do not pile up."""
    pending: deque = deque()
    for task in tasks:
        pending.append(pool.submit(function, task))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
