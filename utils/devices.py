"""Where to compute."""

from __future__ import annotations

import torch

from utils.errors import UserError


def choose_device(name: str) -> torch.device:
    """The device for --device auto, cpu or cuda. Raises UserError when cuda is asked for and not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
