"""Where to compute, and the facts of the machine."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from utils.distributed import ALONE, Processes
from utils.errors import UserError
from utils.options import usable_cores


def choose_device(name: str, processes: Processes = ALONE) -> torch.device:
    """Return the device of this process: "auto" takes a GPU of its own if there is one, else the
    CPU; "cuda:1" is that GPU.

    Raises UserError for another name, if cuda is asked for and absent, and if there are GPUs, but
    fewer than processes.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise UserError(f"device {name}: choose auto, cpu, cuda or cuda:1")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("torch sees no CUDA device here; use the device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if ":" in name:
        return torch.device(name)
    if processes.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {processes.local_rank + 1} of this machine has no GPU of its own, torch sees "
            f"{torch.cuda.device_count()}; start one process for each GPU, or use the device cpu"
        )
    torch.cuda.set_device(processes.local_rank)
    return torch.device("cuda", processes.local_rank)


def compute_deterministically() -> None:
    """Have torch take the algorithms that give the same bits each time. Call it before a GPU is
    used.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


@contextmanager
def memory_faults(advice: str) -> Iterator[None]:
    """Turn a lack of memory, on the GPU or the host, into a UserError that ends in `advice`."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(f"out of memory on the GPU; {advice}") from None
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        raise UserError(f"out of memory on the host; {advice}") from None


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 has instructions of its own there.

    GPUs from Ampere (A100) on have them, and CPUs with AVX-512 BF16, AMX or Arm's.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    is_supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return is_supported is not None and is_supported()


def machine() -> dict[str, Any]:
    """Return the facts of the machine on which something is measured."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": processor_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def processor_name() -> str:
    """Return the name that the system gives its processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())
