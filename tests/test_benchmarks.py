"""The benchmarks run: each with --tiny, as its docstring says it is called."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scripts import run_in_process
from synthetic import write_dataset

from benchmarks import closed_form
from models import build_model


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


def test_the_closed_form_table_has_the_scores_of_train_and_test(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", "toy", count=40)
    network = [
        "--dataset",
        "toy",
        "--data_dir",
        str(tmp_path / "data"),
        "--backbone",
        "resnet_small",
        "--device",
        "cpu",
    ]
    weights = ["--weights", str(tmp_path / "w.pth")]
    torch.manual_seed(3)
    torch.save(build_model("resnet_small").base_model.state_dict(), tmp_path / "w.pth")
    assert closed_form.main([*network, *weights, "--dims", "12", "--out_dir", str(tmp_path / "deep" / "er")]) == 0
    found = json.loads((tmp_path / "deep" / "er" / "closed_form_toy_32px_resnet_small.json").read_text())["rows"]
    assert len(found) == 6 * 2 * 4  # poolings, mirror image, heads

    def row(**wanted: object) -> dict:
        (one,) = [one for one in found if wanted.items() <= one.items()]
        return one

    names = ("recall@1", "recall@2", "recall@4", "recall@8", "nmi")
    given = ["--head_init", "whiten", "--low_dim", "12", "--layers", "layer2,layer3", "--pool", "gem", "--flip_eval"]
    run = ["--n_epoch", "0", "--batch_size", "4", "--n_cluster", "4", "--checkpoint_dir", str(tmp_path)]
    assert run_in_process("train.py", *network, *weights, *given, *run, "--model_name", "m").code == 0
    trained = json.loads((tmp_path / "m" / "metrics.jsonl").read_text())
    ours = row(pooling="gem of layer2 + gem of layer3", flip_eval=True, head="whiten 0.5", dimension=12)
    assert [ours[name] for name in names] == pytest.approx([trained[name] for name in names])
    striped = row(pooling="gem of layer2 in 3 stripes + gem of layer3", flip_eval=True, head="whiten 0.7", dimension=12)
    more = ["--stripes", "3,1", "--whiten_power", "0.7", "--model_name", "s"]
    assert run_in_process("train.py", *network, *weights, *given, *run, *more).code == 0
    trained = json.loads((tmp_path / "s" / "metrics.jsonl").read_text())
    assert [striped[name] for name in names] == pytest.approx([trained[name] for name in names])
    assert run_in_process("test.py", *network, *weights, "--json", tmp_path / "frozen.json").code == 0
    frozen = json.loads((tmp_path / "frozen.json").read_text())
    ours = row(pooling="avg", flip_eval=False, head="frozen")
    assert [ours[name] for name in names] == pytest.approx([frozen[name] for name in names])
    lines = (tmp_path / "deep" / "er" / "closed_form_toy_32px_resnet_small.md").read_text().splitlines()
    assert lines[0] == "| pooled | mirror average | frozen | pca, 12-d | whiten 0.5, 12-d | whiten 0.7, 12-d |"
    assert len(lines) == 2 + 12
    cell = f"{100 * frozen['recall@1']:.1f} / {100 * frozen['nmi']:.1f}"
    assert lines[2].startswith(f"| avg |  | {cell} |")
