"""report.py: what the page holds, read as text. test_report_browser.py opens it in a browser."""

from __future__ import annotations

import re
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reported import HOSTILE, METRICS, report, write_metrics, write_run
from scripts import failed, run_in_process
from synthetic import write_dataset
from torch.nn import functional as F

from datasets.arrays import Split
from models import build_model
from reports import findings, sights
from reports.curves import charts
from utils.tables import CSV_FORMAT


def test_one_file_holds_sections_scores_and_images(reported):
    page = reported.text("run")
    for name in ("settings", "curves", "retrieval-1", "clusters-1", "reconstructions-1", "map-1"):
        assert f'id="{name}"' in page
    assert "37.50</td>" in page and "75.00</td>" in page  # R@1 and R@2 of the last epoch
    assert "as in training" in page and "NOT those of the run" not in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page[: page.index("</footer>")])
    assert len(page) < 3 * 2**20


def test_frames_tell_the_class_of_the_query(reported):
    page = reported.text("run")
    answers = page[page.index('id="retrieval-1"') : page.index('id="clusters-1"')]
    for answer in answers.split('class="answer"')[1:]:
        tiles = re.findall(r'class="tile ?(\w*)"><img src="\S+" alt="image \d+, class (\d)', answer)
        query_class = tiles[0][1]
        frames = ["right" if name == query_class else "wrong" for _, name in tiles[1:]]
        assert [frame for frame, _ in tiles] == ["", *frames]


def test_the_page_says_what_chose_the_best_epoch(reported, tmp_path):
    page = reported.text("run")
    assert "1 (best, CHOSEN ON TEST)" in page and "the very images" in page
    shutil.copytree(reported.folder / "run", tmp_path / "run")
    held_out = [row | {"val_recall@1": row["epoch"], "val_nmi": 0.5} for row in METRICS]
    write_metrics(tmp_path / "run", held_out)
    page, _ = report(tmp_path / "run", "--checkpoint=best.pth", out=tmp_path / "page.html")
    assert "2 (best, chosen on held-out training classes)" in page
    assert "after epoch 1, chosen on held-out training classes" in page
    assert "the very images" not in page


def test_scores_before_training_stand_beside(reported, tmp_path):
    shutil.copytree(reported.folder / "other", tmp_path / "untrained")
    before = [METRICS[0] | {"recall@1": 0.0625, "nmi": 0.125}]
    write_metrics(tmp_path / "untrained", before)
    words = ("--before", tmp_path / "untrained")
    page, _ = report(reported.folder / "run", *words, out=tmp_path / "page.html")
    bars = page[page.index("Did it work?</h2>") : page.index('id="run-1"')]
    assert re.findall(r'<th scope="row">(\w+)</th>', bars) == ["untrained", "run"] * 2
    widths = re.findall(r'style="width:([\d.]+)%"', bars)
    assert widths == ["6.2", "37.5", "12.5", "50.0"]
    assert "Did it work?" not in reported.text("run")


def test_a_cluster_opens_its_members(reported):
    page = reported.text("run")
    clusters = page[page.index('id="clusters-1"') : page.index('id="reconstructions-1"')]
    for cluster in clusters.split("<section>")[1:]:
        size = int(re.search(r"<h4>(\d+) image", cluster).group(1))
        assert cluster.count("<img") == size  # of small clusters all


def test_places_apart():
    places = np.random.default_rng(0).random((200, 2))
    chosen = findings.apart(places, 0.2)
    gaps = np.abs(places[chosen][:, None] - places[chosen]).max(2)
    assert gaps[~np.eye(len(chosen), dtype=bool)].min() >= 0.2
    assert all(
        np.abs(places[chosen] - place).max(1).min() < 0.2 for place in np.delete(places, chosen, 0)
    )


def test_constant_curves_are_left_out():
    rows = [{"epoch": epoch, "loss": 1.0 / epoch, "lr": 0.1} for epoch in (1, 2, 3)]
    drawn = {chart.title: chart.varies() for chart in charts([("run", rows)])}
    assert drawn == {"Loss (weighted sum)": True, "Learning rate": False}


def test_several_runs_are_compared(reported):
    page = reported.text("two")
    differing = page[page.index("Settings that differ") : page.index('id="run-1"')]
    assert re.findall(r'<th scope="row">(\w+)</th>', differing) == ["lr"]
    assert page.count('id="map-') == 2
    assert page.count("Images of ") == 4  # a heading and a link for each


def test_nothing_is_framed_without_labels(reported):
    page = reported.text("unlabeled")
    assert "has no labels" in page and "No scores" in page
    assert 'class="tile"' in page
    assert 'class="tile right"' not in page and 'class="tile wrong"' not in page


def test_names_and_values_are_only_text(reported):
    page = reported.text("hostile")
    assert HOSTILE not in page and "&lt;img src=x" in page
    assert "<b>bold</b>" not in page and "&lt;b&gt;bold" in page


def test_names_of_any_bytes(reported, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(reported.data, data)
    write_run(tmp_path / "run", data)
    listed = "".join(f"/photos/caf\udce9/{row}.jpg,caf\udce9\n" for row in range(24))
    with open(data / "tiny/validation_tiny_32resized_paths.csv", "w", **CSV_FORMAT) as table:
        table.write(f"path,class\n{listed}")
    page, _ = report(tmp_path / "run", out=tmp_path / "page.html")
    assert "class caf?" in page


def test_the_page_says_what_is_missing(reported, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(reported.folder / "run", run)
    page, said = report(run, "--data_dir", tmp_path / "nowhere", out=tmp_path / "a.html")
    assert "give data_dir" in page and "give data_dir" in said and 'id="curve-1-1"' in page
    (run / "last.pth").unlink()
    page, said = report(run, out=tmp_path / "b.html")
    assert "last.pth: no such file" in page and "last.pth" in said and 'id="curve-1-1"' in page
    (run / "metrics.jsonl").write_text('{"epoch": 1, "lo')
    (run / "config.json").unlink()
    page, said = report(run, "--checkpoint", "best.pth", out=tmp_path / "c.html")
    assert "metrics.jsonl cannot be read" in said and "config.json is missing" in said
    assert 'id="map-1"' in page and "CHOSEN ON TEST" in page


def test_a_folder_of_which_nothing_can_be_read(tmp_path):
    (tmp_path / "config.json").write_text("{")
    failed(run_in_process("report.py", tmp_path), "nothing to show", "config.json")
    assert not (tmp_path / "report.html").exists()


def test_the_page_tells_other_data_than_in_training(reported, tmp_path):
    other = write_dataset(tmp_path / "data", seed=9)
    page, _ = report(reported.folder / "run", "--data_dir", other, out=tmp_path / "a.html")
    assert page.count("NOT those of the run") == 3  # all but the labels of the training half


def test_mirror_images_count_if_they_did_in_training(reported, tmp_path):
    write_run(tmp_path / "run", reported.data, flip_eval=True)
    mirrored, _ = report(tmp_path / "run", out=tmp_path / "a.html")
    captions = [re.findall(r"\d · \d\.\d\d", page) for page in (mirrored, reported.text("run"))]
    assert captions[0] != captions[1]  # ranks and distances


def test_figures_are_small_png_files(reported, tmp_path):
    figures = tmp_path / "figures"
    report(reported.folder / "run", "--figures", figures, out=tmp_path / "a.html")
    names = sorted(path.name for path in figures.iterdir())
    assert names == ["clusters.png", "curves.png", "retrieval.png"]
    for path in figures.iterdir():
        assert path.stat().st_size < 300_000
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert min(pixels.shape[:2]) > 60
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 4


@pytest.mark.parametrize(
    "argv, words",
    [
        ("{empty}/none", "no such folder"),
        ("{empty}", "holds no run"),
        ("", "give the folder of a run"),
        ("{run} --out {empty}/a.txt", "must end in .html"),
        ("{run} {run} --figures {empty}", "one run"),
        ("{run} --before {bare} --out {empty}/a.html", "a run on another data set (bare, tiny)"),
    ],
)
def test_mistakes_are_one_line(reported, tmp_path, argv, words):
    folder = reported.folder
    argv = argv.format(empty=tmp_path, run=folder / "run", bare=folder / "unlabeled").split()
    failed(run_in_process("report.py", *argv), words, script="report.py")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("n_queries", [40, 15])
def test_ranks_are_the_literal_ones(n_queries):
    """All images search all others, or some search the rest."""
    generator = torch.Generator().manual_seed(0)
    embeddings = F.normalize(torch.randn(40, 6, generator=generator), dim=1)
    labels = torch.randint(0, 5, (40,), generator=generator)
    labels[7] = 99  # alone in its class: no failure of the network
    queries = torch.arange(n_queries)
    gallery = torch.arange(40) >= n_queries % 40
    ranks = findings.first_hit_ranks(embeddings, labels, queries, gallery, memory_mb=0.005)
    distances = torch.cdist(embeddings.double(), embeddings.double()).fill_diagonal_(torch.inf)
    distances[:, ~gallery] = torch.inf
    n_others = int(gallery.sum()) - (n_queries == 40)
    for query, order in enumerate(distances[queries].argsort(1)):
        hits = (labels[order[:n_others]] == labels[query]).nonzero()
        expected = int(hits[0]) + 1 if query != 7 else 0
        assert ranks[query] == expected


def test_queries_search_the_gallery_alone():
    embeddings = torch.tensor([[0.0], [1.0], [2.0], [5.0], [6.0]])
    numbers = np.arange(5)
    roles = np.array([0, 0, 1, 1, 1])
    half = Split(np.zeros((5, 8, 8, 3), np.uint8), numbers, Path(), numbers, roles)
    options = Namespace(neighbors=9, eval_memory_mb=1)
    queries, squares, nearest = sights.search(embeddings, half, options)
    assert queries.tolist() == [0, 1]
    assert nearest.tolist()[:2] == [[2, 3, 4], [2, 3, 4]]
    assert nearest[2:, 0].tolist() == [1, 4, 3]
    torch.testing.assert_close(squares[1], torch.tensor([1.0, 16.0, 25.0]))


def test_clusters_have_their_sizes_and_purity():
    embeddings = torch.eye(8)[:3].repeat_interleave(torch.tensor([6, 3, 2]), 0)
    generator = torch.Generator().manual_seed(0)
    embeddings += 1e-3 * torch.randn(embeddings.shape, generator=generator)
    labels = torch.tensor([1, 1, 1, 1, 2, 2, 3, 3, 3, 4, 5])
    clusters = findings.clusters(embeddings, labels, k=3, n_shown=3, seed=0)
    first, second, _ = clusters.shown
    assert (first.size, int(labels[first.example]), first.purity) == (3, 3, 1.0)
    assert (second.size, int(labels[second.example]), round(second.purity, 3)) == (6, 1, 0.667)
    assert sorted(first.rows) == [6, 7, 8]
    assert clusters.purity == pytest.approx((4 + 3 + 1) / 11)
    assert sorted(clusters.sizes) == [2, 3, 6]


def test_reconstructions_are_of_mean_feature_maps():
    torch.manual_seed(0)
    model = build_model("resnet_small", n_cluster=2, low_dim=4).eval()
    crops = torch.randint(0, 256, (12, 32, 32, 3), dtype=torch.uint8)
    centroids = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: centroids.append(inputs[0]))
    decoded = findings.reconstructions(model, crops, 5, by_kmeans=False, target="image", seed=0)
    with torch.no_grad():
        _, cluster_logits, feature_maps = model(model.normalization(crops))
    pseudo_labels = cluster_logits.argmax(1)
    largest = torch.bincount(pseudo_labels).argsort(descending=True, stable=True)
    for label, centroid, reconstruction in zip(largest, centroids, decoded, strict=False):
        expected = feature_maps[pseudo_labels == label].mean(0, keepdim=True)
        torch.testing.assert_close(centroid, expected, atol=1e-3, rtol=1e-2)
        assert reconstruction.image.shape == (32, 32, 3)
    assert sum(reconstruction.size for reconstruction in decoded) == 12


def test_every_number_of_the_metrics_has_a_curve():
    rows = [
        {"epoch": 1, "loss": 2.0, "recall@1": 0.5, "seconds": {"train": 3.0}, "best": True},
        {"epoch": 2, "loss": 1.0, "recall@1": 0.75, "cluster_sizes": [1, 4], "x": float("nan")},
    ]
    single = {chart.title: chart.lines for chart in charts([("a", rows)])}
    assert [(line.label, line.values) for line in single["R@K, %"]] == [("R@1", [50, 75])]
    assert [line.label for line in single["Images in a cluster"]] == ["smallest", "largest"]
    two = {chart.title: chart.lines for chart in charts([("a", []), ("b", rows)])}
    lines = [(line.label, line.epochs, line.values) for line in two["Loss (weighted sum)"]]
    assert lines == [("a", [], []), ("b", [1, 2], [2, 1])]  # b keeps its style
    assert {"R@1, %", "Seconds an epoch: train", "cluster size/smallest"} <= two.keys()
