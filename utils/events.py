"""TensorBoard event files that say what metrics.jsonl says."""

from __future__ import annotations

import importlib.util
import os
import time
from pathlib import Path

from utils.errors import UserError
from utils.runs import EVENTS, scalars


def check_tensorboard() -> None:
    """Raise UserError where the package tensorboard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard: needs the package of that name; pip install tensorboard, or leave it out")


class EventFile:
    """The one event file of a run: every number of its metrics, epochs as steps; written after the checkpoint."""

    def __init__(self, folder: Path, rows: list[dict]) -> None:
        """Begin the file anew with the rows so far: what a killed run had written there or not does not matter.

        The points of earlier epochs get the times that their seconds tell, so that only training counts.
        """
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        for path in folder.glob(EVENTS):
            path.unlink()
        now = time.time()
        self.path = folder / EVENTS.replace("*", f"{int(now)}.{os.getpid()}")
        self._event, self._writer = Event, RecordWriter(open(self.path, "wb"))  # noqa: SIM115  # until close
        seconds = [scalars(row).get("seconds/epoch", 0.0) for row in rows]
        self._write(Event(wall_time=now - sum(seconds), file_version="brain.Event:2"))
        # a TensorBoard that is open forgets what it has read of the run
        self._write(Event(wall_time=now - sum(seconds), step=0, session_log=SessionLog(status=SessionLog.START)))
        for done, row in enumerate(rows, 1):
            self.add(row, now - sum(seconds[done:]))

    def add(self, row: dict, when: float | None = None) -> None:
        """Write the numbers of an epoch's row; UserError where the disk is at fault."""
        event = self._event(wall_time=time.time() if when is None else when, step=row["epoch"])
        for name, value in scalars(row).items():
            event.summary.value.add(tag=name, simple_value=value)
        self._write(event)

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def _write(self, event) -> None:
        try:
            self._writer.write(event.SerializeToString())
            self._writer.flush()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); free space there, then train.py "
                            f"--resume {self.path.parent}") from None  # fmt: skip
