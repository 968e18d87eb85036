"""Train and score the rows of a results table; what is finished is kept, what was stopped is resumed.

For a data set: the frozen backbone, the untrained embedding, CBSwR with the cluster head's pseudo-labels (rim, the
paper's way) and with those of k-means. Every run's settings and metrics go to misc/results/, as does the table,
<dataset>.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/NAME.py` finds the rooms

from utils.runs import nmi_remark, recall_titles  # noqa: E402

METHODS = {"frozen": [], "untrained": ["--n_epoch", "0"], "rim": [], "kmeans": ["--pseudo_labels", "kmeans"]}
TITLES = {
    "frozen": "frozen backbone, pooled features",
    "untrained": "embedding before training",
    "rim": "CBSwR, pseudo-labels of the cluster head (paper)",
    "kmeans": "CBSwR, pseudo-labels of k-means",
}


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="cub200")
    parser.add_argument("--image_size", type=int, default=256, help="pre-processed size to take")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--backbone", default="googlenet")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--n_epoch", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1024)
    parser.add_argument("--checkpoint_dir", default="new_checkpoint")
    parser.add_argument("--out", type=Path, default=ROOT / "misc" / "results")
    parser.add_argument("--note", default="", help="a sentence for the head of the table (what the data sets are)")
    args = parser.parse_args()
    for method in args.methods:
        make_row(args, method)
    write_table(args)


def name_of_run(args: argparse.Namespace, method: str) -> str:
    """The run's folder; another seed, backbone, size or length is another run."""
    return f"{args.dataset}_{args.image_size}px_{method}_{args.backbone}_{args.n_epoch}epochs_seed{args.seed}"


def make_row(args: argparse.Namespace, method: str) -> None:
    """Train (or only score) one row, unless its files are there, and copy them to `args.out`."""
    name = name_of_run(args, method)
    network = ["--backbone", args.backbone, "--weights", args.weights]
    common = ["--dataset", args.dataset, "--image_size", str(args.image_size), "--precision", args.precision]
    args.out.mkdir(parents=True, exist_ok=True)
    scores = args.out / f"{name}.json"
    if scores.exists():
        return
    if method == "frozen":
        call("test.py", *common, *network, "--json", str(scores))
        keep_names_only(scores)
        return
    run = Path(args.checkpoint_dir) / name
    if (run / "last.pth").exists():
        call("train.py", "--resume", str(run))
    else:
        where = ["--checkpoint_dir", args.checkpoint_dir, "--model_name", name, "--seed", str(args.seed)]
        call("train.py", *common, *network, *where, "--n_epoch", str(args.n_epoch), *METHODS[method])
    shutil.copyfile(run / "config.json", args.out / f"{name}.config.json")
    keep_names_only(args.out / f"{name}.config.json")
    shutil.copyfile(run / "metrics.jsonl", args.out / f"{name}.jsonl")
    call("test.py", *common, "--checkpoint_path", str(run / "last.pth"), "--json", str(scores))
    keep_names_only(scores)


def keep_names_only(path: Path) -> None:
    """Of files that were read, keep the names: where they lay is nobody's business."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for key in ("weights", "checkpoint", "checkpoint_dir"):
        if content.get(key):
            content[key] = Path(content[key]).name
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def call(script: str, *arguments: str) -> None:
    """Run a script of the project; its failure ends this one."""
    print("$ python", script, *arguments, flush=True)
    subprocess.run([sys.executable, str(ROOT / script), *arguments], check=True)


def write_table(args: argparse.Namespace) -> None:
    """A Markdown table of the last and the best epoch of every row, with the K of the data set."""
    stems = {method: args.out / name_of_run(args, method) for method in args.methods}
    scores = {m: json.loads(stem.with_name(f"{stem.name}.json").read_text("utf-8")) for m, stem in stems.items()}
    names = recall_titles(scores[args.methods[0]]) | {"NMI": "nmi"}
    lines = [
        "Made by `python benchmarks/results.py`; a run's settings and metrics of every epoch lie beside this file.",
        args.note,
        "",
        f"{args.backbone}, {args.n_epoch} epochs, seed {args.seed}, {args.precision}, {args.image_size} px of "
        f"which the network sees {args.image_size * 7 // 8}. R@K and NMI in percent.",
        "",
        f"| method | {' | '.join(names)} | R@1 of the best epoch (chosen on test) |",
        "|---" * (len(names) + 2) + "|",
    ]
    for method, stem in stems.items():
        cells = (f"{100 * scores[method][key]:.1f}" if key in scores[method] else "" for key in names.values())
        best = best_on_test(stem.with_name(f"{stem.name}.jsonl"))
        lines.append(f"| {TITLES[method]} | {' | '.join(cells)} | {best} |")
    lines += ["", "NMI " + "; ".join(sorted({nmi_remark(last) for last in scores.values()})) + ".", ""]
    (args.out / f"{args.dataset}.md").write_text("\n".join(lines), encoding="utf-8")


def best_on_test(metrics: Path) -> str:
    """R@1 and number of the epoch that the released code would have kept; empty where no epochs were trained."""
    if not metrics.exists():
        return ""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    if len(rows) < 2:
        return ""
    best = max((row for row in rows if "recall@1" in row), key=lambda row: row["recall@1"])
    return f"{100 * best['recall@1']:.1f} (epoch {best['epoch']})"


if __name__ == "__main__":
    main()
