"""A map in order that threads compute ahead: reading and decoding let other threads work."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor


class ReadAhead:
    """Iterates make(task) for each task in order, computed ahead by threads; without workers on
    demand. Its length is that of the tasks, if they have one.
    """

    def __init__(self, make: Callable, tasks: Iterable, workers: int) -> None:
        self.make = make
        self.tasks = tasks
        self.workers = workers

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator:
        if self.workers == 0:
            yield from map(self.make, self.tasks)
            return
        with ThreadPoolExecutor(self.workers) as pool:
            pending: deque = deque()
            try:
                for task in self.tasks:
                    pending.append(pool.submit(self.make, task))
                    if len(pending) > self.workers:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()
