"""Where to compute."""

from __future__ import annotations

import torch

from utils.distributed import ALONE, Processes
from utils.errors import UserError


def choose_device(name: str, processes: Processes = ALONE) -> torch.device:
    """The device for --device auto, cpu or cuda; of several processes on a machine each takes a GPU of its own.

    Raises UserError when cuda is asked for and not there, or has fewer GPUs than processes.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device; use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if processes.count == 1:
        return torch.device("cuda")
    if processes.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"--nproc_per_node of torchrun: process {processes.local_rank + 1} of this machine has no GPU of its own, "
            f"torch sees {torch.cuda.device_count()}; start one process for each GPU, or use --device cpu"
        )
    torch.cuda.set_device(processes.local_rank)
    return torch.device("cuda", processes.local_rank)
