"""Schedules of the learning rate."""

from __future__ import annotations

import argparse
import math

SCHEDULES = {  # share of the training that is done -> share of the rate
    "constant": lambda done: 1.0,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}


def learning_rate(args: argparse.Namespace, step: int, steps_per_epoch: int) -> float:
    """Return the rate of a step of the run, counted from 0: warm-up, then the schedule."""
    n_warmup = round(args.warmup_epochs * steps_per_epoch)
    if step < n_warmup:
        return args.lr * (step + 1) / n_warmup
    n_steps = args.n_epoch * steps_per_epoch
    share_done = (step - n_warmup) / max(1, n_steps - n_warmup)
    return args.lr * SCHEDULES[args.schedule](share_done)
