"""Which curves the metrics of some runs make: grouped, titled, as numbers by epoch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from utils.runs import scalars

GROUPS = ("Scores on the test half", "Losses", "Clusters", "Speed and settings")
SHARE = re.compile(r"(.*_)?(recall@\d+|nmi(_.+)?|ami|map@r|r_precision)")  # shown in percent
LEAST_SPAN = 0.02  # of the largest value
NAMES = {
    "nmi": "NMI", "ami": "AMI", "map@r": "MAP@R", "r_precision": "R-precision",
    "loss": "Loss (weighted sum)", "metric_loss": "Metric loss", "rim_loss": "Clustering loss (rim)",
    "reconstruction_loss": "Reconstruction loss", "nmi_to_previous_clusters": "NMI to the clusters of the epoch before",
    "lr": "Learning rate", "images_per_second": "Images a second",
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A curve: epochs and values, as many of each; none of a run that lacks the number."""

    label: str
    epochs: list[int]
    values: list[float]


@dataclass(frozen=True)
class Chart:
    """Some lines under a title, a line's place being its style; `group` is one of GROUPS."""

    group: str
    title: str
    lines: list[Line]

    def limits(self) -> tuple[float, float]:
        """Where the axis of the values begins and ends: changes in the last digits are not drawn as mountains."""
        values = [value for line in self.lines for value in line.values]
        low, high = min(values), max(values)
        least = max(abs(low), abs(high)) * LEAST_SPAN or 1
        middle, span = (low + high) / 2, 1.1 * max(high - low, least)
        return middle - span / 2, middle + span / 2


def title_of(name: str) -> str:
    """A metric's name in words, with its unit."""
    if name.startswith("seconds/"):
        return f"Seconds an epoch: {name.removeprefix('seconds/')}"
    words = NAMES.get(name) or re.sub(r"recall@(\d+)$", r"R@\1", name).replace("_", " ")
    return f"{words}, %" if SHARE.fullmatch(name) else words


def value_of(name: str, value: float) -> float:
    """A metric in the unit of its title."""
    return 100 * value if SHARE.fullmatch(name) else value


def charts(runs: Sequence[tuple[str, list[dict]]]) -> list[Chart]:
    """The charts of some runs' metrics (name, rows): one for each number, R@K and seconds of a single run together."""
    names = dict.fromkeys(name for _, rows in runs for row in rows for name in _numbers(row))
    found: dict[str, Chart] = {}
    for name in names:
        lines = [_line(run, name, rows) for run, rows in runs]
        group, title = _group_of(name), title_of(name)
        together = {"recall@": "R@K, %", "seconds/": "Seconds an epoch", "cluster size/": "Images in a cluster"}
        prefix = next((p for p in together if name.startswith(p)), None)
        if len(runs) == 1 and prefix:
            label = title.removesuffix(", %") if prefix == "recall@" else name.removeprefix(prefix)
            line = Line(label, lines[0].epochs, lines[0].values)
            before = found[prefix].lines if prefix in found else []
            found[prefix] = Chart(group, together[prefix], [*before, line])
        else:
            found[name] = Chart(group, title, lines)
    return sorted(found.values(), key=lambda chart: GROUPS.index(chart.group))


def _numbers(row: dict) -> dict[str, float]:
    """`scalars` of a row, and of the sizes of its clusters the smallest and the largest."""
    sizes = row.get("cluster_sizes")
    found = scalars(row)
    if isinstance(sizes, list) and sizes and all(isinstance(size, int) for size in sizes):
        found |= {"cluster size/smallest": min(sizes), "cluster size/largest": max(sizes)}
    return found


def _line(run: str, name: str, rows: list[dict]) -> Line:
    points = [(row["epoch"], value_of(name, _numbers(row)[name])) for row in rows if name in _numbers(row)]
    return Line(run, [epoch for epoch, _ in points], [value for _, value in points])


def _group_of(name: str) -> str:
    if name.endswith("loss"):
        return GROUPS[1]
    if "cluster" in name:
        return GROUPS[2]
    return GROUPS[0] if SHARE.fullmatch(name) else GROUPS[3]
