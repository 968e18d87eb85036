"""Train recipes over several seeds, and write the table of their scores.

    python experiments/table.py --dataset glyphs --backbone resnet_small -- --weights none --lr 0.02
    python experiments/table.py --dataset cub200 car196 --rows frozen start best -- --flip_eval
    python experiments/table.py --row "t 0.05: --recipe best --t 0.05" --row "t 0.1: --recipe best"

A row is a recipe, one of SPECIAL, or a title with options of train.py. Each data set, backbone and
image size has a table, DATASET_SIZEpx_BACKBONE_NAME; several have an overview, too, NAME.md. Runs
lie in CHECKPOINT_DIR/TABLE/. The same command goes on where it was stopped: what is finished is
kept, the rest is resumed. The last epoch is scored, by test.py; with --val_classes the held-out
classes are, too, if all rows train. TABLE.md, .csv and .tex show means and standard deviations,
TABLE_epochs.png every epoch; TABLE.json holds options, scores and machine of each run.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, if run as a script

from experiments import runs
from experiments.runs import Row, Setting, plain_name
from utils.errors import run_script
from utils.evaluation import nmi_remark, recall_titles
from utils.files import write_json, write_text, written_whole
from utils.tables import markdown_table

SPECIAL = {
    "frozen": None,
    "untrained": ("--recipe=paper", "--n_epoch=0"),
    "start": ("--recipe=best", "--n_epoch=0"),
}
PAPER = ("frozen", "untrained", "isif", "cbs", "paper", "kmeans")
TITLES = {
    "frozen": "frozen backbone, pooled features",
    "untrained": "embedding before training",
    "start": "recipe best, before training",
    "isif": "ISIF (instance softmax)",
    "cbs": "CBS (no reconstruction)",
    "paper": "CBSwR (the paper's method)",
    "kmeans": "CBSwR, pseudo-labels of k-means",
    "deepcluster": "DeepCluster-v2",
    "stml": "STML",
    "best_contextual": "contextual loss from the recipe's start",
    "proxy_anchor": "WITH LABELS: Proxy-Anchor",
    "multi_similarity": "WITH LABELS: Multi-Similarity",
    "best_labels": "WITH LABELS: Multi-Similarity from the recipe's start",
}
PUBLISHED = {  # R@1 / NMI in the paper, with GoogLeNet
    ("cub200", "paper"): "47.5 / 55.9",
    ("cub200", "isif"): "46.2",
    ("car196", "paper"): "45.6 / 37.6",
    ("car196", "isif"): "41.3",
}
MORE_SCORES = {"MAP@R": "map@r", "NMI": "nmi", "AMI": "ami"}  # beside R@K
MORE_SCORES |= {"held-out R@1": "val_recall@1", "held-out NMI": "val_nmi"}
DRAWN = {"R@1": "recall@1", "NMI": "nmi"}


def main(argv: Sequence[str] | None = None) -> None:
    """Plan all runs, then run what is missing, then write the tables."""
    parser = runs.make_parser("Train recipes over several seeds; write tables.", "table")
    add = parser.add_argument
    names = f"recipes, or {', '.join(SPECIAL)} (default, without --row: those of the paper)"
    add("--rows", nargs="+", type=recipe_row, default=[], help=names)
    text = '"TITLE: OPTIONS", a row by options of train.py; may be given several times'
    add("--row", action="append", type=option_row, default=[], help=text)
    args, shared = runs.parse(parser, argv)
    rows = list(dict.fromkeys(args.rows + args.row)) or [recipe_row(name) for name in PAPER]
    overview = [["data set", "px", "backbone", *(row.title for row in rows)]]

    def write_one(setting: Setting, records: Sequence[dict]) -> None:
        lines = write_table(args, setting, rows, records)
        place = [setting.dataset, str(records[0]["scores"]["image_size"]), setting.backbone]
        overview.append([*place, *(" / ".join(cells(line, DRAWN.values())) for line in lines)])
        if len(args.dataset) * len(args.backbone) * len(args.image_size) > 1:
            write_text(
                f"{stem_of(args, args.name)}.md", markdown(overview, "R@1 / NMI in percent.")
            )

    runs.run_tables(args, rows, shared, write_one)


def recipe_row(name: str) -> Row:
    """Argparse type: the row of a recipe, or one of SPECIAL."""
    options = SPECIAL.get(name, (f"--recipe={name}",))
    return Row(plain_name(name), TITLES.get(name, f"recipe {name}"), options)


def option_row(text: str) -> Row:
    """Argparse type: the row "TITLE: OPTIONS"."""
    title, start, options = text.partition(": --")
    if not start or not plain_name(title):
        raise argparse.ArgumentTypeError(f'expected "TITLE: OPTIONS of train.py", got {text!r}')
    return Row(plain_name(title), title, tuple(shlex.split(f"--{options}")))


# --------------------------------------------------------------------------------- the figures


def summarize(records: Sequence[dict], names: Iterable[str]) -> dict:
    """Return mean and standard deviation (n - 1; None of one run) of scores in percent."""
    line: dict = {"n": len(records)}
    for name in names:
        percents = [100 * scores_of(record)[name] for record in records]
        line[f"{name}_mean"] = statistics.fmean(percents)
        line[f"{name}_std"] = None
        if len(percents) > 1:
            line[f"{name}_std"] = statistics.stdev(percents)
    return line


def scores_of(record: dict) -> dict:
    """Return the scores of a run: by test.py, and of held-out classes those of the last epoch."""
    return record["last_epoch"] | record["scores"]


def in_all(titles: dict[str, str], records: Sequence[dict]) -> dict[str, str]:
    """Return those scores, by title, that all runs have."""
    return {t: n for t, n in titles.items() if all(n in scores_of(record) for record in records)}


def cells(line: dict, names: Iterable[str], best: dict | None = None) -> list[str]:
    """Return scores of a line as tables show them; those that print as the best are bold."""
    texts = []
    for name in names:
        if f"{name}_mean" not in line:
            continue
        text = f"{line[f'{name}_mean']:.1f}"
        is_best = best is not None and text == f"{best[name]:.1f}"
        if line[f"{name}_std"] is not None:
            text += f" ± {line[f'{name}_std']:.1f}"
        texts.append(f"**{text}**" if is_best else text)
    return texts


def write_table(
    args: argparse.Namespace, setting: Setting, rows: Sequence[Row], records: Sequence[dict]
) -> list[dict]:
    """Write a table in all its forms, and return its lines of numbers."""
    titles = recall_titles(records[0]["scores"]) | MORE_SCORES
    titles = in_all(titles, records)
    if args.dim:  # training scored held-out classes by all numbers
        titles = {title: n for title, n in titles.items() if not n.startswith("val_")}
    names = titles.values()
    lines = []
    for row in rows:
        of_row = [record for record in records if record["row"] == row.name]
        lines.append({"method": row.name, **summarize(of_row, names)})
    best = None
    if len(rows) > 1:
        best = {name: max(line[f"{name}_mean"] for line in lines) for name in names}
    texts = [["method", *titles]]
    for row, line in zip(rows, lines, strict=True):
        texts.append([row.title, *cells(line, names, best)])
    if setting.backbone == "googlenet" and setting.dataset in {key[0] for key in PUBLISHED}:
        texts[0].append("R@1 / NMI in the paper (uncropped, 256 px, 128-d)")
        for row, text in zip(rows, texts[1:], strict=True):
            text.append(PUBLISHED.get((setting.dataset, row.name), ""))
    about = describe(args, setting, records)
    stem = stem_of(args, setting.name_of(args.name))
    write_text(f"{stem}.tex", latex(texts, about))
    write_results(stem, lines, texts, about, records)
    if any(len(record.get("epochs", [])) > 1 for record in records):
        draw_epochs(f"{stem}_epochs.png", records)
    return lines


def describe(args: argparse.Namespace, setting: Setting, records: Sequence[dict]) -> str:
    """Describe what the figures of a table are."""
    scores = [record["scores"] for record in records]
    parts = [setting.dataset, f"{scores[0]['image_size']} px", setting.backbone]
    parts += [f"{size}-d" for size in sorted({score["dimension"] for score in scores})]
    if all(score["flip_eval"] for score in scores):
        parts.append("mirror image averaged")
    epochs = sorted({record["last_epoch"].get("epoch", 0) for record in records} - {0})
    if epochs:
        plural = "s" * (epochs != [1])
        parts.append(f"{' or '.join(map(str, epochs))} epoch{plural}, the last one scored")
    several = len(args.seeds) > 1
    spread = "mean ± standard deviation (n - 1) " * several
    seeds = f"n = {len(args.seeds)} seed{'s' * several} ({', '.join(map(str, args.seeds))})"
    bold = ", the best mean in bold" * (len(records) > len(args.seeds))
    nmi = "; ".join(sorted({nmi_remark(score).partition(", seed ")[0] for score in scores}))
    return f"{', '.join(parts)}; {spread}in percent, {seeds}{bold}. NMI and AMI {nmi}."


# --------------------------------------------------------------------------------- the files


def stem_of(args: argparse.Namespace, name: str) -> str:
    """Return the path of result files, without ending; make their folder."""
    Path(args.out_dir).mkdir(parents=True, exist_ok=True)
    return f"{args.out_dir}/{name}_{args.dim}d" if args.dim else f"{args.out_dir}/{name}"


def write_results(
    stem: str,
    lines: Sequence[dict],
    texts: Sequence[Sequence[str]],
    about: str,
    records: Sequence[dict],
) -> None:
    """Write numbers as CSV, texts as Markdown, and all that is known of the runs as JSON."""
    write_json(f"{stem}.json", {"about": about, "runs": records})
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    table.writeheader()
    for line in lines:
        table.writerow(line | {k: f"{v:.4f}" for k, v in line.items() if isinstance(v, float)})
    write_text(f"{stem}.csv", text.getvalue())
    write_text(f"{stem}.md", markdown(texts, about))
    print(markdown(texts, about), end="")


def markdown(texts: Sequence[Sequence[str]], about: str) -> str:
    """Return a table, its heads first, with a text below."""
    return f"{markdown_table(texts)}\n{about}\n"


def latex(texts: Sequence[Sequence[str]], about: str) -> str:
    """Return a table for LaTeX."""
    escaped = ([re.sub(r"([%$#_&])", r"\\\1", cell) for cell in line] for line in texts)
    text = "\n".join(" & ".join(line) + r" \\" for line in escaped).replace("±", r"$\pm$")
    text = re.sub(r"\*\*(.*?)\*\*", r"\\textbf{\1}", text)
    heads, _, body = text.partition("\n")
    columns = "l" + "c" * (len(texts[0]) - 1)
    lines = [
        f"% {about.replace('±', '+-')}",
        r"% needs \usepackage{booktabs}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        heads,
        r"\midrule",
        body,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def draw_epochs(path: str, records: Sequence[dict]) -> None:
    """Draw R@1 and NMI over epochs: a line for each run, dashed at the score of a single one.

    All runs of a row have its color.
    """
    drawn = in_all(DRAWN, records)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, len(drawn), squeeze=False)[0]
    titles = list(dict.fromkeys(record["title"] for record in records))
    for axes, (title, name) in zip(panels, drawn.items(), strict=True):
        for record in records:
            look = {"color": f"C{titles.index(record['title'])}", "label": record["title"]}
            epochs = [row for row in record.get("epochs", []) if row[name] is not None]
            if len(epochs) > 1:
                numbers = [row["epoch"] for row in epochs]
                axes.plot(numbers, [100 * row[name] for row in epochs], **look)
            else:
                axes.axhline(100 * record["scores"][name], linestyle="--", **look)
        axes.set_xlabel("epoch")
        axes.set_ylabel(f"{title}, %")
        axes.spines[["top", "right"]].set_visible(False)
    handles = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    save(figure, path)


def save(figure: Figure, path: str) -> None:
    """Write a figure as PNG, whole."""
    with written_whole(path) as beside:
        figure.savefig(beside, format="png", dpi=110)


if __name__ == "__main__":
    run_script(main)
