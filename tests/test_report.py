"""report.py: what the page holds, read as text; what a browser makes of it is in test_report_browser.py."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reported import HOSTILE, report
from scripts import failed, run_in_process
from synthetic import write_dataset
from training import execute, options

from models import build_model
from reports import findings
from reports.curves import charts
from utils.runs import scalars

pytestmark = pytest.mark.usefixtures("one_thread")


def test_sections_scores_and_images_are_in_one_file(reported):
    page = reported.text("run")
    for name in ("settings", "curves", "retrieval-1", "clusters-1", "reconstructions-1", "map-1"):
        assert f'id="{name}"' in page
    rows = [json.loads(line) for line in (reported.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    for row in (rows[-1], max(rows, key=lambda row: row["recall@1"])):
        assert f"{100 * row['recall@1']:.2f}</td>" in page and f"{100 * row['nmi']:.2f}</td>" in page
    assert "as in training" in page and "NOT those of the run" not in page
    assert page.count('<figure class="tile right">') > 0 < page.count('<figure class="tile wrong">')
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page[: page.index("</footer>")])
    assert len(page) < 3 * 2**20


def test_the_page_says_what_the_best_epoch_was_chosen_on(reported, tmp_path):
    assert "best, chosen on test" in reported.text("run") and "the very images" in reported.text("run")
    shutil.copytree(reported.folder / "run", tmp_path / "held")
    rows = [json.loads(line) for line in (tmp_path / "held" / "metrics.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row |= {"recall@1": 0.5 + number, "recall@20": 0.75, "val_recall@1": 0.5 - number, "val_nmi": 0.5}
    (tmp_path / "held" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page, _ = report(tmp_path / "held", out=tmp_path / "page.html")
    assert "1 (best, chosen on held-out training classes)" in page and "the very images" not in page
    assert ">R@20, %</th>" in page and "75.00</td>" in page


def test_several_runs_are_compared(reported):
    page = reported.text("two")
    differing = page[page.index("Settings that differ") : page.index('id="curves"')]
    assert re.findall(r'<th scope="row">(\w+)</th>', differing) == ["lr", "model_name", "n_epoch", "report"]
    assert page.count('id="map-') == 2 and page.count("Images of ") == 4  # a heading and a link for each


def test_without_labels_nothing_is_framed(reported):
    page = reported.text("unlabelled")
    assert "has no labels" in page and "No scores" in page
    assert '<figure class="tile">' in page
    assert '<figure class="tile right">' not in page and '<figure class="tile wrong">' not in page


def test_names_and_values_are_only_text(reported):
    page = reported.text("hostile")
    assert HOSTILE not in page and "&lt;img src=x" in page
    assert "<b>bold</b>" not in page and "&lt;b&gt;bold" in page


def test_what_is_missing_is_said_and_the_rest_is_there(reported, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(reported.folder / "run", run)
    page, said = report(run, "--data_dir", tmp_path / "nowhere", out=tmp_path / "a.html")
    assert "give --data_dir" in page and "--data_dir" in said and 'id="curve-1-1"' in page
    (run / "last.pth").unlink()
    page, said = report(run, "--data_dir", reported.data, out=tmp_path / "b.html")
    assert "last.pth: no such file" in page and "last.pth" in said and 'id="curve-1-1"' in page
    (run / "metrics.jsonl").write_text('{"epoch": 1, "lo')
    (run / "config.json").unlink()
    page, said = report(run, "--checkpoint", "best.pth", "--data_dir", reported.data, out=tmp_path / "c.html")
    assert "metrics.jsonl cannot be read" in said and "config.json is missing" in said
    assert 'id="map-1"' in page and "chosen on the test half" in page


def test_other_data_than_in_training_is_told(reported, tmp_path):
    other = write_dataset(tmp_path / "data", count=24, seed=9)
    page, _ = report(reported.folder / "run", "--data_dir", other, out=tmp_path / "a.html")
    assert page.count("NOT those of the run") == 3  # all but the labels of the training half


def test_figures_are_small_pngs(reported, tmp_path):
    figures = tmp_path / "figures"
    report(reported.folder / "run", "--data_dir", reported.data, "--figures", figures, out=tmp_path / "a.html")
    assert sorted(path.name for path in figures.iterdir()) == ["clusters.png", "curves.png", "retrieval.png"]
    for path in figures.iterdir():
        assert path.stat().st_size < 300_000
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert min(pixels.shape[:2]) > 60 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 4


@pytest.mark.parametrize("argv, words", [
    (["{w}/none"], ("no such folder",)),
    (["{w}"], ("holds no run",)),
    ([], ("give the folder of a run",)),
    (["{r}", "--out", "{w}/a.txt"], ("must end in .html",)),
    (["{r}", "--out", "{w}/no/a.html"], ("does not exist",)),
    (["{r}", "{r}", "--figures", "{w}"], ("one run",)),
    (["{r}", "--checkpoint", "lost.pth"], ("lost.pth", "did you mean last.pth")),
])  # fmt: skip
def test_mistakes_are_one_line(reported, tmp_path, argv, words):
    argv = [word.format(w=tmp_path, r=reported.folder / "run") for word in argv]
    failed(run_in_process("report.py", *argv), *words, script="report.py")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- what is found


def test_neighbours_and_worst_failures_are_the_literal_ones():
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(40, 6, generator=generator), dim=1)
    labels = torch.randint(0, 5, (40,), generator=generator)
    labels[7] = 99  # alone in its class: no failure of the network
    distances = torch.cdist(embeddings.double(), embeddings.double()).fill_diagonal_(torch.inf)
    order = distances.argsort(1)
    first = {q: (labels[order[q]] == labels[q]).nonzero()[0].item() + 1 for q in range(40) if q != 7}
    for answer in findings.random_queries(embeddings, 6, 3, 1, 64):
        assert answer.hits == order[answer.query, :3].tolist()
        np.testing.assert_allclose(answer.distances, distances[answer.query, answer.hits], atol=1e-5)
    worst = findings.worst_queries(embeddings, labels, 4, 3, 64)
    assert [answer.rank for answer in worst] == sorted(first.values(), reverse=True)[:4]
    assert all(first[answer.query] == answer.rank for answer in worst)


def test_clusters_have_their_sizes_and_purity():
    embeddings = torch.eye(8)[:3].repeat_interleave(torch.tensor([6, 3, 2]), 0)
    embeddings += 1e-3 * torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 1, 1, 1, 2, 2, 3, 3, 3, 4, 5])
    found = findings.clusters(embeddings, labels, 3, 3, 0)
    assert [(c.size, c.label, round(c.purity, 3)) for c in found.shown[:2]] == [(3, 3, 1.0), (6, 1, 0.667)]
    assert found.purity == pytest.approx((4 + 3 + 1) / 11) and sorted(found.sizes) == [2, 3, 6]
    assert sorted(found.shown[0].rows) == [6, 7, 8]


def test_reconstructions_are_of_the_mean_feature_maps():
    torch.manual_seed(0)
    model = build_model("resnet_small", n_cluster=2, low_dim=4).eval()
    images = torch.randint(0, 256, (12, 32, 32, 3), dtype=torch.uint8)
    found = findings.reconstructions(model, images.split(5), "rim", "image", 0)
    with torch.no_grad():
        _, logits, maps = model(model.normalization(images))
        labels = logits.argmax(1)
        for one in found:
            rows = labels == labels[one.rows[0]]
            assert int(rows.sum()) == one.size and rows[one.rows].all()
            expected = 255 * model.decoder(maps[rows].mean(0, keepdim=True), (32, 32))[0].permute(1, 2, 0)
            np.testing.assert_allclose(one.image, expected, atol=1.5)
    assert sum(one.size for one in found) == 12


def test_pixels_of_a_reconstruction_undo_its_target():
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    for backbone in ("resnet_small", "googlenet"):
        model = build_model(backbone, n_cluster=2, low_dim=4)
        for kind in ("input", "image"):
            target = model.reconstruction_target(model.normalization(images), kind)
            difference = model.reconstructed_pixels(target, kind).int() - images.int()
            assert difference.abs().max() <= 1, (backbone, kind)


def test_every_number_of_the_metrics_has_a_curve():
    rows = [
        {"epoch": 1, "loss": 2.0, "recall@1": 0.5, "seconds": {"train": 3.0}, "cluster_sizes": [1, 4], "best": True},
        {"epoch": 2, "loss": 1.0, "recall@1": 0.75, "seconds": {"train": 2.0}, "nmi_protocol": "p", "x": float("nan")},
    ]
    assert scalars(rows[1]) == {"loss": 1.0, "recall@1": 0.75, "seconds/train": 2.0}
    one = {chart.title: chart for chart in charts([("a", rows)])}
    assert [(line.label, line.epochs, line.values) for line in one["R@K, %"].lines] == [("R@1", [1, 2], [50, 75])]
    assert {line.label for line in one["Images in a cluster"].lines} == {"smallest", "largest"}
    both = {chart.title: chart for chart in charts([("a", rows), ("b", rows[:1])])}
    assert [(line.label, line.values) for line in both["Loss (weighted sum)"].lines] == [("a", [2, 1]), ("b", [2])]
    lacking = {chart.title: chart for chart in charts([("a", []), ("b", rows)])}["Loss (weighted sum)"]
    assert [(line.label, line.values) for line in lacking.lines] == [("a", []), ("b", [2, 1])]  # b keeps its style
    assert {"R@1, %", "Seconds an epoch: train", "cluster size/smallest"} <= both.keys()


# ---------------------------------------------------------------- train.py --report


def test_a_report_that_fails_does_not_touch_the_run(reported, tmp_path, monkeypatch):
    import reports

    def fault(*_):
        raise RuntimeError("no\nink")

    monkeypatch.setattr(reports, "write_report", fault)
    done = execute(*options(reported.data, tmp_path), "--report")
    assert done.code == 0 and (tmp_path / "run" / "last.pth").is_file()
    assert len(re.findall(r"(?m)^warning: .*RuntimeError: no\\nink.*python report.py", done.out)) == 1
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_run_that_starts_afresh_has_no_old_report(reported, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(reported.folder / "run", run)
    (run / "report.html").write_text("of the run before")
    assert execute(*options(reported.data, tmp_path, n_epoch=0), "--overwrite").code == 0
    assert not (run / "report.html").exists()


def test_train_ends_with_the_page(reported):
    assert "<h1>" in (reported.folder / "run" / "report.html").read_text()  # the fixture trained with --report


def test_the_room_is_documented():
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    assert "python report.py new_checkpoint/" in readme and "--tensorboard" in readme
