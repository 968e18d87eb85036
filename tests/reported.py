"""Runs of seconds and the pages about them, for the tests of the report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from scripts import run_in_process
from synthetic import write_dataset, write_dataset_by_chance
from training import execute, options

HOSTILE = '<img src=x onerror="document.title=1">'
SMALL = ("--device", "cpu", "--queries", 3, "--neighbours", 4, "--clusters", 3, "--map_points", 40)


def report(*argv: object, out: Path) -> tuple[str, str]:
    """The page that report.py makes, and what it prints."""
    done = run_in_process("report.py", *argv, *SMALL, "--out", out)
    assert (done.code, done.err) == (0, ""), done
    return out.read_text(encoding="utf-8"), done.out


class Reported:
    """A data set, runs in `folder`, and the pages about them by name."""

    def __init__(self, folder: Path) -> None:
        """Train for seconds; a second, untrained run, and copies that lack labels or have bad names."""
        self.folder = folder
        self.data = write_dataset_by_chance(folder / "data")
        self.pages: dict[str, Path] = {}
        for name, more, changed in (("run", ["--report"], {"n_epoch": 2}), ("other", [], {"n_epoch": 0, "lr": 0.1})):
            assert execute(*options(self.data, folder, model_name=name, **changed), *more).code == 0
        shutil.copytree(folder / "run", folder / HOSTILE)
        config = json.loads((folder / "run" / "config.json").read_text())
        config |= {"<b>bold</b>": "</script><script>document.title=2</script>", "model_name": HOSTILE, "lr": "$$x$$"}
        (folder / HOSTILE / "config.json").write_text(json.dumps(config))
        bare = write_dataset(folder / "bare", dataset="bare", count=24)
        for file in (bare / "bare").glob("*_label.npy"):
            np.save(file, np.full(24, -1))
        assert execute(*options(bare, folder, dataset="bare", model_name="unlabelled")).code == 0

    def page(self, name: str) -> Path:
        """The page about a run, or of "two" runs, or about the run with a hostile "name"."""
        if name not in self.pages:
            runs = {"two": ["run", "other"], "hostile": [HOSTILE]}.get(name, [name])
            self.pages[name] = self.folder / f"{name}.html"
            report(*(self.folder / run for run in runs), out=self.pages[name])
        return self.pages[name]

    def text(self, name: str) -> str:
        return self.page(name).read_text(encoding="utf-8")
