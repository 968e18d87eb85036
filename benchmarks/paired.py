"""Timing two or more ways side by side: in turn, medians, with the facts of the machine, written as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/NAME.py` finds the rooms

from utils.files import written_whole  # noqa: E402


def arguments(name: str, description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    default = ROOT / "misc" / "benchmarks" / f"{name}.json"
    parser.add_argument("--out", type=Path, help=f"JSON file to write (default {default.relative_to(ROOT)})")
    parser.add_argument("--tiny", action="store_true", help="small sizes, seconds in all; written to --out only")
    parser.add_argument("--repeats", type=int, default=5, help="turns of every way; medians are reported (default 5)")
    parser.set_defaults(default_out=default)
    return parser


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_name(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def seconds(run: Callable[[], Any], device: torch.device | str = "cpu") -> float:
    """Seconds of one call: device events on a GPU, the wall clock elsewhere."""
    if torch.device(device).type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def in_turn(
    ways: dict[str, Callable[[], Any]], repeats: int, device: torch.device | str = "cpu", warm_up: bool = True
) -> dict[str, dict[str, Any]]:
    """Time every way in turn (A, B, A, B, ...), so that what else the machine does hits all of them.

    Returns per way the median, all seconds, and `times_ours`: its median over the first way's.
    """
    if warm_up:
        for run in ways.values():
            run()
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            taken[name].append(seconds(run, device))
    ours = statistics.median(next(iter(taken.values())))
    return {
        name: {
            "median_s": statistics.median(all_s),
            "times_ours": statistics.median(all_s) / ours,
            "all_s": [round(value, 5) for value in all_s],
        }
        for name, all_s in taken.items()
    }


def peak_extra_mb(run: Callable[[], Any]) -> float:
    """MiB that a call adds to the resident memory at its highest, polled every 2 ms; call it in a fresh process."""
    page = os.sysconf("SC_PAGE_SIZE")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    highest, before, done = [0], resident(), threading.Event()

    def poll() -> None:
        while not done.wait(0.002):
            highest[0] = max(highest[0], resident())

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        run()
    finally:
        done.set()
        thread.join()
    return (max(highest[0], resident()) - before) / 2**20


def clustered_unit_vectors(count: int, columns: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Synthetic embeddings (count, columns) float32 of length 1 around random class centres, and labels (count,)."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((classes, columns), dtype=np.float32)
    labels = rng.integers(0, classes, count)
    embeddings = centres[labels] + 1.5 * rng.standard_normal((count, columns), dtype=np.float32)
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True), labels


def write(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the result and write it, with the machine's facts, to --out or (not --tiny) to its usual place."""
    text = json.dumps({"machine": machine(), "repeats": options.repeats, **result}, indent=1)
    print(text)
    target = options.out or (None if options.tiny else options.default_out)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(target) as file:
            file.write_text(text + "\n")


def installed(module: str) -> bool:
    """Whether a package that is only compared with is here."""
    try:
        __import__(module)
    except ImportError:
        return False
    return True
