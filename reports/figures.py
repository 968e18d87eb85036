"""The curves and the galleries of a run as PNG files."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps

from reports.charts import style_of
from reports.curves import LOSSES, SCORES, Chart
from reports.findings import even_steps
from reports.sights import Sights
from utils.files import made_folder, written_whole

COLUMNS = 3  # of charts
QUERIES = 5  # random ones
WORST = 3  # queries
CLUSTERS = 8
TILE = 68  # pixels, with its frame and the space around
INDENT = 90  # pixels, for the words at the beginning of a row
FRAMES = {True: ("#1b7f4b", 5), False: ("#c0392b", 2), None: ("white", 0)}  # color, pixels
PALETTE = 64  # colors of a file, so that it is small

Tiles = list[tuple[int, bool | None]]  # test images, and whether they are right


def write_figures(folder: Path, charts: Sequence[Chart], sights: Sights | None) -> None:
    """Write curves.png, retrieval.png and clusters.png into `folder`, which is made.

    Without `sights` there are the curves alone, and without numbers no curves.
    """
    with made_folder(folder):
        drawn = [chart for chart in charts if chart.group in (SCORES, LOSSES)]
        if drawn:
            _save(_curves(drawn), folder / "curves.png")
        if sights is not None:
            _save(_gallery(_retrieval_rows(sights), sights), folder / "retrieval.png")
            _save(_gallery(_cluster_rows(sights), sights), folder / "clusters.png")


def _curves(charts: Sequence[Chart]) -> Image.Image:
    n_rows = math.ceil(len(charts) / COLUMNS)
    size = (9, 2.3 * n_rows)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(n_rows, COLUMNS, squeeze=False)
    for axes in grid.flat[len(charts) :]:
        axes.remove()
    for axes, chart in zip(grid.flat, charts, strict=False):
        for number, line in enumerate(chart.lines):
            color, dash = style_of(number)
            style = {"color": color, "linestyle": dash.replace("dotdash", "dashdot"), "marker": "."}
            label = "\u200b" + line.label.replace("$", r"\$")  # neither hidden nor mathematics
            axes.plot(line.epochs, line.values, label=label, **style)
        axes.set_ylim(chart.limits())
        axes.set_title(chart.title, fontsize=9, loc="left")
        axes.tick_params(labelsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color="#e6e6e1")
        if len(chart.lines) > 1:
            axes.legend(fontsize=7, frameon=False)
    figure.supxlabel("epoch", fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return Image.open(file).convert("RGB")


def _retrieval_rows(sights: Sights) -> list[tuple[str, Tiles]]:
    """Return a row for each of some random queries and of the worst."""
    drawn = [("query", query) for query in sights.drawn[:QUERIES]]
    worst = [("worst", query) for query, _ in sights.worst[:WORST]]
    rows = []
    for words, query in drawn + worst:
        hits = [(row, sights.is_same(row, query)) for row, _ in sights.neighbors(query)]
        rows.append((words, [(query, None), *hits]))
    return rows


def _cluster_rows(sights: Sights) -> list[tuple[str, Tiles]]:
    """Return a row for each of some clusters: the images nearest to its centroid."""
    shown = sights.clusters.shown
    rows = []
    for cluster in (shown[step] for step in even_steps(len(shown), CLUSTERS)):
        words = f"{cluster.size} images"
        if sights.test.labeled:
            words += f"\n{100 * cluster.purity:.0f} % pure"
        rows.append((words, [(row, sights.is_same(row, cluster.example)) for row in cluster.rows]))
    return rows


def _gallery(rows: Sequence[tuple[str, Tiles]], sights: Sights) -> Image.Image:
    n_columns = max(len(tiles) for _, tiles in rows)
    sheet = Image.new("RGB", (INDENT + n_columns * TILE, len(rows) * TILE), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for number, (words, tiles) in enumerate(rows):
        middle = number * TILE + TILE // 2
        draw.multiline_text((4, middle), words, "black", font, anchor="lm")
        for place, (row, right) in enumerate(tiles):
            color, width = FRAMES[right]
            side = TILE - 4 - 2 * width
            image = Image.fromarray(sights.test.images[row]).resize((side, side))
            corner = (INDENT + place * TILE + 2, number * TILE + 2)
            sheet.paste(ImageOps.expand(image, width, color), corner)
    return sheet


def _save(picture: Image.Image, path: Path) -> None:
    with written_whole(path) as beside:
        small = picture.quantize(PALETTE, dither=Image.Dither.NONE)
        small.save(beside, format="PNG", optimize=True)
