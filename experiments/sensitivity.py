"""Train a recipe with one option at a time set to several values, and draw what that changes.

    python experiments/sensitivity.py --recipe best --vary t=0.03,0.05,0.1 --vary n_epoch=0,1,2

Runs are kept and resumed as those of experiments/table.py. TABLE.md, .csv and .png show the means,
TABLE.json holds each run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, if run as a script

from experiments import runs, table
from experiments.runs import Row, Setting
from utils.errors import run_script


def main(argv: Sequence[str] | None = None) -> None:
    """Plan all runs, then run what is missing, then write."""
    parser = runs.make_parser("Train a recipe with one option at a time varied.", "sensitivity")
    add = parser.add_argument
    add("--recipe", default="paper", help="a recipe, as train.py takes it")
    text = "OPTION=VALUE,VALUE of train.py; may be given several times"
    add("--vary", action="append", type=vary, required=True, help=text)
    args, shared = runs.parse(parser, argv)
    points = {}
    for option, values in args.vary:
        for value in values:
            name = runs.plain_name(f"{args.recipe}_{option}_{value}")
            row = Row(name, name, (f"--recipe={args.recipe}", f"--{option}={value}"))
            points[row] = {"option": option, "value": value}
    write = partial(write_study, args, points)
    runs.run_tables(args, list(points), shared, write)


def vary(text: str) -> tuple[str, list[str]]:
    """Argparse type: OPTION=VALUE,VALUE,..."""
    option, _, values = text.partition("=")
    if not option or not all(values.split(",")):
        raise argparse.ArgumentTypeError(f"expected OPTION=VALUE,VALUE, got {text!r}")
    return option, values.split(",")


def write_study(
    args: argparse.Namespace, points: dict[Row, dict], setting: Setting, records: Sequence[dict]
) -> None:
    """Write what each value of each option gives."""
    scores = records[0]["scores"]
    titles = table.in_all(table.DRAWN, records)
    lines = []
    texts = [["option", "value", *titles]]
    for row, point in points.items():
        of_row = [record for record in records if record["row"] == row.name]
        line = point | table.summarize(of_row, titles.values())
        lines.append(line)
        texts.append([*point.values(), *table.cells(line, titles.values())])
    about = f"recipe {args.recipe}, {setting.dataset}, {scores['image_size']} px, "
    about += f"{setting.backbone}, in percent, "
    about += f"seeds {', '.join(map(str, args.seeds))}; one option at a time."
    stem = table.stem_of(args, setting.name_of(args.name))
    table.write_results(stem, lines, texts, about, records)
    draw(f"{stem}.png", lines, titles)


def draw(path: str, lines: Sequence[dict], titles: dict[str, str]) -> None:
    """Draw scores over the values of each option, a panel for each."""
    options = list(dict.fromkeys(line["option"] for line in lines))
    figure = Figure(figsize=(3.2 * len(options), 2.9), layout="constrained")
    panels = figure.subplots(1, len(options), sharey=True, squeeze=False)[0]
    for axes, option in zip(panels, options, strict=True):
        of_option = [line for line in lines if line["option"] == option]
        values = [line["value"] for line in of_option]
        for title, name in titles.items():
            means = [line[f"{name}_mean"] for line in of_option]
            errors = [line[f"{name}_std"] or 0 for line in of_option]
            axes.errorbar(values, means, errors, marker="o", capsize=3, label=title)
        axes.set_xlabel(option)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("%")
    panels[0].legend()
    table.save(figure, path)


if __name__ == "__main__":
    run_script(main)
