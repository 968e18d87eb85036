"""benchmarks/sensitivity.py: its figures are those of its runs, and nothing is run twice."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import pytest
from scripts import run_in_process
from synthetic import write_dataset_by_chance

from benchmarks import ablation, sensitivity
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = ("--weights=none", "--device=cpu", "--batch_size=8", "--n_cluster=4", "--low_dim=16", "--lr=0.05")


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Runs the command in this process; gives the scripts that it called and the files that it wrote."""
    data = write_dataset_by_chance(tmp_path / "data")

    def run(*vary: str, method="cbswr", seeds=(1,), more=()) -> SimpleNamespace:
        called = []

        def call(script, *argv):
            called.append(script)
            done = run_in_process(script, *argv)
            assert done.code == 0, done.err

        monkeypatch.setattr(ablation, "call", call)
        sensitivity.main(["--dataset=tiny", "--backbone=resnet_small", "--name=s", f"--method={method}",
                          *(f"--vary={one}" for one in vary), "--seeds", *map(str, seeds),
                          f"--checkpoint_dir={tmp_path / 'runs'}", f"--out={tmp_path / 'out'}",
                          "--", *TINY, f"--data_dir={data}", *more])  # fmt: skip
        files = {kind: (tmp_path / "out" / f"s.{kind}").read_text() for kind in ("md", "csv", "json")}
        assert (tmp_path / "out" / "s.png").read_bytes().startswith(b"\x89PNG")
        return SimpleNamespace(called=called, **files)

    return run


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_figures_are_those_of_the_runs(study, tmp_path):
    made = study("n_epoch=0,1,3", "low_dim=4,16", seeds=(1, 2), more=["--n_epoch=2"])
    runs = tmp_path / "runs" / "s"
    assert sorted(p.name for p in runs.iterdir()) == [
        f"cbswr_{name}_seed{seed}" for name in ("low_dim_16", "low_dim_4", "n_epoch_0", "n_epoch_3") for seed in (1, 2)
    ]
    lines = {(line["option"], line["value"]): line for line in csv.DictReader(made.csv.splitlines())}
    assert list(lines) == [("n_epoch", "0"), ("n_epoch", "1"), ("n_epoch", "3"), ("low_dim", "4"), ("low_dim", "16")]
    for (option, value), line in lines.items():
        folder = "n_epoch_3" if (option, value) == ("n_epoch", "1") else f"{option}_{value}"
        epoch = 0 if (option, value) == ("n_epoch", "1") else -1
        found = [100 * metrics(runs / f"cbswr_{folder}_seed{seed}")[epoch]["recall@1"] for seed in (1, 2)]
        assert float(line["recall@1_mean"]) == pytest.approx(sum(found) / 2, abs=1e-4)
        assert float(line["recall@1_std"]) == pytest.approx(abs(found[0] - found[1]) / 2**0.5, abs=1e-4)
        assert f"| {option} | {value} | {sum(found) / 2:.1f} ± " in made.md
    assert metrics(runs / "cbswr_low_dim_4_seed1")[-1]["epoch"] == 2
    again = study("n_epoch=0,1,3", "low_dim=4,16", seeds=(1, 2), more=["--n_epoch=2"])
    assert again.called == [] and (again.csv, again.md, again.json) == (made.csv, made.md, made.json)


def test_what_is_varied_stands_above_the_method(study, tmp_path):
    made = study("whiten_power=0.2,0.7", method="start")
    assert "recipe best, before training" in made.md and "±" not in made.md
    config = json.loads((tmp_path / "runs" / "s" / "start_whiten_power_0.2_seed1" / "config.json").read_text())
    assert (config["whiten_power"], config["n_epoch"], config["recipe"]) == (0.2, 0, "best")


@pytest.mark.parametrize("vary, words", [
    (["t"], "OPTION=VALUE"), (["t=1,1"], "different values"), (["t=1", "t=2"], "is there twice"),
    (["no_such=1"], "no_such"), (["t=warm"], "expected a number"),
])  # fmt: skip
def test_refused_before_any_work(study, tmp_path, capsys, vary, words):
    with pytest.raises(SystemExit):
        study(*vary)
    assert words in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_epochs_are_numbers_and_scored(study):
    with pytest.raises(UserError, match="whole numbers"):
        study("n_epoch=1,many")
    with pytest.raises(UserError, match="--interval 1"):
        study("n_epoch=1,2", more=["--interval=2"])
