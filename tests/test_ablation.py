"""benchmarks/ablation.py: runs that are kept, resumed and scored, and a table whose figures are theirs."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scripts import run_in_process
from synthetic import write_dataset_by_chance

from benchmarks import ablation
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = ("--weights=none", "--device=cpu", "--batch_size=8", "--n_cluster=4", "--low_dim=16", "--lr=0.05")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The test half has labels by chance: scores in the middle, other ones for other seeds."""
    return write_dataset_by_chance(tmp_path_factory.mktemp("data"))


@pytest.fixture
def table(data, tmp_path, monkeypatch):
    """Runs the command in this process; gives the scripts that it called and the files that it wrote."""

    def run(*methods: str, seeds=(1, 2), more=(), epochs=1, before=(), name="tab") -> SimpleNamespace:
        called = []

        def call(script, *argv):
            called.append((script, argv))
            done = run_in_process(script, *argv)
            assert done.code == 0, done.err

        monkeypatch.setattr(ablation, "call", call)
        ablation.main(["--dataset=tiny", "--backbone=resnet_small", "--name=tab", "--methods", *methods, "--seeds",
                       *map(str, seeds), f"--checkpoint_dir={tmp_path / 'runs'}", f"--out={tmp_path / 'out'}",
                       *before, "--", *TINY, f"--data_dir={data}", f"--n_epoch={epochs}", *more])  # fmt: skip
        files = {kind: (tmp_path / "out" / f"{name}.{kind}").read_text() for kind in ("md", "csv", "tex", "json")}
        return SimpleNamespace(called=called, **files)

    return run


def test_the_table_is_that_of_its_runs_and_is_not_made_twice(table, data, tmp_path, capsys):
    made = table("frozen", "untrained", "isif")
    assert [script for script, _ in made.called] == ["test.py", *["train.py", "test.py"] * 2] * 2
    assert made.md == capsys.readouterr().out[-len(made.md) :]
    runs = json.loads(made.json)["runs"]
    assert [(run["seed"], run["method"]) for run in runs[:5]] == [
        (1, "frozen"), (1, "untrained"), (1, "isif"), (2, "frozen"), (2, "untrained"),
    ]  # fmt: skip
    assert runs[2]["config"]["metric_loss"] == "instance" and runs[2]["epochs"][0]["loss"] != 0
    assert str(tmp_path) not in made.json + made.md + made.csv + made.tex and str(data) not in made.json
    values = {m: np.array([r["scores"]["recall@1"] for r in runs if r["method"] == m]) * 100 for m in
              ("frozen", "untrained", "isif")}  # fmt: skip
    assert max(v.std() for v in values.values()) > 0
    rows = {row["method"]: row for row in csv.DictReader(made.csv.splitlines())}
    best = f"{max(v.mean() for v in values.values()):.1f}"
    lines = dict(zip(values, made.md.splitlines()[2:], strict=False))
    latex = dict(zip(values, made.tex.splitlines()[6:], strict=False))
    for method, found in values.items():
        assert float(rows[method]["recall@1_mean"]) == pytest.approx(found.mean(), abs=1e-4)
        assert float(rows[method]["recall@1_std"]) == pytest.approx(found.std(ddof=1), abs=1e-4)
        assert rows[method]["n"] == "2"
        shown = f"{found.mean():.1f} ± {found.std(ddof=1):.1f}"
        is_best = f"{found.mean():.1f}" == best
        assert lines[method].split(" | ")[1] == (f"**{shown}**" if is_best else shown)
        shown = shown.replace("±", r"$\pm$")
        assert latex[method].split(" & ")[1] == (rf"\textbf{{{shown}}}" if is_best else shown)
    assert (tmp_path / "out" / "tab.png").read_bytes().startswith(b"\x89PNG")
    assert "n = 2 seeds (1, 2)" in made.md and made.tex.count(r"\midrule") == 1
    again = table("frozen", "untrained", "isif")
    assert again.called == []
    assert (again.md, again.csv, again.tex, again.json) == (made.md, made.csv, made.tex, made.json)


def test_the_recipe_its_start_and_the_rivals(table):
    others = ("stml", "deepcluster", "best_contextual", "multi_similarity", "best_labels")
    batch = "--batch_size=20"  # groups of 4 and of 5
    made = table("frozen", "start", "best", "best_own", *others, seeds=[1], more=["--flip_eval", batch])
    runs = {run["method"]: run for run in json.loads(made.json)["runs"]}
    assert all(run["scores"]["flip_eval"] for run in runs.values())  # given for all alike
    assert (
        len(runs["best"]["epochs"]) == len(runs["best_own"]["epochs"]) == 1 and runs["start"]["epochs"][0]["epoch"] == 0
    )
    for method, run in runs.items():
        if method != "frozen":
            assert run["scores"]["recall@1"] == run["epochs"][-1]["recall@1"], method
    assert runs["best"]["config"]["recipe"] == "best" and runs["stml"]["config"]["baseline"] == "stml"
    assert "WITH LABELS: Multi-Similarity" in made.md
    with_labels = runs["best_labels"]["config"]
    assert (with_labels["recipe"], with_labels["metric_loss"]) == ("best", "multi_similarity")


def test_fewer_dimensions_of_the_same_runs(table, tmp_path):
    table("start", "best", seeds=[1])
    made = table("start", "best", seeds=[1], before=["--dim=5"], name="tab_5d")
    assert [script for script, _ in made.called] == ["test.py"] * 2  # nothing is trained again
    assert {run["scores"]["dimension"] for run in json.loads(made.json)["runs"]} == {5} and "5-d" in made.md
    with pytest.raises(UserError, match="--dim 5: the numbers of cbs have no order"):
        table("best", "cbs", seeds=[1], before=["--dim=5"])


def test_an_interrupted_run_is_resumed_and_scored_anew(table, tmp_path):
    whole = table("cbs", seeds=[5], epochs=2)
    folder = tmp_path / "runs" / "tab"
    folder.rename(tmp_path / "whole")
    table("cbs", seeds=[5], epochs=1)  # as if it had been stopped there
    resumed = table("cbs", seeds=[5], epochs=2)
    assert [(script, argv[0].partition("=")[0]) for script, argv in resumed.called] == [
        ("train.py", "--resume"), ("test.py", "--checkpoint_path"),
    ]  # fmt: skip
    assert resumed.csv == whole.csv and "±" not in resumed.md.split("\n\n")[0]
    with pytest.raises(UserError, match="has 2 epochs, more than --n_epoch 1"):
        table("cbs", seeds=[5], epochs=1)


def test_runs_of_other_options_are_not_mixed_in(table, tmp_path):
    table("frozen", "cbs", seeds=[5])
    with pytest.raises(UserError, match=r"frozen_seed5: holds a run with --image_size None, not 32"):
        table("frozen", seeds=[5], more=["--image_size=32"])
    with pytest.raises(UserError, match=r"cbs_seed5: holds a run with --lr 0.05, not 0.02"):
        table("cbs", seeds=[5], more=["--lr=0.02"])
    assert table("cbs", seeds=[5], more=["--workers=0"]).called == []  # changes speed alone
    config = tmp_path / "runs" / "tab" / "cbs_seed5" / "config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "val_classes"}))
    assert table("cbs", seeds=[5]).called == []  # made before the option was there: it had its default
    with pytest.raises(UserError, match="--val_classes 0, not 2"):
        table("cbs", seeds=[5], more=["--val_classes=2"])


@pytest.mark.parametrize("more, seeds, words", [
    (["--seed=3"], [1], "--seed after --: is set by the table"),
    (["--baseline", "isif"], [1], "--baseline after --"),
    ([], [1, 1], "a seed is there twice"),
])  # fmt: skip
def test_refused_before_any_work(table, tmp_path, more, seeds, words):
    with pytest.raises(UserError, match=words):
        table("cbs", seeds=seeds, more=more)
    assert not (tmp_path / "runs").exists()


def test_an_unknown_option_ends_it_before_any_work(table, tmp_path, capsys):
    with pytest.raises(SystemExit):
        table("frozen", "cbs", more=["--lrr=1"])
    assert "did you mean --lr?" in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_a_script_that_fails_ends_it_with_its_status(capfd):
    with pytest.raises(SystemExit) as ended:
        ablation.call("test.py", "--nothing")
    assert ended.value.code == 2
    assert "test.py ended with status 2; the same command goes on from there" in capfd.readouterr().err
