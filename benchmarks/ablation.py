"""Train and score methods over several seeds, and write the table of their means and standard deviations.

    python benchmarks/ablation.py --dataset glyphs --seeds 1 2 3 -- --positives nn --lr 0.02 --n_epoch 8
    python benchmarks/ablation.py --dataset cub200 --methods frozen cbswr stml start best -- --flip_eval

Options after -- are those of train.py, for all methods alike. Every run has a folder of its own in
CHECKPOINT_DIR/NAME/; what is finished there is kept and what was interrupted is resumed, so that the same command goes
on where it was stopped. The last epoch is the one that is scored, by test.py. OUT/NAME.md, .csv and .tex are the table,
NAME.png draws it, NAME.json holds settings, scores and epochs of every run. A new method is a line in METHODS.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402  # its options
from utils.arguments import folder_name, whole  # noqa: E402
from utils.errors import UserError, run_script  # noqa: E402
from utils.files import written_whole  # noqa: E402


@dataclass(frozen=True)
class Method:
    """A row: its title, and the options of train.py that make it; None: the frozen backbone, nothing to train."""

    title: str
    options: tuple[str, ...] | None


METHODS = {
    "frozen": Method("frozen backbone, pooled features", None),
    "untrained": Method("embedding before training", ("--n_epoch=0",)),
    "isif": Method("ISIF (instance softmax)", ("--baseline=isif",)),
    "cbs": Method("CBS (no reconstruction)", ("--baseline=cbs",)),
    "cbswr": Method("CBSwR (the paper's method)", ("--baseline=cbswr",)),
    "kmeans": Method("CBSwR, pseudo-labels of k-means", ("--baseline=kmeans",)),
}
PAPER = tuple(METHODS)
_LABELS = ("--ml=1", "--rim=0", "--recon=0", "--positives=self", "--group=4", "--optimizer=adamw", "--lr=1e-4")
METHODS |= {
    "deepcluster": Method("k-means classification (DeepCluster)", ("--baseline=deepcluster",)),
    "stml": Method("STML", ("--baseline=stml",)),
    "start": Method("recipe best, before training", ("--recipe=best", "--n_epoch=0")),
    "best": Method("recipe best", ("--recipe=best",)),
    "best_own": Method("recipe best, 1 epoch", ("--recipe=best", "--n_epoch=1")),
    "best_contextual": Method(
        "recipe best, 1 epoch, contextual loss instead",
        ("--recipe=best", "--metric_loss=contextual", "--group=4", "--teacher_momentum=1", "--n_epoch=1"),
    ),
    "proxy_anchor": Method("WITH LABELS: Proxy-Anchor", ("--metric_loss=proxy_anchor", *_LABELS)),
    "multi_similarity": Method("WITH LABELS: Multi-Similarity", ("--metric_loss=multi_similarity", *_LABELS)),
    "best_labels": Method(
        "WITH LABELS: recipe best by Multi-Similarity",
        ("--recipe=best", "--metric_loss=multi_similarity", "--group=4"),
    ),
}
SCORES = {
    "R@1": "recall@1", "R@2": "recall@2", "R@4": "recall@4", "R@8": "recall@8", "MAP@R": "map@r", "NMI": "nmi",
    "AMI": "ami",
}  # fmt: skip
TESTED_WITH = ("dataset", "data_dir", "image_size", "test_batch", "eval_memory_mb", "workers", "device", "precision")
ABOUT = {"given", "by_preset"}  # what a namespace says of its options
FREE = train.CHANGEABLE - {"lr"} | ABOUT | {"n_epoch", "checkpoint_dir", "overwrite", "config"}  # of a run found there
FILES = ("weights", "checkpoint", "checkpoint_dir", "data_dir", "log_dir")


def main(argv: list[str] | None = None) -> None:
    """Check all options first, then run what is missing, then write the table."""
    argv = sys.argv[1:] if argv is None else argv
    split = argv.index("--") if "--" in argv else len(argv)
    args = make_parser().parse_args(argv[:split])
    args.name = args.name or f"{args.dataset}_{args.backbone.replace(':', '_')}_ablation"
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds {' '.join(map(str, args.seeds))}: a seed is there twice")
    unordered = [name for name in args.methods if "--recipe=best" not in (METHODS[name].options or ())]
    if args.dim and unordered:
        raise UserError(f"--dim {args.dim}: the numbers of {unordered[0]} have no order; it goes with start and best")
    planned = [(method, seed, plan(args, method, seed, argv[split + 1 :])) for seed in args.seeds
               for method in args.methods]  # fmt: skip
    runs = [made(args, method, seed, command, options) for method, seed, (command, options) in planned]
    write_results(args, runs)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="cub200")
    parser.add_argument("--backbone", default="googlenet")
    parser.add_argument("--methods", nargs="+", default=list(PAPER), choices=list(METHODS), metavar="METHOD",
                        help=f"rows, in this order: {', '.join(METHODS)} (default: the paper's, {', '.join(PAPER)}"
                        ")")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="SEED")
    parser.add_argument("--name", type=folder_name, help="of the results and of the folder of the runs (default: "
                        "<dataset>_<backbone>_ablation)")  # fmt: skip
    parser.add_argument("--dim", type=whole(1), metavar="D", help="score the first D numbers of the embeddings, of "
                        "methods whose head is in closed form; the results are named NAME_Dd")  # fmt: skip
    parser.add_argument("--checkpoint_dir", default="new_checkpoint", help="<name>/ in it holds the runs")
    parser.add_argument("--out", type=Path, default=ROOT / "misc" / "results")
    return parser


def plan(
    args: argparse.Namespace, method: str, seed: int, more: list[str], varied: tuple[str, ...] = ()
) -> tuple[list[str], argparse.Namespace]:
    """The command line of train.py for a run, and the options that it comes to; a mistake in them ends here.

    more: options for all methods alike, below those of the method; varied: (name, value), or (), above them.
    """
    reserved = {"--dataset", "--backbone", "--seed", "--checkpoint_dir", "--model_name", "--resume", "--baseline",
                "--recipe"}  # fmt: skip
    for word in more:
        if word.partition("=")[0] in reserved:
            raise UserError(f"{word.partition('=')[0]} after --: is set by the table; see --help")
    command = [f"--dataset={args.dataset}", f"--backbone={args.backbone}", f"--seed={seed}",
               f"--checkpoint_dir={Path(args.checkpoint_dir) / args.name}",
               f"--model_name={'_'.join([method, *varied])}_seed{seed}",
               *more, *(METHODS[method].options or ())]  # fmt: skip
    if varied:
        command.append(f"--{varied[0]}={varied[1]}")
    return command, train.parse_args(command)


def made(args: argparse.Namespace, method: str, seed: int, command: list[str], options: argparse.Namespace) -> dict:
    """Train and score a run, but for what is done already; all that is known of it."""
    folder = Path(options.checkpoint_dir) / options.model_name
    scores = folder / (f"test_{args.dim}d.json" if args.dim else "test.json")
    dim = [f"--dim={args.dim}"] if args.dim else []
    wanted = {key: value for key, value in vars(options).items() if key not in FREE}
    if "low_dim" in options.by_preset:
        del wanted["low_dim"]  # train.py gives fewer where the features have fewer
    if METHODS[method].options is None:
        network = [f"--backbone={options.backbone}", f"--weights={options.weights}", f"--seed={seed}"]
        if scores.exists():
            check_same(folder, wanted, read_json(folder / "config.json"))
        else:
            folder.mkdir(parents=True, exist_ok=True)
            kept = {key: value for key, value in vars(options).items() if key not in ABOUT}
            write(folder / "config.json", json.dumps(kept, indent=2) + "\n")
            call("test.py", *network, *tested_with(options), f"--json={scores}")
        return {"method": method, "seed": seed, "config": {}, "scores": names_only(read_json(scores)), "epochs": []}
    if (folder / "config.json").exists():
        check_same(folder, wanted, read_json(folder / "config.json"))
        if len(read_lines(folder / "metrics.jsonl")) < max(1, options.n_epoch):
            for stale in folder.glob("test*.json"):
                stale.unlink()
            call("train.py", f"--resume={folder}", f"--n_epoch={options.n_epoch}")
    else:
        call("train.py", *command)
    epochs = read_lines(folder / "metrics.jsonl")
    if len(epochs) > max(1, options.n_epoch):
        raise UserError(f"{folder}: has {len(epochs)} epochs, more than --n_epoch {options.n_epoch}; choose a --name")
    if not scores.exists():
        call("test.py", f"--checkpoint_path={folder / 'last.pth'}", *tested_with(options), *dim, f"--json={scores}")
    config = names_only(read_json(folder / "config.json"))
    return {"method": method, "seed": seed, "config": config, "scores": names_only(read_json(scores)), "epochs": epochs}


def check_same(folder: Path, wanted: dict, found: dict) -> None:
    """Raise UserError where a run lies there with other options; one that it did not know had its default."""
    parser = train.make_parser()
    for name, value in wanted.items():
        then = found.get(name, parser.get_default(name))
        if then != value:
            raise UserError(f"{folder}: holds a run with --{name} {then}, not {value}; choose another --name")


def tested_with(options: argparse.Namespace) -> list[str]:
    """The options of test.py that say what and how."""
    given = [f"--{name}={value}" for name in TESTED_WITH if (value := getattr(options, name)) is not None]
    return [*given, "--flip_eval"] if options.flip_eval else given


def call(script: str, *arguments: str) -> None:
    """Run a script of the project; where it fails, which it has said itself, this one ends with its status."""
    print("$ python", script, *arguments, flush=True)
    status = subprocess.run([sys.executable, str(ROOT / script), *arguments], check=False).returncode
    if status:
        print(f"ablation.py: {script} ended with status {status}; the same command goes on from there", file=sys.stderr)
        sys.exit(status)


def names_only(content: dict) -> dict:
    """Of files and folders keep the names: where they lay is nobody's business."""
    return {key: Path(value).name if key in FILES and value else value for key, value in content.items()}


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict]:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def write(path: Path, text: str) -> None:
    with written_whole(path) as beside:
        beside.write_text(text, encoding="utf-8")


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class Cell:
    """A score of a method in percent: its mean over the seeds and their standard deviation (ddof 1; None of one)."""

    mean: float
    std: float | None
    best: bool = False

    def text(self, sign: str, bold: str) -> str:
        shown = f"{self.mean:.1f}" if self.std is None else f"{self.mean:.1f} {sign} {self.std:.1f}"
        return bold.format(shown) if self.best else shown


def cells_of(runs: list[dict], methods: list[str]) -> dict[str, list[Cell]]:
    """A row of cells for each method; of several the best mean of a column is marked, and what is printed alike."""
    rows: dict[str, list[Cell]] = {method: [] for method in methods}
    for key in SCORES.values():
        values = {m: [100 * run["scores"][key] for run in runs if run["method"] == m] for m in methods}
        means = {m: statistics.fmean(found) for m, found in values.items()}
        best = f"{max(means.values()):.1f}"
        for m, found in values.items():
            std = statistics.stdev(found) if len(found) > 1 else None
            rows[m].append(Cell(means[m], std, len(methods) > 1 and f"{means[m]:.1f}" == best))
    return rows


def markdown(rows: dict[str, list[Cell]], about: str) -> str:
    heads = ["method", *SCORES]
    lines = [heads, ["---"] * len(heads)]
    lines += [[METHODS[m].title, *(cell.text("±", "**{}**") for cell in cells)] for m, cells in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{about}\n"


def latex(rows: dict[str, list[Cell]], about: str) -> str:
    lines = [" & ".join(["method", *SCORES]) + r" \\", r"\midrule"]
    for m, cells in rows.items():
        lines.append(" & ".join([METHODS[m].title, *(c.text(r"$\pm$", r"\textbf{{{}}}") for c in cells)]) + r" \\")
    comment = "% " + about.replace("±", "+-") + "\n% needs \\usepackage{booktabs}\n"
    body = "\n".join([r"\toprule", *lines, r"\bottomrule"])
    return f"{comment}\\begin{{tabular}}{{l{'c' * len(SCORES)}}}\n{body}\n\\end{{tabular}}\n"


def comma_separated(rows: dict[str, list[Cell]], count: int) -> str:
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["method", "n", *(f"{key}_{what}" for key in SCORES.values() for what in ("mean", "std"))])
    for m, cells in rows.items():
        figures = [value for cell in cells for value in (cell.mean, cell.std)]
        table.writerow([m, count, *("" if value is None else f"{value:.4f}" for value in figures)])
    return text.getvalue()


def draw(path: Path, rows: dict[str, list[Cell]]) -> None:
    """Bars of R@1 and NMI, with the standard deviation; the methods from top to bottom."""
    from matplotlib.figure import Figure  # takes a second

    figure = Figure(figsize=(9, 1.2 + 0.32 * len(rows)), layout="constrained")
    for axes, (title, key) in zip(figure.subplots(1, 2, sharey=True), (("R@1", 0), ("NMI", list(SCORES).index("NMI"))),
                                  strict=True):  # fmt: skip
        cells = [cells[key] for cells in rows.values()]
        colours = ["#b9b9b9" if METHODS[m].title.startswith("WITH LABELS") else "#4477aa" for m in rows]
        bars = axes.barh(range(len(rows)), [c.mean for c in cells], xerr=[c.std or 0 for c in cells], color=colours)
        axes.bar_label(bars, fmt="%.1f", padding=3)
        axes.set_yticks(range(len(rows)), [METHODS[m].title for m in rows])
        axes.set_xlabel(f"{title}, %")
        axes.set_xlim(0, 112)
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()
    with written_whole(path) as beside:
        figure.savefig(beside, format="png", dpi=110)


def write_results(args: argparse.Namespace, runs: list[dict]) -> None:
    """The table in three forms, and every run."""
    rows = cells_of(runs, args.methods)
    protocols = "; ".join(sorted({run["scores"]["nmi_protocol"].rpartition(", seed ")[0] for run in runs}))
    trained = [run["config"] for run in runs if run["config"]]
    sizes = ", ".join(sorted({f"{run['scores']['dimension']}-d" for run in runs}))
    most = max((config["n_epoch"] for config in trained), default=0)
    epochs = f"{most} epoch{'s' if most != 1 else ''}"
    spread = "mean ± standard deviation (n - 1) in percent" if len(args.seeds) > 1 else "in percent"
    seeds = f"n = {len(args.seeds)} seed{'s' * (len(args.seeds) > 1)} ({', '.join(map(str, args.seeds))})"
    bold = ", the best mean in bold" if len(rows) > 1 else ""
    flip = ", mirror image averaged" if all(run["scores"]["flip_eval"] for run in runs) else ""
    about = (f"{args.dataset}, {runs[0]['scores']['image_size']} px, {args.backbone}, {sizes}{flip}, {epochs}, "
             f"the last one scored; {spread}, {seeds}{bold}. NMI and AMI by {protocols}.")  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"{args.name}_{args.dim}d" if args.dim else args.name
    content = {"about": about, "runs": runs}
    write(args.out / f"{name}.json", json.dumps(content, indent=1, sort_keys=True) + "\n")
    write(args.out / f"{name}.csv", comma_separated(rows, len(args.seeds)))
    write(args.out / f"{name}.tex", latex(rows, about))
    draw(args.out / f"{name}.png", rows)
    write(args.out / f"{name}.md", table := markdown(rows, about))
    print(table, end="")


if __name__ == "__main__":
    run_script(main)
