"""The report: one HTML page of some runs that needs no other file and no network, and the same as PNG figures."""

from __future__ import annotations

import base64
import hashlib
import json
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from datasets import center_crops, crop_size
from datasets.views import center_crop
from models import check_crop_size
from reports import findings
from reports.charts import bokeh_script, curve, scatter, style_of
from reports.curves import GROUPS, Chart, charts, title_of, value_of
from reports.pictures import GALLERY_SIDE, MAP_SIDE, data_uri
from reports.runs import Run, names_of, open_data, open_network, read_run
from utils.devices import choose_device
from utils.errors import UserError
from utils.evaluation import EVAL_MEMORY_MB, NMI_CLASSES
from utils.features import extract_features
from utils.files import written_whole
from utils.progress import progress
from utils.runs import LAST, recall_titles, scalars

HERE = Path(__file__).parent
TRAINING_IMAGES = 1024  # whose centroids are decoded: their feature maps are held in memory, 2 bytes a number
PACKAGES = ("torch", "torchvision", "numpy", "scikit-learn", "bokeh")


@dataclass(frozen=True)
class Options:
    """What a report shows and how it is computed; the defaults are those of report.py."""

    checkpoint: str = LAST
    data_dir: str | None = None  # None: where the run found its data
    queries: int = 8
    neighbours: int = 8
    clusters: int = 12
    map_points: int = 1500  # of all maps of the page together
    seed: int = 0
    device: str = "auto"
    test_batch: int = 100
    workers: int = 2
    memory_mb: int = EVAL_MEMORY_MB


@dataclass
class Sights:
    """What a run's network makes of the images: for the page and the figures. None where it could not be made."""

    run: Run
    called: list[str]  # of the test images
    classes: list[str]  # of the test images, "" without labels
    embeddings: torch.Tensor  # (N, D)
    drawn: list[findings.Answer]
    worst: list[findings.Answer]
    clusters: findings.Clusters | None
    reconstructions: list[findings.Reconstruction]
    training: np.ndarray  # the training images that the reconstructions speak of
    map: tuple[np.ndarray, np.ndarray] | None


def write_report(folders: Sequence[Path], out: Path, options: Options, figures: Path | None = None) -> list[str]:
    """Write the page about the runs in `folders` to `out`, and PNG figures of the first into the folder `figures`.

    Runs whose network or data are missing get the parts that can be made, and a sentence about the others.
    Returns these sentences. Raises UserError where a folder holds no run.
    """
    runs = [read_run(folder) for folder in folders]
    device = choose_device(options.device)
    shown, said = [], []
    for run in runs:
        open_network(run, options.checkpoint, device)
        open_data(run, options.data_dir)
        sights = look(run, options, len(runs))
        if figures is not None and run is runs[0]:
            from reports.figures import write_figures

            write_figures(figures, charts([(run.name, run.rows)]), sights)
        shown.append(_run_context(run, sights, options))
        said += [f"{run.path}: {sentence}" for sentence in run.missing.values()]
        run.model = None  # one network in memory at a time
    page = render(runs, shown, options)
    with written_whole(out) as path:
        path.write_text(page, encoding="utf-8")
    return said


def look(run: Run, options: Options, runs: int = 1) -> Sights | None:
    """Embed the test half and find what is to be shown; None, and a sentence in `run.missing`, where it cannot be."""
    if run.model is None or run.test is None:
        return None
    test, labels = run.test, None
    try:
        check_crop_size(run.model.backbone_name, crop_size(test.image_size))
        crops = center_crops(test.images, options.test_batch, options.workers, test.check_unchanged)
        crops = progress(crops, len(test) / options.test_batch, f"{run.name}: test features")
        _, embeddings = extract_features(run.model, crops, flip=bool(run.config.get("flip_eval")))
        called, classes = names_of(test)
    except UserError as error:
        run.missing["network"] = f"The images could not be embedded. {error}."
        return None
    if test.labelled:
        labels = torch.from_numpy(test.labels)
    asked = (options.queries, options.neighbours)
    sights = Sights(
        run, called, classes, embeddings,
        findings.random_queries(embeddings, *asked, options.seed, options.memory_mb),
        [] if labels is None else findings.worst_queries(embeddings, labels, *asked, options.memory_mb),
        None, [], np.empty(0), None,
    )  # fmt: skip
    k = run.model.n_cluster if labels is None else min(len(torch.unique(labels)), NMI_CLASSES)
    try:
        sights.clusters = findings.clusters(embeddings, labels, k, options.clusters, options.seed)
    except UserError as error:
        run.missing["clusters"] = f"No clusters: {error}."
    try:
        sights.map = findings.map_of(embeddings, max(options.map_points // runs, 3), options.seed)
    except UserError as error:
        run.missing["map"] = f"No map: {error}."
    reconstruct(run, sights, options)
    return sights


def reconstruct(run: Run, sights: Sights, options: Options) -> None:
    """Decode the centroids of at most TRAINING_IMAGES training images, drawn by the seed."""
    if run.training is None:
        run.missing["reconstructions"] = run.missing["data"]
        return
    if run.config.get("recon") == 0:
        run.missing["reconstructions"] = "No reconstructions: the decoder was not trained (--recon 0)."
        return
    drawn = np.random.default_rng(options.seed).permutation(len(run.training))[:TRAINING_IMAGES]
    sights.training = run.training.images[np.sort(drawn)]
    crops = center_crops(sights.training, options.test_batch, options.workers)
    crops = progress(crops, len(drawn) / options.test_batch, f"{run.name}: reconstructions")
    pseudo_labels, target = (str(run.config.get(name)) for name in ("pseudo_labels", "recon_target"))
    target = target if target == "image" else "input"
    try:
        sights.reconstructions = findings.reconstructions(run.model, crops, pseudo_labels, target, options.seed)
    except UserError as error:
        run.missing["reconstructions"] = f"No reconstructions: {error}."


# ---------------------------------------------------------------- the page


def render(runs: Sequence[Run], shown: Sequence[dict], options: Options) -> str:
    """The HTML of the page; jinja2 escapes every name and value that comes from a file."""
    found = charts([(run.name, run.rows) for run in runs])
    found = [chart for chart in found if any(len(line.epochs) > 1 for line in chart.lines)]
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # a model is defined where it first occurs
    scripts = [bokeh_script(), (HERE / "page.js").read_text(encoding="utf-8")]
    return environment.get_template("page.html").render(
        title=", ".join(run.name for run in runs),
        css=(HERE / "page.css").read_text(encoding="utf-8"),
        scripts=scripts,
        script_hashes=[_hash(script) for script in scripts],
        runs=shown,
        options=options,
        settings=settings_table(runs),
        differing=[row for row in settings_table(runs) if len(set(row[1])) > 1],
        scores=scores_table(runs),
        chosen_on_test=any("chosen on test" in epoch for _, epoch, _ in scores_table(runs)),
        score_titles=[title_of(name) for name in score_names(runs)],
        groups=[(group, [_chart_context(chart) for chart in found if chart.group == group]) for group in GROUPS],
        legend=[(run.name, *style_of(number)) for number, run in enumerate(runs)],
        versions=_versions(),
    )


def settings_table(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Every setting with its value in each run."""
    names = sorted({str(name) for run in runs for name in run.config})
    return [(name, [_text(run.config[name]) if name in run.config else "—" for run in runs]) for name in names]


def score_names(runs: Sequence[Run]) -> list[str]:
    """R@K of all K that any run has, and NMI."""
    names = {str(name) for run in runs for row in run.rows for name in row}
    titles = recall_titles({name: 0 for name in names if re.fullmatch(r"recall@\d{1,9}", name)})
    return [*titles.values(), "nmi"]


def scores_table(runs: Sequence[Run]) -> list[tuple[str, str, list[str]]]:
    """Run, epoch in words, scores in percent: the last scored epoch, and the one that was best on the test half."""
    table, names = [], score_names(runs)
    for run in runs:
        scored = [row for row in run.rows if "recall@1" in scalars(row)]
        if not scored:
            continue
        held_out = all("val_recall@1" in scalars(row) for row in scored)
        best = max(scored, key=lambda row: row["val_recall@1" if held_out else "recall@1"])
        chosen = "best, chosen on held-out training classes" if held_out else "best, chosen on test"
        for words, row in (("last", scored[-1]), (chosen, best)):
            known = scalars(row)
            values = [f"{value_of(name, known[name]):.2f}" if name in known else "—" for name in names]
            table.append((run.name, f"{row['epoch']} ({words})", values))
    return table


def _run_context(run: Run, sights: Sights | None, options: Options) -> dict:
    """What the template shows of a run."""
    return {
        "name": run.name,
        "path": str(run.path),
        "missing": run.missing,
        "rows": run.rows,
        "columns": list(dict.fromkeys(name for row in run.rows for name in scalars(row))),
        "numbers": [(row["epoch"], scalars(row)) for row in run.rows],
        "facts": _facts(run, options),
        "labelled": run.test is not None and run.test.labelled,
        "backbone": run.info.get("backbone") or run.config.get("backbone", ""),
        "dataset": run.config.get("dataset", ""),
        **({"sights": None} if sights is None else _sights_context(sights)),
    }


def _sights_context(sights: Sights) -> dict:
    """The galleries and the map with their images."""
    found = sights.clusters
    return {
        "sights": True,
        "images": len(sights.embeddings),
        "class_count": len(set(sights.run.test.labels.tolist())),
        "drawn": [_answer_context(sights, answer) for answer in sights.drawn],
        "worst": [_answer_context(sights, answer) for answer in sights.worst],
        "cluster_count": 0 if found is None else len(found.sizes),
        "size_range": (0, 0) if found is None else (min(found.sizes), max(found.sizes)),
        "purity": None if found is None or found.purity is None else 100 * found.purity,
        "clusters": [] if found is None else [_cluster_context(sights, cluster) for cluster in found.shown],
        "centroids": [_centroid_context(sights, one) for one in sights.reconstructions],
        "training_images": len(sights.training),
        "map": None if sights.map is None else _map_context(sights),
        "map_points": 0 if sights.map is None else len(sights.map[0]),
    }  # fmt: skip


def _tile(sights: Sights, row: int, caption: str, right: bool | None = None) -> dict:
    """An image of the test half with its caption; right: whether it is of the class that is asked for."""
    name = sights.classes[row]
    said = {None: "", True: ", the same class", False: ", another class"}[right]
    return {
        "picture": data_uri(sights.run.test.images[row], GALLERY_SIDE),
        "alt": f"{sights.called[row]}{f', class {name}' if name else ''}{said}",
        "caption": caption,
        "name": (f"class {name}" if name.isdigit() else name) or sights.called[row],
        "right": right,
    }


def _answer_context(sights: Sights, answer: findings.Answer) -> dict:
    labels = sights.run.test.labels
    known = sights.run.test.labelled
    hits = [
        _tile(sights, row, f"{place} · {distance:.2f}", bool(labels[row] == labels[answer.query]) if known else None)
        for place, (row, distance) in enumerate(zip(answer.hits, answer.distances, strict=True), 1)
    ]
    rank = answer.rank
    first = "" if rank is None else f", its class first at rank {rank}{' or later' if rank > findings.DEEPEST else ''}"
    return {"query": _tile(sights, answer.query, f"query{first}"), "hits": hits}


def _cluster_context(sights: Sights, cluster: findings.Cluster) -> dict:
    labels = sights.run.test.labels
    known = cluster.label is not None
    rights = [bool(labels[row] == cluster.label) if known else None for row in cluster.rows]
    major = next((sights.classes[row] for row in cluster.rows if labels[row] == cluster.label), str(cluster.label))
    return {
        "size": cluster.size,
        "purity": None if cluster.purity is None else 100 * cluster.purity,
        "label": major if known else None,
        "tiles": [_tile(sights, row, "", right) for row, right in zip(cluster.rows, rights, strict=True)],
    }


def _centroid_context(sights: Sights, one: findings.Reconstruction) -> dict:
    crops = center_crop(sights.training[one.rows])
    return {
        "size": one.size,
        "picture": data_uri(one.image, GALLERY_SIDE),
        "beside": [data_uri(crop, GALLERY_SIDE) for crop in crops],
    }


def _map_context(sights: Sights) -> dict:
    """The item of the map: a point for each image, with the image; labelled: whether its nearest neighbour is right."""
    rows, places = sights.map
    test = sights.run.test
    nearest = findings.answers(sights.embeddings, torch.from_numpy(rows), 1, EVAL_MEMORY_MB)
    right = [bool(test.labels[row] == test.labels[a.hits[0]]) for row, a in zip(rows, nearest, strict=True)]
    notes = [
        (f"class {sights.classes[row]}, " if test.labelled else "")
        + ("" if not test.labelled else "nearest image of its class" if good else "nearest image of another class")
        for row, good in zip(rows, right, strict=True)
    ]
    return scatter(
        {
            "x": places[:, 0].tolist(),
            "y": places[:, 1].tolist(),
            "picture": [data_uri(test.images[row], MAP_SIDE) for row in rows],
            "name": [sights.called[row] for row in rows],
            "note": notes,
            "right": right,
            "group": [sights.classes[row] for row in rows],
        },
        test.labelled,
    )


def _chart_context(chart: Chart) -> dict:
    lines = [
        (line.label, *style_of(number), f"{line.values[-1]:.4g}" if line.values else "none")
        for number, line in enumerate(chart.lines)
    ]
    return {"title": chart.title, "lines": lines, "item": curve(chart), "single": len(chart.lines) == 1}


def _facts(run: Run, options: Options) -> list[tuple[str, str]]:
    """What is known of the network and of the data."""
    facts = []
    if run.model is not None:
        epoch = "unknown" if run.info["epoch"] is None else run.info["epoch"]
        chosen = ", chosen on the test half" if options.checkpoint != LAST else ""
        facts.append(("checkpoint", f"{options.checkpoint}, after epoch {epoch}{chosen}"))
    for half, split in (("training", run.training), ("validation", run.test)):
        then = run.info.get("data", {}).get(half)
        then = then if isinstance(then, dict) else {}
        now = split.fingerprint() if split is not None else {}
        for part in ("images", "labels"):
            value, before = now.get(part), then.get(part)
            known = ", as in training" if value == before else ", NOT those of the run"
            known = known if value and before else ""
            value = value or str(before or "")
            if value:  # 16 of the 64 digits tell data sets apart; the checkpoint holds them all
                value = re.sub(r"(sha256 \w{16})\w+", r"\1…", value)
                facts.append((f"{'test' if half == 'validation' else half} {part}", f"{value}{known}"))
    return facts


def _versions() -> str:
    """Python and the packages that made the page."""
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def _text(value: object) -> str:
    """A setting as JSON, a text without its quotes."""
    return value if isinstance(value, str) else json.dumps(value)


def _hash(script: str) -> str:
    """The script as a content security policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
