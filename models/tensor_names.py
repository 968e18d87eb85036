"""Tensors of a file, whatever its writer put around their names."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from utils.errors import UserError

WRAPPERS = {  # put into names by DataParallel, torch.compile, FSDP and checkpointing
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
}
COUNTER_OF_COPIES = "n_averaged"  # of torch's AveragedModel
COPIES = ("ema", "teacher")  # averaged copies of a network, usually the better ones
USUAL = ("", "model.", "state_dict.")  # nothing to speak of
log = logging.getLogger(__name__)


def flat_tensors(content: object, prefix: str = "") -> dict[str, Tensor]:
    """Return all tensors of nested dicts, the names on the way to each joined by dots."""
    if not isinstance(content, dict):
        return {}
    tensors: dict[str, Tensor] = {}
    for name, value in content.items():
        if not isinstance(name, str) or name == COUNTER_OF_COPIES:
            continue
        parts = [part for part in name.split(".") if part not in WRAPPERS]
        place = ".".join([*filter(None, [prefix]), *parts])
        if isinstance(value, Tensor):
            tensors[place] = value
        else:
            tensors |= flat_tensors(value, place)
    return tensors


def without_prefix(tensors: dict[str, Tensor], least: int) -> dict[str, dict[str, Tensor]]:
    """Return for each prefix that `least` names share their tensors by the rest of the name.

    A prefix ends with a dot, or is empty. Those of averaged copies come first.
    """
    counts = Counter("")
    for name in tensors:
        parts = name.split(".")
        counts.update(".".join(parts[:length]) + "." for length in range(1, len(parts)))
    counts[""] = len(tensors)
    prefixes = [prefix for prefix, count in counts.items() if count >= least]
    prefixes.sort(key=lambda prefix: (not any(word in prefix for word in COPIES), len(prefix)))
    return {
        prefix: {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
        for prefix in prefixes
    }


def say_prefix(prefix: str, path: str | os.PathLike) -> None:
    """Log which tensors of a file are taken, unless that is no surprise."""
    if prefix not in USUAL:
        log.warning("%s: taking the tensors whose names begin with %s", path, prefix)


def some_names(names: Iterable[str], count: int = 3) -> str:
    """Return the first few of the names, for a message."""
    names = list(names)
    return ", ".join(names[:count]) + ", ..." * (len(names) > count)


def check_tensors(tensors: dict[str, Tensor], path: str | os.PathLike) -> None:
    """Raise UserError for the first tensor of the file that is not dense, real and finite."""
    for name, value in tensors.items():
        if value.layout != torch.strided or value.is_quantized or value.is_complex():
            raise UserError(f"{path}: {name} is not a plain tensor; save a plain state_dict")
        if value.is_floating_point() and not value.float().isfinite().all():
            raise UserError(f"{path}: {name} holds NaN or infinite values; take another file")
