"""experiments/: runs that are kept, resumed and scored, and tables whose figures are theirs."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from photos import make_photos, write_embeddings
from scripts import ROOT, run_in_process
from synthetic import shapes, write_dataset_by_chance, write_split

from experiments import clusters, compare, duplicates, few_images, runs, sensitivity, table
from models import build_model
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = ("--weights=none", "--device=cpu", "--low_dim=8", "--workers=0")
NETWORK = ("--backbone", "resnet_small", "--device", "cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A data set whose scores lie in the middle, and differ by seed."""
    return write_dataset_by_chance(tmp_path_factory.mktemp("data"))


@pytest.fixture
def make(data, tmp_path, monkeypatch):
    """Run an experiment in this process; return the scripts that it called, and its files."""

    def run(*words: str, train=(), script=table, stem="tiny_resnet_small_t") -> SimpleNamespace:
        called = []

        def call(name: str, *argv: str) -> None:
            called.append((name, argv))
            outcome = run_in_process(name, *argv)
            if outcome.code:
                raise runs.RunFailedError(outcome.err)

        monkeypatch.setattr(runs, "call", call)
        common = ["--backbone=resnet_small", "--name=t", f"--out_dir={tmp_path / 'out'}"]
        common.append(f"--checkpoint_dir={tmp_path / 'runs'}")
        epochs = ["--n_epoch=1", f"--data_dir={data}"]
        script.main(["--dataset", "tiny", *common, *words, "--", *TINY, *epochs, *train])
        files = {path.suffix[1:]: path for path in (tmp_path / "out").glob(f"{stem}.*")}
        if png := files.pop("png", None):
            assert png.read_bytes().startswith(b"\x89PNG")
        texts = {kind: path.read_text(encoding="utf-8") for kind, path in files.items()}
        return SimpleNamespace(called=called, texts=texts, runs=json.loads(texts["json"])["runs"])

    return run


# ------------------------------------------------------------------------------------- the table


def test_the_table_is_that_of_its_runs_and_is_not_made_twice(make, data, tmp_path, capsys):
    rows = ("frozen", "untrained", "isif")
    words = ("--rows", *rows, "--seeds", "1", "2")
    made = make(*words)
    assert [name for name, _ in made.called] == ["test.py", *["train.py", "test.py"] * 2] * 2
    assert capsys.readouterr().out.endswith(made.texts["md"])
    assert [(run["seed"], run["row"]) for run in made.runs[2:4]] == [(1, "isif"), (2, "frozen")]
    assert str(tmp_path) not in str(made.texts) and str(data) not in str(made.texts)
    isif = made.runs[2]
    assert isif["options"]["softmax_over"] == "images" and isif["last_epoch"]["loss"] > 0
    assert {"cpu", "threads", "torch"} < set(isif["machine"])
    percents = {}
    for row in rows:
        scores = [run["scores"] for run in made.runs if run["row"] == row]
        percents[row] = 100 * np.array([score["recall@1"] for score in scores])
    best = f"{max(values.mean() for values in percents.values()):.1f}"
    lines = csv.DictReader(made.texts["csv"].splitlines())
    markdown = made.texts["md"].splitlines()[2:]
    latex = made.texts["tex"].splitlines()[6:]
    for line, text, tex in zip(lines, markdown, latex, strict=False):
        values = percents[line["method"]]
        assert float(line["recall@1_mean"]) == pytest.approx(values.mean(), abs=1e-4)
        assert float(line["recall@1_std"]) == pytest.approx(values.std(ddof=1), abs=1e-4)
        shown = f"{values.mean():.1f} ± {values.std(ddof=1):.1f}"
        bold = shown.startswith(f"{best} ")
        assert text.split(" | ")[1] == (f"**{shown}**" if bold else shown)
        shown = shown.replace("±", r"$\pm$")
        assert tex.split(" & ")[1] == (rf"\textbf{{{shown}}}" if bold else shown)
    assert "n = 2 seeds (1, 2)" in made.texts["md"]
    assert "NMI and AMI by 4 clusters, faiss, best of" in made.texts["md"]
    again = make(*words)
    assert again.called == [] and again.texts == made.texts


def test_every_epoch_is_kept_and_drawn(make, tmp_path):
    made = make("--rows", "frozen", "paper", "--seeds", "1", train=["--n_epoch=2"])
    frozen, paper = made.runs
    assert frozen["epochs"] == [] and [row["epoch"] for row in paper["epochs"]] == [1, 2]
    assert paper["epochs"][-1]["recall@1"] == pytest.approx(paper["scores"]["recall@1"])
    drawn = tmp_path / "out" / "tiny_resnet_small_t_epochs.png"
    assert drawn.read_bytes().startswith(b"\x89PNG")


def test_held_out_classes_are_shown(make):
    made = make("--rows", "untrained", "--seeds", "1", train=["--val_classes=2"])
    (line,) = csv.DictReader(made.texts["csv"].splitlines())
    (run,) = made.runs
    for name in ("val_recall@1", "val_nmi"):
        assert float(line[f"{name}_mean"]) == pytest.approx(100 * run["last_epoch"][name], abs=1e-4)
    assert "| held-out R@1 | held-out NMI |" in made.texts["md"]


def test_rows_by_recipe_and_by_options(make):
    by_options = "STML, cold: --recipe stml --sigma 0.5 --batch_size 10"
    made = make("--rows", "start", "best", "--row", by_options, "--seeds=1")
    start, best, stml = made.runs
    assert start["last_epoch"]["epoch"] == 0 and best["last_epoch"]["epoch"] == 1
    assert best["options"]["recipe"] == "best" and best["scores"]["flip_eval"]
    assert stml["options"]["sigma"] == 0.5 and stml["row"] == "STML_cold"
    for run in made.runs:
        assert run["scores"]["recall@1"] == run["last_epoch"]["recall@1"], run["row"]
    assert "| recipe best | " in made.texts["md"] and "| STML, cold | " in made.texts["md"]
    assert "±" not in made.texts["md"] and "1 seed (1)" in made.texts["md"]
    short = make("--rows", "start", "best", "--seeds=1", "--dim=5", stem="tiny_resnet_small_t_5d")
    assert [name for name, _ in short.called] == ["test.py"] * 2  # nothing is trained again
    assert {run["scores"]["dimension"] for run in short.runs} == {5}
    assert short.texts["md"].splitlines()[-1].startswith("tiny, 32 px, resnet_small, 5-d, mirror")


def test_several_data_sets_and_a_run_that_fails(make, data, tmp_path):
    words = ("--dataset", "none", "tiny", "--image_size=32", "--rows", "frozen", "untrained")
    with pytest.raises(UserError, match=r"^2 runs failed, .*none_.*/frozen_seed1 \(") as failed:
        make(*words, "--seeds=1")
    assert "validation_none_32resized_img.npy: no such file" in str(failed.value)
    lines = (tmp_path / "out" / "t.md").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("| data set | px | backbone | frozen backbone, pooled features | ")
    assert lines[2].startswith("| tiny | 32 | resnet_small | ") and lines[3:] == ["", lines[-1]]
    assert len(list((tmp_path / "runs" / "tiny_32px_resnet_small_t").iterdir())) == 2


def test_an_interrupted_run_is_resumed_and_scored_anew(make, tmp_path):
    words = ("--rows", "cbs", "--seeds=5")
    whole = make(*words, train=["--n_epoch=2"])
    (tmp_path / "runs").rename(tmp_path / "whole")
    make(*words)
    resumed = make(*words, train=["--n_epoch=2"])
    assert [(name, argv[0].partition("=")[0]) for name, argv in resumed.called] == [
        ("train.py", "--resume"),
        ("test.py", "--dataset"),
    ]
    assert resumed.texts["csv"] == whole.texts["csv"]
    with pytest.raises(UserError, match="has 2 epochs, not 1"):
        make(*words)


def test_runs_of_other_options_are_not_mixed_in(make):
    words = ("--rows", "cbs", "--seeds=5")
    make(*words, train=["--schedule=cosine"])
    for change, text in (("--lr=0.02", "lr 0.001, not 0.02"), ("--n_epoch=2", "n_epoch 1, not 2")):
        with pytest.raises(UserError, match=f"cbs_seed5: holds a run with {text}"):
            make(*words, train=["--schedule=cosine", change])
    assert make(*words, train=["--schedule=cosine", "--test_batch=7"]).called == []


def test_a_run_has_the_default_of_an_option_that_is_younger(make, tmp_path):
    words = ("--rows", "cbs", "--seeds=5")
    make(*words)
    (plan,) = tmp_path.glob("runs/*/*/plan.json")
    options = json.loads(plan.read_text())
    del options["crop_area"]
    plan.write_text(json.dumps(options))
    with pytest.raises(UserError, match=r"holds a run with crop_area None, not 0\.5"):
        make(*words, train=["--crop_area=0.5"])
    assert make(*words).called == []


@pytest.mark.parametrize(
    ("words", "train", "message"),
    [
        ([], ["--seed=3"], "--seed=3: not among the options of train.py"),
        ([], ["--recipe", "isif"], "--recipe: not among"),
        (["--row", "x: --backbone resnet18"], [], "--backbone: not among"),
        (["--row", "no options"], [], 'expected "TITLE: OPTIONS'),
        (["--rows", "bset"], [], "did you mean best"),
        (["--rows", "best", "cbs", "--dim=5"], [], "--dim goes with heads in closed form"),
        (["--rows", "cbs"], ["--lrr=1"], "did you mean --lr"),
    ],
)
def test_refused_before_any_work(make, tmp_path, capsys, words, train, message):
    with pytest.raises((UserError, SystemExit)) as refused:
        make(*words, train=train)
    assert message in str(refused.value) + capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------ other rooms


def test_the_study_of_an_option_is_that_of_its_runs(make):
    words = ("--recipe=cbs", "--vary=n_epoch=0,1", "--vary=low_dim=4", "--seeds=3")
    made = make(*words, script=sensitivity)
    lines = list(csv.DictReader(made.texts["csv"].splitlines()))
    places = [(line["option"], line["value"]) for line in lines]
    assert places == [("n_epoch", "0"), ("n_epoch", "1"), ("low_dim", "4")]
    for (option, value), line, run in zip(places, lines, made.runs, strict=True):
        assert run["options"][option] == int(value)
        assert float(line["nmi_mean"]) == pytest.approx(100 * run["scores"]["nmi"], abs=1e-4)
        assert f"| {option} | {value} | " in made.texts["md"]
    with pytest.raises(SystemExit):
        make("--vary=n_epoch", script=sensitivity)


def blurred(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images of ten classes that a network cannot tell apart wholly."""
    images, labels = shapes(count, range(10), 32, seed)
    noise = np.random.default_rng(seed).integers(0, 256, images.shape)
    return (0.3 * images + 0.7 * noise).astype(np.uint8), labels


def test_few_images_choose_and_score_as_train_does(tmp_path):
    for half, seed in (("training", 0), ("validation", 1)):
        write_split(tmp_path / "data", "toy", half, *blurred(150, seed))
    torch.manual_seed(3)
    torch.save(build_model("resnet_small").base_model.state_dict(), tmp_path / "w.pth")
    network = ("--data_dir", str(tmp_path / "data"), *NETWORK)
    network += ("--weights", str(tmp_path / "w.pth"))
    out = tmp_path / "deeper" / "out"
    words = ("--dataset", "toy", "--sizes", "50", "120", "--subsets", "2", "--out_dir", str(out))
    few_images.main([*network, *words])
    result = json.loads((out / "few_images_32px_resnet_small.json").read_text())
    counts = [(row["images"], row["subset"]) for row in result["rows"]]
    assert counts == [(50, 0), (50, 1), (120, 0), (120, 1), (150, 0)]
    assert [row["chosen"] for row in result["rows"][:2]] == ["frozen features"] * 2
    correlations = [row["rank_correlation"] for row in result["rows"]]
    assert correlations[:2] == [None, None] and all(-1 <= c <= 1 for c in correlations[2:])

    words = ("--recipe=best", "--n_epoch=0", "--model_name=run", "--checkpoint_dir", tmp_path)
    words += ("--head_init=whiten", "--whiten_power=0.6")
    run = run_in_process("train.py", "--dataset=toy", *network, *words)
    assert run.code == 0, run.err
    trained = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    for name in ("recall@1", "nmi"):
        assert result["rows"][-1]["fixed"][name] == pytest.approx(100 * trained[name])
    words = ("--layers=last2", "--pool=gem", "--flip_eval", "--json", tmp_path / "frozen.json")
    assert run_in_process("test.py", "--dataset=toy", *network, *words).code == 0
    frozen = json.loads((tmp_path / "frozen.json").read_text())
    for name in ("recall@1", "nmi"):
        assert result["rows"][0]["frozen"][name] == pytest.approx(100 * frozen[name])
    lines = (out / "few_images_32px_resnet_small.md").read_text().splitlines()
    assert lines[0].startswith("| data set | images to fit to | frozen | chosen start ")
    cell = f"{100 * frozen['recall@1']:.1f} / {100 * frozen['nmi']:.1f}"
    assert len(lines) == 5 and lines[2].startswith(f"| toy | 50 | {cell} | ")

    photos = ("--photos", "toy", "--sizes", "50", "--subsets", "1", "--out_dir", str(out))
    few_images.main([*network, *photos])
    result = json.loads((out / "few_images_32px_resnet_small.json").read_text())
    assert [row["images"] for row in result["rows"]] == [50, 300]  # of both halves


def test_scores_of_sets_with_too_many_classes_for_nmi():
    rows = [{"frozen": {"recall@1": 40.0}}, {"frozen": {"recall@1": 50.0}}]
    assert few_images.cell(rows, "frozen") == "45.0"


def test_signs_in_titles():
    texts = [["method", "R@1"], ["a & b | 5 %", "9.0"]]
    assert r"a \& b | 5 \% & 9.0 \\" in table.latex(texts, "")
    assert r"| a & b \| 5 % | 9.0 |" in table.markdown(texts, "")


def test_a_script_that_fails_is_told():
    with pytest.raises(runs.RunFailedError, match=r"test\.py ended with status 2"):
        runs.call("test.py", "--nothing")


@pytest.mark.slow
def test_a_request_to_stop_reaches_the_training(data, tmp_path):
    words = ["--dataset=tiny", "--backbone=resnet_small", "--rows=cbs", f"--out_dir={tmp_path}"]
    words += [f"--checkpoint_dir={tmp_path}", "--", *TINY, f"--data_dir={data}"]
    command = [sys.executable, "experiments/table.py", *words, "--n_epoch=100000"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    metrics = tmp_path / "tiny_resnet_small_table" / "cbs_seed1" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and b"Traceback" not in errors, errors
    before = metrics.read_text()
    time.sleep(1)
    assert before and metrics.read_text() == before  # the training has ended, too


# ---------------------------------------------------------------- groups of one's own images


def test_duplicates_are_scored_by_hand(tmp_path):
    photos = make_photos(tmp_path / "photos")
    words = ("--backbone", "resnet_small", "--weights", "none", "--image_size", "40")
    words += ("--similarities", "0.5", "0.9999", "--out_dir", str(tmp_path))
    duplicates.main(["--images", str(photos), *words])
    result = json.loads((tmp_path / "duplicates_resnet_small.json").read_text())
    loose, strict = result["rows"]
    assert result["photos"] == 12 and loose["mirrored"] == 100 >= strict["mirrored"]
    assert strict["precision"] >= loose["precision"] > 0
    rows = near_copies()
    assert duplicates.scores_at(rows, 0.9999) == pytest.approx(by_hand(rows, 0.9999))
    assert len((tmp_path / "duplicates_resnet_small.md").read_text().splitlines()) == 4


def near_copies() -> np.ndarray:
    """Return random rows of 12 photos and copies of each kind that are near them."""
    rows = np.random.default_rng(0).standard_normal((1 + len(duplicates.CHANGES), 12, 3))
    rows[1:] = rows[0] + 0.01 * rows[1:]
    return rows / np.linalg.norm(rows, axis=2, keepdims=True)


def by_hand(rows: np.ndarray, similarity: float) -> dict[str, float]:
    right, found, recalls = 0, 0, {}
    for name, copies in zip(duplicates.CHANGES, rows[1:], strict=True):
        own = [float(a @ b) >= similarity for a, b in zip(rows[0], copies, strict=True)]
        recalls[name] = 100 * sum(own) / 12
        right += sum(own)
        found += sum(float(a @ b) >= similarity for a in rows[0] for b in copies)
    return recalls | {"precision": 100 * right / found}


def test_ways_to_choose_the_number_of_clusters(tmp_path):
    generator = np.random.default_rng(0)
    classes = np.repeat(np.arange(8), 30)
    rows = np.eye(8)[classes] + 0.1 * generator.standard_normal((240, 8))
    listed = [(f"{row}.jpg", str(c), "", "", "") for row, c in enumerate(classes)]
    write_embeddings(tmp_path / "e.npy", rows, listed)
    clusters.main(["--embeddings", str(tmp_path / "e.npy"), "--out_dir", str(tmp_path)])
    (result,) = json.loads((tmp_path / "clusters.json").read_text())["rows"]
    chosen = result["tried"][str(result["chosen"])]
    assert 6 <= result["chosen"] <= 16 and chosen["ami"] > 0.8
    assert "| `e`, 240 | 8 | " in (tmp_path / "clusters.md").read_text()


@pytest.mark.parametrize(("after", "status"), [(0.3, 0), (0.1, 1)])
def test_scores_of_two_files_are_compared(tmp_path, monkeypatch, capsys, after, status):
    scores = {"recall@1": 0.2, "nmi": 0.4, "dataset": "toy", "classes": 4}
    (tmp_path / "before").write_text(json.dumps(scores))
    (tmp_path / "after").write_text(json.dumps(scores | {"recall@1": after, "nmi": 0.5}))
    words = ["compare.py", str(tmp_path / "before"), str(tmp_path / "after")]
    monkeypatch.setattr("sys.argv", words)
    assert compare.main() == status
    assert f"R@1 20.0 -> {100 * after:.1f}" in capsys.readouterr().out
