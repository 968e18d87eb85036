"""The benchmarks run: each with --tiny, as its docstring says it is called."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", ["recall", "kmeans", "growth", "train_step", "pre_process", "scaling"])
def test_tiny_run(name: str, root: Path, tmp_path: Path) -> None:
    out = tmp_path / "deeper" / f"{name}.json"
    command = [sys.executable, f"benchmarks/{name}.py", "--tiny", "--repeats", "1", "--out", str(out)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["machine"]["cores"] >= 1
    assert json.loads(done.stdout) == result


def test_tables_are_those_of_the_measured_figures(root: Path) -> None:
    done = subprocess.run([sys.executable, "benchmarks/tables.py", "--check"], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
