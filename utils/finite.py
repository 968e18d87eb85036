"""Numbers that must stay finite: the losses of every step, and the weights before they are saved."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor, nn

from utils.errors import DivergedError

DELAY = 8  # steps that a GPU may be ahead of the check


class LossWatch:
    """Looks at the losses of every step without making the host wait for the device.

    On a GPU the losses of a step are copied to pinned memory behind the step, and read `DELAY` steps later, when that
    copy is long done: asking at once would hold back the next step's launch. On the CPU they are read at once.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        """names: of the losses, first of the one that is minimised."""
        self.names = names
        self._pending: deque[tuple[str, Tensor, torch.cuda.Event | None]] = deque()

    def add(self, where: str, losses: Tensor) -> None:
        """Take the losses (len(names),) of the step that `where` names; DivergedError may mean a step before."""
        if losses.device.type == "cuda":
            host = torch.empty(losses.shape, dtype=losses.dtype, pin_memory=True)
            host.copy_(losses, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            self._pending.append((where, host, copied))
            if len(self._pending) > DELAY:
                self._look(*self._pending.popleft())
        else:
            self._look(where, losses, None)

    def finish(self) -> None:
        """Look at all that are left. Raises DivergedError."""
        while self._pending:
            self._look(*self._pending.popleft())

    def _look(self, where: str, losses: Tensor, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        values = losses.tolist()
        if not torch.isfinite(losses[0]):  # a part of weight zero may be what it likes
            listed = ", ".join(f"{name} {value:g}" for name, value in zip(self.names, values, strict=True))
            raise DivergedError(f"{where}: the loss is not finite ({listed})")


def check_weights(model: nn.Module, where: str) -> None:
    """Raise DivergedError naming the first parameter or buffer of `model` that is not finite."""
    named = [(name, value) for name, value in model.state_dict().items() if value.is_floating_point()]
    finite = torch.stack([value.isfinite().all() for _, value in named]).tolist()
    for (name, _), good in zip(named, finite, strict=True):
        if not good:
            raise DivergedError(f"{where}: the weights are not finite, the first is {name}")
