"""Where the time of a command goes: train.py, test.py or embed.py, stage by stage.

    python benchmarks/stages.py -- train.py --dataset car196 --recipe best --backbone resnet18

On a GPU the clock waits for it at the ends of each stage, so that the whole takes longer than
without a clock.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, if run as a script

import recipes.start
from benchmarks import paired
from embedder import Embedder
from methods import METHODS, Method
from models import CBSwR
from utils.embedding_store import EmbeddingStore
from utils.errors import run_script
from utils.runs import RunFolder

ROOT = Path(__file__).resolve().parents[1]
INPUT = {"two_view_batches", "center_crops", "part_crops", "batches_of"}  # of the scripts
WORK = {"score": "scores", "closed_form_head": "head"}
WORK |= dict.fromkeys(("aligned_share", "score_heads"), "choice of the start")
WORK["pooled_features"] = "features, network"


class Clock:
    """Counts the seconds of stages; of nested ones the innermost counts."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._stages = ["other"]
        self._since = time.perf_counter()

    def _count(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self._stages[-1]] += now - self._since
        self._since = now

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time of a block for a stage."""
        self._count()
        self._stages.append(name)
        try:
            yield
        finally:
            self._count()
            self._stages.pop()

    def timed(self, name: str, function: Callable) -> Callable:
        """Return a function whose time counts for a stage."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return function(*args, **kwargs)

        return call

    def waited(self, name: str, function: Callable[..., Iterable]) -> Callable[..., Iterator]:
        """Return a function of which each step of the result counts for a stage."""

        def iterate(*args: Any, **kwargs: Any) -> Iterator:
            steps = iter(function(*args, **kwargs))
            while True:
                with self.stage(name):
                    item = next(steps, self)
                if item is self:
                    return
                yield item

        return iterate


def replacements(script: ModuleType, clock: Clock) -> Iterator[tuple[object, str, Callable]]:
    """Yield what is timed: its owner, its name, and the function that takes its place."""

    def timed(owner: object, name: str, stage: str) -> tuple[object, str, Callable]:
        return owner, name, clock.timed(stage, getattr(owner, name))

    for module in (script, recipes.start):
        for name in vars(module).keys() & INPUT:
            yield module, name, clock.waited("input", getattr(module, name))
        for name in vars(module).keys() & WORK.keys():
            yield timed(module, name, WORK[name])
    for method in {method for method in METHODS.values() if "forward" in vars(method)}:
        yield timed(method, "forward", "losses")
    maps = CBSwR.maps
    in_training = clock.timed("training, network forward", maps)
    yield (
        CBSwR,
        "maps",
        lambda *args: (in_training if torch.is_grad_enabled() else maps)(*args),
    )
    yield timed(torch.Tensor, "backward", "training, backward")
    for optimizer in (torch.optim.SGD, torch.optim.AdamW):
        yield timed(optimizer, "step", "training, optimizer")
    yield timed(Method, "mine", "neighbors")
    yield timed(Method, "cluster", "k-means")
    yield timed(RunFolder, "save", "checkpoint")
    yield timed(Embedder, "embed_crops", "features, network")
    yield timed(EmbeddingStore, "_write", "writing")


def load(script: str) -> ModuleType:
    """Import a script from its file; `test` is the name of a package of Python's own, too."""
    spec = importlib.util.spec_from_file_location(Path(script).stem + "_script", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure(script: str, words: Sequence[str]) -> dict[str, float]:
    """Run a script in this process; returns the seconds of its stages, the longest first."""
    module = load(script)
    clock = Clock()
    with ExitStack() as patches:
        for owner, name, function in replacements(module, clock):
            patches.enter_context(patch.object(owner, name, function))
        with patch.object(sys, "argv", [script, *words]), clock.stage("other"):
            module.main()
    return {name: round(seconds, 3) for name, seconds in clock.seconds.most_common()}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure one command, and write the result."""
    argv = sys.argv[1:] if argv is None else list(argv)
    start = argv.index("--") if "--" in argv else len(argv)
    parser = paired.make_parser("stages", "Seconds of the stages of a command.")
    parser.usage = "%(prog)s [options] -- SCRIPT [options of the script]"
    options = parser.parse(argv[:start])
    script, *words = argv[start + 1 :] or parser.error("give a command after --")
    stages = measure(script, words)
    total = sum(stages.values())
    for name, seconds in stages.items():
        print(f"{seconds:9.2f} s  {100 * seconds / total:5.1f} %  {name}")
    command = re.sub(r"[^\s=]*/", "", " ".join([script, *words]))  # without the user's folders
    paired.write({"command": command, "stages": stages}, options)


if __name__ == "__main__":
    run_script(main)
