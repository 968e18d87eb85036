"""Many processes with one batch: who this process is, and what they tell each other. One process alone is a case of it.

Every process works on its share of a batch and all of them compute the same losses of the whole batch. A sum over the
processes therefore has a sum over the processes as its gradient, and a weight's gradient, averaged over the processes
by DistributedDataParallel, is the one that a single process has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.errors import UserError
from utils.process import place

# The first process scores the test half while the others wait. That a process died is noticed at once without it.
TIMEOUT = timedelta(hours=2)
JOIN_TIMEOUT = timedelta(minutes=5)


class _Sum(torch.autograd.Function):
    """all_reduce whose gradient is all_reduce (torch's own has moved to a private module)."""

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
    """The processes of a job as one of them sees it: number `rank` of `count`, `local_rank` on its machine.

    A batch of m images in two views, 2m rows, lies on them by images: process r holds both views of the images
    r m / count to (r + 1) m / count, first views first. With `count` 1 every method gives back what it is given.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files, prints and scores."""
        return self.rank == 0

    @property
    def share(self) -> tuple[int, int]:
        """(rank, count): which part of how many this process takes."""
        return self.rank, self.count

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every process's x (same shape everywhere), differentiable."""
        return x if self.count == 1 else _Sum.apply(x)

    def mean(self, x: Tensor) -> Tensor:
        """The mean of every process's x (same shape everywhere), differentiable."""
        return x if self.count == 1 else _Sum.apply(x) / self.count

    def gather_views(self, rows: Tensor) -> Tensor:
        """The rows (2m, ...) of the whole batch from every process's (2m / count, ...), differentiable."""
        if self.count == 1:
            return rows
        images = len(rows) // 2
        whole = rows.new_zeros(2, self.count, images, *rows.shape[1:])
        whole[:, self.rank] = rows.reshape(2, images, *rows.shape[1:])  # every other place is zero: the sum is exact
        return self.sum(whole).flatten(0, 2)

    def own_views(self, rows: Tensor) -> Tensor:
        """This process's rows (2m / count, ...) of the whole batch's (2m, ...)."""
        if self.count == 1:
            return rows
        return rows.reshape(2, self.count, -1, *rows.shape[1:])[:, self.rank].flatten(0, 1)

    def gather_batches(self, batches: Sequence[Tensor]) -> Tensor:
        """All rows in order, on the CPU: this process holds batch number rank, rank + count, rank + 2 count, ..."""
        if self.count == 1:
            return torch.cat(list(batches))
        shapes: list[list[torch.Size]] = [[] for _ in range(self.count)]
        dist.all_gather_object(shapes, [batch.shape for batch in batches])
        total = sum(map(len, shapes))
        in_order = [shapes[number % self.count][number // self.count] for number in range(total)]
        whole = torch.zeros(sum(shape[0] for shape in in_order), *in_order[0][1:])
        places = whole.split([shape[0] for shape in in_order])
        for place_, batch in zip(places[self.rank :: self.count], batches, strict=True):
            place_.copy_(batch)
        dist.all_reduce(whole)
        return whole

    def largest(self, number: int) -> int:
        """The largest of every process's number."""
        if self.count == 1:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers)

    def from_first(self, value: Any) -> Any:
        """The first process's value (a number, a text, an array, ... or None)."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def from_first_tensor(self, x: Tensor) -> Tensor:
        """The first process's x (same shape and type everywhere)."""
        if self.count > 1:
            x = x.contiguous()
            dist.broadcast(x, 0)
        return x

    def check_same(self, facts: dict[str, Any]) -> None:
        """Raise UserError, naming the fact, where a process has another value of one than the first process."""
        for name, theirs in self.from_first(facts).items():
            if facts[name] != theirs:
                raise UserError(
                    f"{name} is {facts[name]} in process {self.rank} and {theirs} in process 0; give every machine the "
                    "same command and the same files"
                )

    def parallel(self, module: nn.Module, device: torch.device, every_weight: bool = True) -> nn.Module:
        """`module`, with its gradients averaged over the processes (DistributedDataParallel) if there are several.

        every_weight: whether each weight has a part in the module's result.
        """
        if self.count == 1:
            return module
        return nn.parallel.DistributedDataParallel(
            module, [device] if device.type == "cuda" else None, find_unused_parameters=not every_weight
        )


ALONE = Processes()


@contextmanager
def joined() -> Iterator[Processes]:
    """Join the processes that torchrun started with this one (gloo for tensors on the CPU, nccl on GPUs), and leave.

    Without torchrun: `ALONE`. Of all processes that fail only the first one's exception goes on, the others exit
    without a word; a process that lost another one which said nothing (killed, its machine gone) raises UserError.
    """
    here = place()
    if here is None or here.count == 1:
        yield ALONE
        return
    store, rank, count = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)
    processes = Processes(rank, count, here.local_rank)
    try:
        yield processes
        processes.largest(0)  # a process that is done waits: one that still works may fail
    except (Exception, KeyboardInterrupt) as error:
        if _failures(store) > 1:
            raise SystemExit(getattr(error, "status", 1)) from None
        if _lost_another(error):
            raise UserError(
                f"one of the {count} processes ended without a message (killed, as for lack of memory, or its machine "
                "is gone); what was saved last can be continued with --resume"
            ) from None
        raise
    dist.destroy_process_group()


def _failures(store: dist.Store) -> int:
    """Number of processes that failed so far, with this one; 1 if none can tell."""
    try:
        return store.add("failures", 1)
    except RuntimeError:  # the store went with the process that held it
        return 1


def _lost_another(error: BaseException) -> bool:
    """Whether a collective failed because its other side is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
