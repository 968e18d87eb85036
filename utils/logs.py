"""What a training prints and appends to its log file."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import torch

from utils.devices import has_fast_bf16
from utils.errors import UserError
from utils.evaluation import nmi_remark, recall_titles
from utils.files import disk_faults
from utils.runs import BEST, LAST, last_and_best

log = logging.getLogger("train")
MOST_LISTED = 8  # numbers of what a method reports


class LogFile(logging.FileHandler):
    """A log file that raises UserError if its disk is full, instead of printing a traceback."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Raise UserError for the error under way."""
        raise UserError(f"{self.baseFilename}: cannot be written ({sys.exc_info()[1]})")


def start_log(folder: Path, name: str) -> None:
    """Print what is logged, and append it to `folder/name.log`."""
    with disk_faults(folder, "choose another folder for the log"):
        folder.mkdir(parents=True, exist_ok=True)
        file = LogFile(folder / f"{name}.log", encoding="utf-8", errors="backslashreplace")
    log.setLevel(logging.INFO)
    log.handlers = [logging.StreamHandler(sys.stdout), file]
    log.propagate = False


def log_start(
    args: argparse.Namespace, device: torch.device, has_batch_norm: bool, remarks: list[str]
) -> None:
    """Log what is trained on what, and remarks about it."""
    for remark in remarks:
        log.info(f"{args.dataset}: {remark}")
    log.info(f"recipe {args.recipe}: {args.backbone} on {device} in {args.precision}")
    if args.precision == "bf16" and not has_fast_bf16(device):
        log.info("this processor has no bfloat16 instructions: bf16 is slower than fp32 here")
    if has_batch_norm and args.weights == "none" and not args.train_batch_norm:
        log.info("random weights bring no statistics for batch norm; train_batch_norm makes them")


def log_epoch(row: dict, logged: dict) -> None:
    """Log one line about an epoch: its metrics, among them what the method reported."""
    parts = [f"epoch {row['epoch']:>3}"]
    if "loss" in row:
        names = [name for name in row if name.endswith("_loss")]
        losses = ", ".join(f"{name.removesuffix('_loss')} {row[name]:.4f}" for name in names)
        parts.append(f"loss {row['loss']:.4f}" + (f" ({losses})" if losses else ""))
    parts += [f"{name.replace('_', ' ')} {_text(value)}" for name, value in logged.items()]
    for half in ("", "val_"):
        if f"{half}recall@1" in row:
            parts.append(score_text(row, half))
    if row.get("best"):
        parts.append("*")
    if "views_per_second" in row:
        parts.append(f"{sum(row['seconds'].values()):.1f} s")
        parts.append(f"{row['views_per_second']:.1f} views/s")
    log.info("  ".join(parts))


def _text(value: Any) -> str:
    """Write what a method reported: of many numbers how many, the smallest and the largest."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and len(value) > MOST_LISTED:
        return f"{min(value)} to {max(value)} ({len(value)})"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)


def score_text(row: dict, half: str) -> str:
    """Return R@K and NMI in percent; half: "" for the test half, "val_" for held-out classes."""
    scores = {name.removeprefix(half): value for name, value in row.items() if half in name}
    texts = ["held-out"] if half else []
    texts += [f"{title} {100 * scores[name]:.2f}" for title, name in recall_titles(scores).items()]
    if "nmi" in scores:
        texts.append(f"NMI {100 * scores['nmi']:.2f}")
    return " ".join(texts)


def log_summary(rows: list[dict], path: Path) -> None:
    """Log the last epoch, and the best one with what it was chosen on."""
    scored = last_and_best(rows)
    if not scored:
        log.info("not scored, as the data set has no labels: %s", path / LAST)
        return
    for (title, row), name in zip(scored, (LAST, BEST), strict=True):
        texts = [score_text(row, part) for part in ("", "val_") if f"{part}recall@1" in row]
        log.info("%s epoch (%d): %s  %s", title, row["epoch"], "  ".join(texts), path / name)
    _, last = scored[0]
    if "recall@1" in last:
        log.info("NMI %s", nmi_remark(last))
