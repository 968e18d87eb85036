"""Where to compute."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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


def compute_deterministically() -> None:
    """Have torch take, for every operation, the algorithm that gives the same bits each time on one machine.

    Called before the first tensor of a GPU. An operation that has no such algorithm raises RuntimeError.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


@contextmanager
def memory_faults(advice: Callable[[], str]) -> Iterator[None]:
    """Turn a lack of memory, on the GPU or the host, into a UserError with `advice()`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        on_host = isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
        if not on_host and not isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(f"out of memory on the {'host' if on_host else 'GPU'}; {advice()}") from None


def bf16_is_slow(device: torch.device) -> bool:
    """Whether bfloat16 is only emulated there: a CPU without its instructions (AVX-512 BF16, AMX, or Arm's)."""
    if device.type != "cpu":
        return False
    known = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return known is None or not known()


def compile_backbone(model: torch.nn.Module, device: torch.device) -> None:
    """Have torch.compile make the backbone's kernels when it first runs; names and weights stay as they are.

    The heads and the losses, whose sizes change from batch to batch, run as before.
    Raises UserError where there is no C++ compiler, which the CPU's kernels need.
    """
    compiler = os.environ.get("CXX", "g++ clang++").split()
    if device.type == "cpu" and not any(shutil.which(name) for name in compiler):
        raise UserError("--compile: needs a C++ compiler for the CPU; install g++, or leave --compile out")
    model.base_model.compile()
