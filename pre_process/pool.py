"""A map that runs in processes, in order and a few tasks ahead; a stop leaves none behind."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context, parent_process

from utils.errors import UserError


@contextmanager
def worker_pool(workers: int) -> Iterator[Callable[[Callable, Iterable], Iterable]]:
    """Give a `map` that runs in `workers` processes; one worker is this process itself."""
    if workers == 1:
        yield map
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), start_worker)
    try:
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # workers inherit it: Ctrl-C is
        for _ in range(workers):  # the parent's business
            pool.submit(int)
        signal.signal(signal.SIGINT, previous)
        yield partial(map_in_pool, pool, 2 * workers)
    except BrokenProcessPool:
        raise UserError(
            "a worker process died, perhaps for want of memory; try fewer workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def map_in_pool(
    pool: ProcessPoolExecutor, ahead: int, function: Callable, tasks: Iterable
) -> Iterator:
    """Map in order with at most `ahead` tasks handed out, so that results do not pile up."""
    pending: deque = deque()
    for task in tasks:
        pending.append(pool.submit(function, task))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def start_worker() -> None:
    """Set up a worker: leave Ctrl-C to the parent, and end when the parent has been killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow_parent() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
