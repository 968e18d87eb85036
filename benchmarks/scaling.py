"""A training step (2m rows, input included) in one process with all cores, and in several with their share of them, or
with a GPU each, started by torchrun's launcher; one run after the other, in turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import paired
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from datasets import EpochPlan, TwoViewLoader
from losses import TrainingStep
from models import build_model
from models.batch_norm import share_batch_norm
from utils.devices import choose_device
from utils.distributed import joined
from utils.features import network_autocast
from utils.process import keep_freed_memory


def steps_of_this_process(backbone: str, precision: str, m: int, steps: int, images: Path, threads: int) -> list[float]:
    """Train on m images a step as train.py does; seconds of every step after the first."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    with joined() as processes:
        device = choose_device("auto", processes)
        torch.manual_seed(0)
        model = build_model(backbone).to(device, memory_format=torch.channels_last).train()
        model.base_model = share_batch_norm(model.base_model, processes, device)
        module = processes.parallel(TrainingStep(model, processes=processes), device)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        pixels = np.load(images, mmap_mode="r")
        plan = EpochPlan(len(pixels), m, pixels.shape[1], 0, 1, share=processes.share)
        batches = iter(TwoViewLoader(pixels, plan))

        def step() -> None:
            views, _ = next(batches)
            with network_autocast(device, precision):
                losses = module(model.normalization(views.to(device, non_blocking=True)))
            optimizer.zero_grad(set_to_none=True)
            losses["loss"].backward()
            optimizer.step()

        step()
        return [paired.seconds(step, device) for _ in range(steps)]


def run(count: int, threads: int, *case: Any) -> list[float]:
    """Seconds of the steps of `count` processes with `threads` threads each, as the first of them sees them."""
    start = "spawn" if torch.cuda.is_available() else "fork"
    config = LaunchConfig(1, 1, count, run_id="scaling", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
                          monitor_interval=0.1, start_method=start)  # fmt: skip
    return elastic_launch(config, steps_of_this_process)(*case, threads)[0]


def measure(backbone: str, precision: str, m: int, size: int, options: argparse.Namespace) -> dict[str, Any]:
    """All numbers of processes with one backbone."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    counts = {f"{count} x {max(1, cores // count)}": count for count in options.processes}
    taken: dict[str, list[float]] = {name: [] for name in counts}
    steps = 1 if options.tiny else 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npy"
        np.save(path, np.random.default_rng(0).integers(0, 256, (m * (steps + 1), size, size, 3), np.uint8))
        for _ in range(options.repeats):
            for name, count in counts.items():
                taken[name] += run(count, max(1, cores // count), backbone, precision, m, steps, path)
    medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
    first = next(iter(medians.values()))
    return {
        name: {
            "median_s": medians[name],
            "times_as_fast": first / medians[name],
            "rows_per_second": 2 * m / medians[name],
            "all_s": [round(value, 5) for value in taken[name]],
        }
        for name in counts
    }


def main() -> None:
    parser = paired.arguments("scaling", " ".join(__doc__.split()))
    parser.add_argument("--backbones", nargs="+", default=["googlenet", "resnet18"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2], help="numbers of processes (default 1 2)")
    parser.add_argument("--batch", type=int, default=64, help="m, images a batch of all processes (default 64)")
    options = parser.parse_args()
    m, size = (6, 64) if options.tiny else (options.batch, 256)
    cases = {"resnet_small, fp32": ("resnet_small", "fp32")} if options.tiny else {
        f"{backbone}, {precision}": (backbone, precision)
        for backbone in options.backbones for precision in options.precisions
    }  # fmt: skip
    result = {name: measure(*case, m, size, options) for name, case in cases.items()}
    paired.write({"rows": 2 * m, "image_size": size, "ways": "processes x threads", **result}, options)


if __name__ == "__main__":
    main()
