"""TensorBoard event files that say what metrics.jsonl says."""

from __future__ import annotations

from pathlib import Path

from utils.errors import UserError
from utils.runs import scalars


class EventFile:
    """Writes every number of an epoch's metrics, with epochs as steps."""

    def __init__(self, folder: Path, epochs_done: int) -> None:
        """Continue after the epochs done; what a killed run wrote beyond them is hidden.

        Raises UserError if the package tensorboard is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("event files need a package; pip install tensorboard") from None
        self._writer = SummaryWriter(str(folder), purge_step=epochs_done + 1)

    def add(self, row: dict) -> None:
        """Write the numbers of an epoch's row."""
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, row["epoch"])
        self._writer.flush()
