"""benchmarks/: each runs with --tiny, and the tables of the page are those of the figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from synthetic import write_dataset
from training import options

from benchmarks import (
    decode,
    full_run,
    index,
    inference,
    kmeans,
    recall,
    scale,
    stages,
    tables,
    train_step,
)
from models import CBSwR

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("benchmark", "ways"),
    [
        (recall, ["ours", "faiss IndexFlatL2, k=9"]),
        (kmeans, ["faiss, 10 starts", "sklearn, 10 starts"]),
        pytest.param(scale, list(scale.WAYS), marks=pytest.mark.slow),
        pytest.param(index, ["exact", "ivf, nprobe 16"], marks=pytest.mark.slow),
        (inference, ["PyTorch, fp32", "ONNX Runtime, fp32"]),
        (decode, ["this project", "Pillow, torchvision's Resize"]),
        pytest.param(train_step, ["ours, fp32", "ours, bf16"], marks=pytest.mark.slow),
    ],
)
def test_a_tiny_run(benchmark, ways, tmp_path: Path, capsys):
    out = tmp_path / "deeper" / "out.json"
    benchmark.main(["--tiny", "--repeats", "2", "--out", str(out)])
    result = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == result
    assert result["machine"]["cores"] >= 1 and result["repeats"] == 2
    timed = [case["ways"] for case in result.values() if isinstance(case, dict) and "ways" in case]
    for case in timed:
        assert set(ways) <= set(case) and all(len(way["all_s"]) == 2 for way in case.values())
    assert bool(timed) == bool(ways)


def test_the_stages_of_a_command(tmp_path, capsys):
    data = write_dataset(tmp_path / "data")
    words = options(data, tmp_path, recipe="best", low_dim=None, min_images=0)
    out = tmp_path / "out.json"
    stages.main(["--out", str(out), "--", "train.py", *words])
    measured = json.loads(out.read_text())["stages"]
    assert {"input", "features, network", "head", "losses", "k-means", "scores"} <= set(measured)
    assert "choice of the start" in measured
    assert {"training, network forward", "training, backward", "checkpoint"} <= set(measured)
    assert all(seconds >= 0 for seconds in measured.values())
    assert "%  training, backward" in capsys.readouterr().out
    assert CBSwR.maps.__name__ == "maps" and torch.Tensor.backward.__name__ == "backward"


@pytest.mark.slow
def test_a_full_run(tmp_path):
    data = write_dataset(tmp_path / "data")
    out = tmp_path / "out.json"
    words = ["--dataset=tiny", f"--data_dir={data}", "--image_size=32", "--n_epoch=2"]
    words.append("--recipes=paper")
    full_run.main(["--tiny", "--repeats=1", "--out", str(out), *words])
    for precision in ("bf16", "fp32"):
        measured = json.loads(out.read_text())[f"recipe paper, resnet_small, {precision}"]
        assert measured["epochs"] == 2 and 0 < measured["share_of_peak"] < 1
        assert sum(measured["parts"].values()) < measured["seconds"]
        assert "training, backward" in measured["stages_of_an_epoch"]


def test_the_clock_counts_the_innermost_stage(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr("benchmarks.stages.time.perf_counter", lambda: next(now))
    clock = stages.Clock()
    with clock.stage("outer"):
        clock.timed("inner", lambda: None)()
        steps = clock.waited("steps", lambda: [1, 2])()
        assert list(steps) == [1, 2]
    assert clock.seconds == {"other": 1, "outer": 5, "inner": 1, "steps": 3}


def test_the_tables_of_the_page_are_those_of_the_figures():
    assert tables.main(["--check"]) == 0


def test_a_table_is_put_between_its_markers():
    page = "a\n<!-- speed -->\nold\n<!-- /speed -->\nb\n"
    placed = tables.placed(page, "speed", [["x", "y"], ["1", "2"]])
    table = "| x | y |\n|---|---|\n| 1 | 2 |\n"
    assert placed == f"a\n<!-- speed -->\n{table}<!-- /speed -->\nb\n"
    with pytest.raises(ValueError, match="are missing; put them back"):
        tables.placed("no markers", "speed", [["x"]])
