"""Which curves the metrics of some runs make: grouped, titled, as numbers by epoch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from utils.runs import scalars

SCORES = "Scores on the test half"
LOSSES = "Losses"
CLUSTERS = "Clusters"
SETTINGS = "Speed and settings"
GROUPS = (SCORES, LOSSES, CLUSTERS, SETTINGS)
SHARE = re.compile(r"(.*_)?(recall@\d+|nmi(_.+)?|ami)")  # shown in percent
LEAST_SPAN = 0.02  # of the largest value
NAMES = {
    "nmi": "NMI",
    "ami": "AMI",
    "loss": "Loss (weighted sum)",
    "metric_loss": "Metric loss",
    "rim_loss": "Clustering loss (rim)",
    "reconstruction_loss": "Reconstruction loss",
    "nmi_to_previous_clusters": "NMI to the clusters of the epoch before",
    "lr": "Learning rate",
    "views_per_second": "Views a second",
}
TOGETHER = {  # kinds of numbers that share a chart in the report of a single run
    "recall": "R@K, %",
    "seconds": "Seconds an epoch",
    "cluster size": "Images in a cluster",
}


@dataclass(frozen=True)
class Line:
    """A curve: epochs and values, as many of each; none for a run that lacks the number."""

    label: str
    epochs: list[int]
    values: list[float]


@dataclass(frozen=True)
class Chart:
    """Some lines under a title. The place of a line decides its style; `group` is one of GROUPS."""

    group: str
    title: str
    lines: list[Line]

    def varies(self) -> bool:
        """Return whether some line has two different values: others are no news."""
        return any(len(set(line.values)) > 1 for line in self.lines)

    def limits(self) -> tuple[float, float]:
        """Return the ends of the value axis, never so near that small changes look large."""
        values = [value for line in self.lines for value in line.values]
        low = min(values)
        high = max(values)
        least = max(abs(low), abs(high)) * LEAST_SPAN or 1
        span = 1.1 * max(high - low, least)
        middle = (low + high) / 2
        return middle - span / 2, middle + span / 2


def title_of(name: str) -> str:
    """Return a metric's name in words, with its unit."""
    if name.startswith("seconds/"):
        return f"Seconds an epoch: {name.removeprefix('seconds/')}"
    words = NAMES.get(name) or re.sub(r"recall@(\d+)$", r"R@\1", name).replace("_", " ")
    return f"{words}, %" if SHARE.fullmatch(name) else words


def value_of(name: str, value: float) -> float:
    """Return a metric in the unit of its title."""
    return 100 * value if SHARE.fullmatch(name) else value


def charts(runs: Sequence[tuple[str, list[dict]]]) -> list[Chart]:
    """Return the charts of some runs (name, rows of metrics), in the order of GROUPS.

    There is a chart for each number. R@K, seconds and cluster sizes of a single run share one each.
    """
    numbers = [(run, [(row["epoch"], _numbers(row)) for row in rows]) for run, rows in runs]
    names = dict.fromkeys(name for _, rows in numbers for _, row in rows for name in row)
    by_title: dict[str, Chart] = {}
    for name in names:
        kind, _, label = name.replace("recall@", "recall/R@").partition("/")
        is_shared = kind in TOGETHER and len(runs) == 1
        title = TOGETHER[kind] if is_shared else title_of(name)
        chart = by_title.setdefault(title, Chart(_group_of(name), title, []))
        for run, rows in numbers:
            points = {epoch: value_of(name, row[name]) for epoch, row in rows if name in row}
            words = label if is_shared else run
            chart.lines.append(Line(words, list(points), list(points.values())))
    return sorted(by_title.values(), key=lambda chart: GROUPS.index(chart.group))


def _numbers(row: dict) -> dict[str, float]:
    """Return the `scalars` of a row, and the smallest and the largest of its cluster sizes."""
    sizes = row.get("cluster_sizes")
    if not sizes:
        return scalars(row)
    return scalars(row) | {"cluster size/smallest": min(sizes), "cluster size/largest": max(sizes)}


def _group_of(name: str) -> str:
    if name.endswith("loss"):
        return LOSSES
    if "cluster" in name:
        return CLUSTERS
    return SCORES if SHARE.fullmatch(name) else SETTINGS
