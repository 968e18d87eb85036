"""Make a page that shows what runs of train.py have learnt: curves, neighbours, clusters, reconstructions, a map."""

from __future__ import annotations

from utils.stopping import StopRequest, interrupt_in_one_line

if __name__ == "__main__":
    interrupt_in_one_line()  # the imports below take a while

import argparse
import sys
from pathlib import Path

from utils.arguments import LARGEST_MEMORY, LARGEST_SEED, Parser, name_of, path_name, whole
from utils.errors import UserError, run_script
from utils.files import check_target, check_writable
from utils.process import share_cores
from utils.runs import BEST, LAST, REPORT


def make_parser() -> Parser:
    """The options."""
    p = Parser(description="Write one HTML page about runs of train.py; it needs no network and no other file.")
    p.add_argument("runs", nargs="*", type=path_name, metavar="RUN_FOLDER",
                   help="a run's folder; several are compared")  # fmt: skip
    p.add_argument("--out", type=path_name, metavar="FILE.html", help=f"default: {REPORT} in the first run's folder")
    p.add_argument("--figures", type=path_name, metavar="DIR",
                   help="also draw curves.png, retrieval.png and clusters.png of the (one) run into this "
                   "folder")  # fmt: skip
    g = p.add_argument_group("what is shown")
    g.add_argument("--checkpoint", type=name_of((LAST, BEST)), default=LAST,
                   help=f"whose images are shown; {BEST} was chosen on the test half, as the page says")  # fmt: skip
    g.add_argument("--queries", type=whole(1, 100), default=8, help="random queries, and as many of the worst")
    g.add_argument("--neighbours", type=whole(1, 50), default=8, help="hits for each query")
    g.add_argument("--clusters", type=whole(1, 200), default=12,
                   help="clusters shown, of as many as there are classes (without labels: K of the run)")  # fmt: skip
    g.add_argument("--map_points", type=whole(3, 5000), default=1500, help="images on all maps of the page together")
    g.add_argument("--seed", type=whole(0, LARGEST_SEED), default=0, help="of queries, k-means, map and samples")
    g = p.add_argument_group("data and machine")
    g.add_argument("--data_dir", type=path_name, help="the folder that holds <dataset>/ (default: that of the run)")
    g.add_argument("--test_batch", type=whole(1), default=100, help="images a batch")
    g.add_argument("--eval_memory_mb", type=whole(1, LARGEST_MEMORY), default=512,
                   help="MiB for searches for neighbours beside the embeddings; changes speed alone")  # fmt: skip
    g.add_argument(
        "--workers", type=whole(0, 1024), default=2, help="threads that cut crops ahead; changes speed alone"
    )
    g.add_argument("--device", type=name_of(("auto", "cpu", "cuda")), default="auto", help="auto: cuda if there is one")
    return p


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The options, and the places to write to, checked before the work."""
    parser = make_parser()
    args = parser.parse(argv)
    if not args.runs:
        parser.error("give the folder of a run, such as new_checkpoint/CBSwR_CUB200")
    if args.figures and len(args.runs) > 1:
        parser.error("--figures draws those of one run; give one RUN_FOLDER")
    args.out = Path(args.out or Path(args.runs[0]) / REPORT)
    try:
        if Path(args.runs[0]).is_dir():  # else the run is what is wrong
            check_target(str(args.out), ".html")
        if args.figures:
            check_writable(Path(args.figures), "choose another folder for --figures")
    except UserError as error:
        parser.error(str(error))
    return args


def main(argv: list[str] | None = None) -> int:
    """Read the options, then do the work."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    share_cores()
    from reports import Options, write_report

    options = Options(args.checkpoint, args.data_dir, args.queries, args.neighbours, args.clusters, args.map_points,
                      args.seed, args.device, args.test_batch, args.workers, args.eval_memory_mb)  # fmt: skip
    figures = Path(args.figures) if args.figures else None
    with StopRequest() as stop, stop.at_once():
        for sentence in write_report([Path(run) for run in args.runs], args.out, options, figures):
            print(sentence)
    print(f"{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB, to be opened in a browser")
    if figures:
        print(f"{figures}: {', '.join(sorted(path.name for path in figures.glob('*.png')))}")
    return 0


if __name__ == "__main__":
    run_script(main)
