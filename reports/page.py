"""The page: one HTML file that needs no other file and no network."""

from __future__ import annotations

import base64
import hashlib
import io
import platform
import re
from argparse import Namespace
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from reports import findings
from reports.charts import bokeh_script, curve, scatter, style_of
from reports.curves import GROUPS, charts, title_of, value_of
from reports.figures import write_figures
from reports.runs import Run, open_data, open_network, read_run
from reports.sights import TRAINING_IMAGES, Sights, look
from utils.devices import choose_device
from utils.errors import UserError
from utils.evaluation import recall_titles
from utils.files import write_text
from utils.runs import BEST, CHOSEN_ON, criterion, last_and_best, scalars

FOLDER = Path(__file__).parent
PACKAGES = ("torch", "torchvision", "numpy", "scikit-learn", "bokeh")
GALLERY_SIDE = 144  # pixels
MAP_SIDE = 80  # pixels
MAP_PICTURE = 0.05  # side of a picture on the map, as a share of the map
QUALITY = 75  # of the pictures, percent
MAP_NOTES = {  # by whether the nearest image is of the class
    True: "class {}, nearest image of its class",
    False: "class {}, nearest image of another class",
    None: "",
}


def write_report(
    folders: Sequence[Path],
    out: Path,
    options: Namespace,
    figures: Path | None = None,
    before: Path | None = None,
) -> list[str]:
    """Write the page about the runs in `folders` to the file `out`.

    Runs whose network or data are missing get the parts that can be made.

    Args:
        options: those of report.py.
        figures: a folder for PNG figures of the first run.
        before: the folder of a run whose scores the others are compared with.

    Returns sentences about what is missing. Raises UserError if a folder holds no run.
    """
    runs = [read_run(folder) for folder in folders]
    compared = [read_run(before), *runs] if before else runs
    datasets = {run.config.get("dataset") for run in compared}
    if before and len(datasets) > 1:
        names = ", ".join(sorted(map(str, datasets)))
        raise UserError(f"{before}: a run on another data set ({names}); compare runs on the same")
    device = choose_device(options.device)
    sights = []
    for run in runs:
        open_network(run, options.checkpoint, device)
        open_data(run, options.data_dir)
        if run.model is None and not run.rows:
            raise UserError(f"{run.path}: nothing to show: {' '.join(run.missing.values())}")
        sights.append(look(run, options, max(options.map_points // len(runs), 3)))
        run.model = None  # one network in memory at a time
    if figures is not None:
        write_figures(figures, charts([(runs[0].name, runs[0].rows)]), sights[0])
    page = render(runs, sights, options, bars_of(compared))
    write_text(out, page)
    return [f"{run.path}: {sentence}" for run in runs for sentence in run.missing.values()]


def render(
    runs: Sequence[Run],
    sights: Sequence[Sights | None],
    options: Namespace,
    bars: Sequence[tuple[str, dict]],
) -> str:
    """Return the HTML of the page. jinja2 escapes every name and value that comes from a file.

    bars: name and scores of each run that is compared.
    """
    drawn = charts([(run.name, run.rows) for run in runs])
    drawn = [chart for chart in drawn if chart.varies()]
    settings = settings_table(runs)
    metrics = [name for run in runs for row in run.rows for name in row]
    template = _environment().get_template("page.html")
    return template.render(
        title=", ".join(run.name for run in runs),
        css=(FOLDER / "page.css").read_text(encoding="utf-8"),
        scripts=[bokeh_script(), (FOLDER / "page.js").read_text(encoding="utf-8")],
        runs=runs,
        sights=sights,
        facts=[facts(run, options) for run in runs],
        options=options,
        most_training_images=TRAINING_IMAGES,
        bars=bars,
        settings=settings,
        differing=[row for row in settings if any(value != row[1][0] for value in row[1])],
        scores=scored_epochs(runs),
        score_names=[*recall_titles(dict.fromkeys(metrics)).values(), "nmi"],
        groups=[(group, [chart for chart in drawn if chart.group == group]) for group in GROUPS],
        versions=[f"Python {platform.python_version()}"] + [f"{p} {version(p)}" for p in PACKAGES],
    )


def _environment() -> Environment:
    loader = FileSystemLoader(FOLDER)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    # sorted keys would move the definition of a bokeh model behind its first use
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    functions = (content_hash, curve, map_item, picture, scalars, style_of, title_of, value_of)
    environment.globals |= {function.__name__: function for function in functions}
    return environment


def content_hash(script: str) -> str:
    """Return the script's hash as a content security policy names it."""
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"


def picture(image: np.ndarray, side: int = GALLERY_SIDE) -> str:
    """Return an image uint8 RGB (H, W, 3) as a data URI, at most `side` pixels wide and high."""
    small = Image.fromarray(np.ascontiguousarray(image))
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, "WEBP", quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode('ascii')}"


def map_item(sights: Sights) -> dict:
    """Return the map of the embedding, a point for each image, as bokeh embeds it."""
    rows, places = sights.map
    right = [sights.is_same(row, int(sights.nearest[row, 0])) for row in rows]
    classes = [sights.classes[row] for row in rows]
    notes = [MAP_NOTES[answer].format(name) for answer, name in zip(right, classes, strict=True)]
    columns = {
        "x": places[:, 0].tolist(),
        "y": places[:, 1].tolist(),
        "picture": [picture(sights.test.images[row], MAP_SIDE) for row in rows],
        "name": [sights.names[row] for row in rows],
        "note": notes,
        "group": classes,
    }
    side = MAP_PICTURE * float(np.ptp(places, axis=0).max())
    return scatter(columns, right, findings.apart(places, side), side)


def settings_table(runs: Sequence[Run]) -> list[tuple[str, list]]:
    """Return every setting with its value in each run."""
    names = sorted({name for run in runs for name in run.config})
    return [(name, [run.config.get(name, "—") for run in runs]) for name in names]


def bars_of(runs: Sequence[Run]) -> list[tuple[str, dict]]:
    """Return name and metrics of the last scored epoch of each run that has one."""
    scored = [(run.name, [row for row in run.rows if "recall@1" in row]) for run in runs]
    return [(name, rows[-1]) for name, rows in scored if rows]


def scored_epochs(runs: Sequence[Run]) -> list[tuple[str, str, dict]]:
    """Return run, epoch in words and metrics of the last scored epoch and of the best."""
    table = []
    for run in runs:
        for words, row in last_and_best(run.rows):
            if "recall@1" in row:
                table.append((run.name, f"{row['epoch']} ({words})", row))
    return table


def facts(run: Run, options: Namespace) -> dict[str, str]:
    """Return what is known of the network and of the data."""
    table = {}
    if run.info:
        table["checkpoint"] = f"{options.checkpoint}, after epoch {run.info['epoch']}"
        if options.checkpoint == BEST:
            table["checkpoint"] += f", {CHOSEN_ON[criterion(run.rows)]}"
    trained_on = run.info.get("data", {})
    for half, split in (("training", run.training), ("validation", run.test)):
        before = trained_on.get(half, {})
        present = before if split is None else split.fingerprint()
        for part, fingerprint in present.items():
            text = re.sub(r"(sha256 \w{16})\w+", r"\1…", fingerprint)
            if split is not None and part in before:
                is_same = before[part] == fingerprint
                text += ", as in training" if is_same else ", NOT those of the run"
            table[f"{half.replace('validation', 'test')} {part}"] = text
    return table
