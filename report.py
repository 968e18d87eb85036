"""Make a page that shows what runs of train.py have learned: curves, neighbors, clusters, a map."""

from __future__ import annotations

import argparse
from pathlib import Path

import utils.threads  # noqa: F401

from reports.page import write_report
from utils.errors import run_script
from utils.files import check_target, check_writable
from utils.options import LARGEST_SEED, Parser, add_machine, name_of, path_name, target_file, whole
from utils.runs import BEST, LAST, REPORT
from utils.signals import StopRequest


def make_parser() -> Parser:
    """Make the parser of the options."""
    parser = Parser("Write one HTML page about runs of train.py; it needs no other file.")
    add = parser.add_argument
    add("runs", nargs="*", type=path_name, metavar="RUN", help="folders; several are compared")
    page = target_file(".html")
    add("--out", type=page, metavar="FILE.html", help=f"default: {REPORT} in the first folder")
    text = "a run to compare its scores with, such as the untrained one"
    add("--before", type=path_name, metavar="RUN", help=text)
    add("--figures", type=path_name, metavar="DIR", help="also draw PNG files of the (one) run")
    add("--data_dir", type=path_name, help="the folder that holds <dataset>/ (default: the run's)")
    add = parser.add_argument_group("what is shown").add_argument
    add("--checkpoint", type=name_of((LAST, BEST)), default=LAST, help="whose images are shown")
    add("--queries", type=whole(1, 100), default=8, help="random queries, and as many of the worst")
    add("--neighbors", type=whole(1, 50), default=8, help="hits for each query")
    add("--clusters", type=whole(1, 200), default=12, help="of as many as there are classes")
    add("--map_points", type=whole(3, 5000), default=1500, help="images on all maps together")
    add("--seed", type=whole(0, LARGEST_SEED), default=0, help="of queries, k-means and map")
    add_machine(parser)
    return parser


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the options, and check the places to write to before the work begins."""
    parser = make_parser()
    args = parser.parse(argv)
    if not args.runs:
        parser.error("give the folder of a run, such as new_checkpoint/CBSwR_CUB200")
    if args.figures and len(args.runs) > 1:
        parser.error("--figures draws those of one run; give one folder")
    if not args.out:
        args.out = str(Path(args.runs[0]) / REPORT)
        if Path(args.runs[0]).is_dir():  # otherwise the run is what is wrong
            check_target(args.out)
    if args.figures:
        check_writable(Path(args.figures), "choose another folder for --figures")
    return args


def main(argv: list[str] | None = None) -> int:
    """Read the options, write the page, say what is missing in it."""
    args = parse_args(argv)
    out = Path(args.out)
    figures = Path(args.figures) if args.figures else None
    with StopRequest() as stop, stop.at_once():
        runs = [Path(run) for run in args.runs]
        before = Path(args.before) if args.before else None
        for sentence in write_report(runs, out, args, figures, before):
            print(sentence)
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB, to be opened in a browser")
    if figures:
        print(f"{figures}: {', '.join(sorted(path.name for path in figures.glob('*.png')))}")
    return 0


if __name__ == "__main__":
    run_script(main)
