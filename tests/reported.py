"""Folders of runs, made without training, and the pages about them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from scripts import run_in_process
from synthetic import write_dataset, write_dataset_by_chance

from datasets.arrays import load_split
from models import build_model

HOSTILE = '<img src=x onerror="document.title=1">'
SMALL = ("--device=cpu", "--queries=3", "--neighbors=4", "--clusters=3", "--map_points=40")
METRICS = [
    {"epoch": 1, "loss": 2.0, "metric_loss": 1.5, "recall@1": 0.5, "recall@2": 0.625, "nmi": 0.25},
    {"epoch": 2, "loss": 1.0, "metric_loss": 0.5, "recall@1": 0.375, "recall@2": 0.75, "nmi": 0.5},
]


def write_run(folder: Path, data_dir: Path, dataset: str = "tiny", **changed: object) -> None:
    """Write the folder of a run of two epochs, with some of its options changed."""
    config = {"dataset": dataset, "data_dir": str(data_dir), "backbone": "resnet_small"}
    config |= {"method": "cbswr", "recon": 0.001, "lr": 0.05, "n_epoch": 2} | changed
    torch.manual_seed(0)
    model = build_model("resnet_small", n_cluster=4, low_dim=16)
    halves = ("training", "validation")
    data = {half: load_split(data_dir, dataset, half).fingerprint() for half in halves}
    folder.mkdir()
    for name, epoch in (("last.pth", 2), ("best.pth", 1)):
        content = {"model": model.state_dict(), "epoch": epoch, "config": config, "data": data}
        torch.save(content, folder / name)
    (folder / "config.json").write_text(json.dumps(config))
    write_metrics(folder, METRICS)


def write_metrics(folder: Path, rows: list[dict]) -> None:
    """Write the metrics of a run."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def report(*argv: object, out: Path) -> tuple[str, str]:
    """Return the page that report.py makes, and what it prints."""
    done = run_in_process("report.py", *argv, *SMALL, "--out", out)
    assert (done.code, done.err) == (0, ""), done
    return out.read_text(encoding="utf-8"), done.out


class Reported:
    """Runs in a folder, and the pages about them by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = write_dataset_by_chance(folder / "data")
        bare = write_dataset(folder / "bare", dataset="bare")
        for file in (bare / "bare").glob("*_label.npy"):
            np.save(file, np.full(24, -1))
        write_run(folder / "run", self.data)
        write_run(folder / "other", self.data, lr=0.1)
        write_run(folder / "unlabeled", bare, dataset="bare")
        write_metrics(folder / "unlabeled", [{"epoch": 1, "loss": 2.0}])
        hostile = {"<b>bold</b>": "</script><script>document.title=2</script>", "lr": "$$x$$"}
        write_run(folder / HOSTILE, self.data, **hostile)

    def page(self, name: str) -> Path:
        """Return the page about a run, about "two" runs, or about the "hostile" run."""
        path = self.folder / f"{name}.html"
        if not path.exists():
            runs = {"two": ["run", "other"], "hostile": [HOSTILE]}.get(name, [name])
            report(*(self.folder / run for run in runs), out=path)
        return path

    def text(self, name: str) -> str:
        """Return the HTML of a page."""
        return self.page(name).read_text(encoding="utf-8")
