"""Several processes that share a batch, and what they tell each other. One process alone is a case
of it.

Every process works on its share of a batch, and all of them compute the same loss of the whole
batch. Therefore the gradient of a sum over the processes is a sum over the processes, and the
gradient of a weight, averaged by DistributedDataParallel, is that of a single process.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.errors import UserError

TIMEOUT = timedelta(days=1)  # the first process scores or embeds while the rest wait
JOIN_TIMEOUT = timedelta(minutes=5)


class _Sum(torch.autograd.Function):
    """all_reduce whose gradient is all_reduce."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _Sum.apply(grad)


@dataclass(frozen=True)
class Processes:
    """The processes of a job as process number `rank` of `world_size` sees them.

    A batch of m images in two views lies on them by images: process r holds both views of the
    images r m / world_size to (r + 1) m / world_size, first views first. With a `world_size` of 1
    every method returns what it is given.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes files, prints and scores."""
        return self.rank == 0

    @property
    def share(self) -> tuple[int, int]:
        """(rank, world_size): which part of how many this process takes."""
        return self.rank, self.world_size

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of every process's x (same shape everywhere), differentiable."""
        return x if self.world_size == 1 else _Sum.apply(x)

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean of every process's x (same shape everywhere), differentiable."""
        return x if self.world_size == 1 else _Sum.apply(x) / self.world_size

    def gather_views(self, rows: Tensor) -> Tensor:
        """Return the rows (2m, ...) of the whole batch from every process's (2m / world_size, ...),
        differentiable.
        """
        if self.world_size == 1:
            return rows
        n_images = len(rows) // 2
        whole = rows.new_zeros(2, self.world_size, n_images, *rows.shape[1:])
        whole[:, self.rank] = rows.reshape(2, n_images, *rows.shape[1:])
        return self.sum(whole).flatten(0, 2)  # all other places are zero: the sum is exact

    def local_views(self, rows: Tensor) -> Tensor:
        """Return this process's rows (2m / world_size, ...) of the whole batch's (2m, ...)."""
        if self.world_size == 1:
            return rows
        return rows.reshape(2, self.world_size, -1, *rows.shape[1:])[:, self.rank].flatten(0, 1)

    def gather_batches(self, batches: list) -> list:
        """Return all batches in order; this process holds every world_size-th, from its rank on."""
        if self.world_size == 1:
            return batches
        gathered: list[list] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(gathered, batches)
        total = sum(map(len, gathered))
        return [gathered[n % self.world_size][n // self.world_size] for n in range(total)]

    def largest(self, number: int) -> int:
        """Return the largest of every process's number."""
        if self.world_size == 1:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers)

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.largest(0)

    def from_first(self, value: Any) -> Any:
        """Return the first process's value: plain data, arrays, tensors on the CPU."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def by_first(self, work: Callable[[], Any]) -> Any:
        """Have the first process work, and return its result (as `from_first`) in all of them.

        A UserError of the first process is raised in all of them.
        """
        if self.world_size == 1:
            return work()
        result = error = None
        if self.is_first:
            try:
                result = work()
            except UserError as fault:
                error = fault
        result, error = self.from_first((result, error))
        if error is not None:
            raise error
        return result

    def labels_from_first(self, labels: Tensor) -> Tensor:
        """Put the first process's labels into `labels` (same shape everywhere), and return them.

        They are not copied through the host.
        """
        if self.world_size > 1:
            dist.broadcast(labels, 0)
        return labels

    def check_same(self, facts: dict[str, Any]) -> None:
        """Raise UserError, naming the fact, if processes have different values of it."""
        for name, expected in self.from_first(facts).items():
            if facts[name] != expected:
                raise UserError(
                    f"{name} is {facts[name]} in process {self.rank} and {expected} in process 0; "
                    "give every machine the same command and the same files"
                )

    def parallel(self, module: nn.Module, device: torch.device, uses_all: bool) -> nn.Module:
        """Return `module` with its gradients averaged over the processes, if there are several.

        Buffers are not broadcast: every process computes the same ones.

        Args:
            uses_all: whether every trained parameter has a part in the loss.
        """
        if self.world_size == 1:
            return module
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # older versions lack the new name
            return nn.parallel.DistributedDataParallel(
                module,
                [device] if device.type == "cuda" else None,
                broadcast_buffers=False,
                find_unused_parameters=not uses_all,
            )


ALONE = Processes()


@contextmanager
def joined() -> Iterator[Processes]:
    """Join the processes that torchrun started with this one, and leave; `ALONE` without torchrun.

    Of all processes that fail, only the first one's exception goes on. A process that lost another
    one without a message (killed, its machine gone) raises UserError.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    store, rank, count = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)
    processes = Processes(rank, count, int(os.environ["LOCAL_RANK"]))
    try:
        yield processes
        processes.wait()
    except (Exception, KeyboardInterrupt) as error:
        if _count_failure(store) > 1:
            raise SystemExit(getattr(error, "status", 1)) from None
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise UserError(
                f"one of the {count} processes ended without a message (killed, or its machine is "
                "gone); resume the run from what was saved last"
            ) from None
        raise
    dist.destroy_process_group()


def _count_failure(store: dist.Store) -> int:
    """Return the number of processes that failed so far, with this one; 1 if the store is gone."""
    try:
        return store.add("failures", 1)
    except RuntimeError:
        return 1
