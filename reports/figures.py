"""The galleries and the curves of a run as PNG files, drawn by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from datasets import Split
from reports.charts import style_of
from reports.curves import GROUPS, Chart
from reports.page import Sights
from utils.files import made_folder, written_whole

RIGHT, WRONG = ("#1b7f4b", "solid"), ("#c0392b", (0, (2, 1.5)))  # colour and dash of a frame
TILE, DPI, COLOURS = 0.62, 110, 64  # inches; pixels an inch
QUERIES, WORST, CLUSTERS = 5, 3, 8  # rows
COLUMNS = 3  # of charts


def write_figures(folder: Path, charts: Sequence[Chart], sights: Sights | None) -> None:
    """Write curves.png, retrieval.png and clusters.png into a folder that is made; without images the first alone."""
    with made_folder(folder):
        drawn = [chart for chart in charts if chart.group in GROUPS[:2]]
        if drawn:
            _save(_curves(drawn), folder / "curves.png")
        if sights is not None:
            _save(_retrieval(sights), folder / "retrieval.png")
        if sights is not None and sights.clusters is not None:
            _save(_clusters(sights), folder / "clusters.png")


def _curves(charts: Sequence[Chart]) -> Figure:
    """A chart beside the other, `COLUMNS` in a row."""
    rows = -(-len(charts) // COLUMNS)
    figure, grid = plt.subplots(rows, COLUMNS, figsize=(9, 2.3 * rows), squeeze=False, layout="constrained")
    for axes in grid.flat[len(charts) :]:
        axes.remove()
    for axes, chart in zip(grid.flat, charts, strict=False):
        for number, line in enumerate(chart.lines):
            colour, dash = style_of(number)
            axes.plot(line.epochs, line.values, color=colour, linestyle={"dotdash": "dashdot"}.get(dash, dash),
                      marker=".", label=_plain(line.label))  # fmt: skip
        axes.set_ylim(chart.limits())
        axes.set_title(chart.title, fontsize=9, loc="left")
        axes.tick_params(labelsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e6e1")
        if len(chart.lines) > 1:
            axes.legend(fontsize=7, frameon=False)
    figure.supxlabel("epoch", fontsize=8)
    return figure


def _retrieval(sights: Sights) -> Figure:
    """Random queries and worst failures, a row each: the query, then its neighbours."""
    test, rows = sights.run.test, []
    for title, answers in (("query", sights.drawn[:QUERIES]), ("worst", sights.worst[:WORST])):
        for number, answer in enumerate(answers):
            hits = [(hit, bool(test.labels[hit] == test.labels[answer.query])) for hit in answer.hits]
            rows.append((title if number == 0 else "", answer.query, hits))
    return _gallery(rows, test)


def _clusters(sights: Sights) -> Figure:
    """Clusters, a row each: the images nearest to the centroid; size, and purity where classes are known."""
    test, shown, rows = sights.run.test, sights.clusters.shown, []
    for step in np.unique(np.linspace(0, len(shown) - 1, min(CLUSTERS, len(shown))).round().astype(int)):
        cluster = shown[step]
        pure = "" if cluster.purity is None else f"\n{100 * cluster.purity:.0f} % pure"
        others = [(row, bool(test.labels[row] == cluster.label)) for row in cluster.rows]
        rows.append((f"{cluster.size} images{pure}", None, others))
    return _gallery(rows, test)


def _gallery(rows: Sequence[tuple[str, int | None, Sequence[tuple[int, bool]]]], test: Split) -> Figure:
    """Rows of words, a first image or none, and others with whether they are right (framed if classes are known)."""
    start = 1.25 if rows[0][1] is None else 1.9  # where the others begin, in tiles
    width = start + max(len(others) for _, _, others in rows)
    figure = plt.figure(figsize=(TILE * width, TILE * len(rows)))
    axes = figure.add_axes((0, 0, 1, 1))
    for number, (words, first, others) in enumerate(rows):
        middle = len(rows) - number - 0.5
        axes.text(0.06, middle, words, fontsize=7, va="center", linespacing=1.4)
        if first is not None:
            _show(axes, test.images[first], start - 0.65, middle)
        for place, (row, right) in enumerate(others):
            _show(axes, test.images[row], start + place + 0.5, middle, right if test.labelled else None)
    axes.set(xlim=(0, width), ylim=(0, len(rows)))
    axes.axis("off")
    return figure


def _show(axes: Axes, image: np.ndarray, x: float, y: float, right: bool | None = None) -> None:
    """An image around (x, y); framed by a solid line where it is right, by a dashed one where it is wrong."""
    axes.imshow(image, extent=(x - 0.44, x + 0.44, y - 0.44, y + 0.44))
    if right is not None:
        colour, dash = RIGHT if right else WRONG
        corner = (x - 0.45, y - 0.45)
        axes.add_patch(Rectangle(corner, 0.9, 0.9, fill=False, edgecolor=colour, linestyle=dash, linewidth=1.8))


def _plain(label: str) -> str:
    """A label that matplotlib takes as it is: no mathematics between dollar signs, no leading underscore."""
    return "\u200b" + label.replace("$", r"\$")


def _save(figure: Figure, path: Path) -> None:
    """Write a PNG file whole, with few colours: it is to be small."""
    try:
        with written_whole(path) as beside:
            drawn = io.BytesIO()
            figure.savefig(drawn, format="png", dpi=DPI)
            picture = Image.open(drawn).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
            picture.save(beside, format="PNG", optimize=True)
    finally:
        plt.close(figure)
