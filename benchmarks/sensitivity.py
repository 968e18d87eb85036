"""Train a method with one option at a time set to several values, and draw what that changes.

    python benchmarks/sensitivity.py --dataset cub200 --method cbswr --vary n_cluster=16,32,64 --vary t=0.05,0.1,0.2
    python benchmarks/sensitivity.py --dataset cub200 --method best --vary low_dim=64,128,256 --vary n_epoch=0,1,2,3

Methods are those of benchmarks/ablation.py, options after -- are those of train.py, for all runs alike. Runs are kept
and resumed as there, in CHECKPOINT_DIR/NAME/. --vary n_epoch takes one run, of the most epochs: rates are constant, so
that each of its epochs is the last one of a shorter run (0: a run of its own). Writes OUT/NAME.csv, .md, .json and a
plot, NAME.png.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import ablation  # noqa: E402
from utils.arguments import folder_name  # noqa: E402
from utils.errors import UserError, run_script  # noqa: E402
from utils.files import written_whole  # noqa: E402

SCORES = {"R@1": "recall@1", "NMI": "nmi"}


def main(argv: list[str] | None = None) -> None:
    """Check all options first, then run what is missing, then write."""
    argv = sys.argv[1:] if argv is None else argv
    split = argv.index("--") if "--" in argv else len(argv)
    args, more = make_parser().parse_args(argv[:split]), argv[split + 1 :]
    args.name = args.name or f"{args.dataset}_{args.backbone.replace(':', '_')}_sensitivity_{args.method}"
    planned = [
        (option, value, seed, ablation.plan(args, args.method, seed, more, (option, trained)))
        for option, values in args.vary.items()
        for value, trained in with_run(option, values)
        for seed in args.seeds
    ]
    points = []
    for option, value, seed, (command, options) in planned:
        run = ablation.made(args, args.method, seed, command, options)
        scores = run["scores"]
        if option == "n_epoch" and value != "0":
            (scores,) = [row for row in run["epochs"] if row["epoch"] == int(value)]
            if "recall@1" not in scores:
                raise UserError(f"epoch {value} was not scored; --vary n_epoch needs --interval 1")
        points.append({"option": option, "value": value, "seed": seed, "config": run["config"],
                       **{name: scores[name] for name in SCORES.values()}})  # fmt: skip
    write_results(args, points)


def with_run(option: str, values: list[str]) -> list[tuple[str, str]]:
    """For each value that of the run which has its scores."""
    if option != "n_epoch":
        return [(value, value) for value in values]
    if not all(value.isascii() and value.isdigit() for value in values):
        raise UserError(f"--vary n_epoch={','.join(values)}: takes whole numbers")
    most = max(values, key=int)
    return [(value, "0" if int(value) == 0 else most) for value in values]


def varied(text: str) -> tuple[str, list[str]]:
    """An argparse type: NAME=VALUE,VALUE."""
    name, _, values = text.partition("=")
    found = values.split(",")
    if not name or not all(found) or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"expected OPTION=VALUE,VALUE,... with different values, not {text!r}")
    return name.lstrip("-"), found


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="cub200")
    parser.add_argument("--backbone", default="googlenet")
    parser.add_argument("--method", default="cbswr", metavar="METHOD",
                        choices=[name for name, method in ablation.METHODS.items() if method.options is not None],
                        help="of benchmarks/ablation.py: %(choices)s")  # fmt: skip
    parser.add_argument("--vary", type=varied, action=_Collect, required=True, metavar="OPTION=VALUE,VALUE,...",
                        help="an option of train.py and its values; may be given several times")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], metavar="SEED")
    parser.add_argument("--name", type=folder_name, help="of the results and of the folder of the runs (default: "
                        "<dataset>_<backbone>_sensitivity_<method>)")  # fmt: skip
    parser.add_argument("--checkpoint_dir", default="new_checkpoint", help="<name>/ in it holds the runs")
    parser.add_argument("--out", type=Path, default=ROOT / "misc" / "results")
    parser.set_defaults(dim=None)  # of the tables that ablation.py makes
    return parser


class _Collect(argparse.Action):
    """Collects (name, values) in a dictionary."""

    def __call__(self, parser, namespace, value, option_string=None) -> None:
        found = dict(getattr(namespace, self.dest) or {})
        if value[0] in found:
            parser.error(f"--vary {value[0]}: is there twice")
        setattr(namespace, self.dest, found | {value[0]: value[1]})


def summary(points: list[dict]) -> list[dict]:
    """A line for every option and value: mean and standard deviation (ddof 1; None of one) in per cent."""
    lines = []
    for option, value in dict.fromkeys((point["option"], point["value"]) for point in points):
        own = [point for point in points if (point["option"], point["value"]) == (option, value)]
        line = {"option": option, "value": value, "n": len(own)}
        for name in SCORES.values():
            found = [100 * point[name] for point in own]
            line[f"{name}_mean"] = statistics.fmean(found)
            line[f"{name}_std"] = statistics.stdev(found) if len(found) > 1 else None
        lines.append(line)
    return lines


def write_results(args: argparse.Namespace, points: list[dict]) -> None:
    """The table as CSV and Markdown, the plot, and every run."""
    lines = summary(points)
    args.out.mkdir(parents=True, exist_ok=True)
    about = (f"{ablation.METHODS[args.method].title}, {args.dataset}, {args.backbone}, in percent, seeds "
             f"{', '.join(map(str, args.seeds))}; one option at a time.")  # fmt: skip
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    table.writeheader()
    table.writerows({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in line.items()} for line in lines)
    ablation.write(args.out / f"{args.name}.csv", text.getvalue())
    rows = ["| option | value | R@1 | NMI |", "|---|---|---|---|"]
    for line in lines:
        cells = [ablation.Cell(line[f"{s}_mean"], line[f"{s}_std"]).text("±", "{}") for s in SCORES.values()]
        rows.append(f"| {line['option']} | {line['value']} | {' | '.join(cells)} |")
    ablation.write(args.out / f"{args.name}.md", "\n".join([*rows, "", about]) + "\n")
    content = {"about": about, "points": points}
    ablation.write(args.out / f"{args.name}.json", json.dumps(content, indent=1, sort_keys=True) + "\n")
    draw(args.out / f"{args.name}.png", lines)
    print((args.out / f"{args.name}.md").read_text(encoding="utf-8"), end="")


def draw(path: Path, lines: list[dict]) -> None:
    """R@1 and NMI over the values of an option, a panel for each."""
    from matplotlib.figure import Figure  # takes a second

    options = list(dict.fromkeys(line["option"] for line in lines))
    figure = Figure(figsize=(3.2 * len(options), 2.9), layout="constrained")
    panels = figure.subplots(1, len(options), sharey=True, squeeze=False)[0]
    for axes, option in zip(panels, options, strict=True):
        own = [line for line in lines if line["option"] == option]
        for title, name in SCORES.items():
            axes.errorbar([line["value"] for line in own], [line[f"{name}_mean"] for line in own],
                          [line[f"{name}_std"] or 0 for line in own], marker="o", capsize=3, label=title)  # fmt: skip
        axes.set_xlabel(option)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("%")
    panels[0].legend()
    with written_whole(path) as beside:
        figure.savefig(beside, format="png", dpi=110)


if __name__ == "__main__":
    run_script(main)
