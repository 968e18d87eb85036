"""Runs of train.py and test.py for a table: what is finished is kept, what is not is resumed."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import train
from recipes import CHANGEABLE
from utils.devices import machine
from utils.errors import UserError
from utils.files import write_json
from utils.options import LARGEST_SEED, Parser, folder_name, path_name, whole
from utils.runs import CONFIG, LAST, read_metrics
from utils.signals import Stopped, StopRequest

ROOT = Path(__file__).resolve().parents[1]
PLAN = "plan.json"  # the options of a run, as they were before it began
RESERVED = {"dataset", "backbone", "image_size", "seed", "checkpoint_dir", "model_name", "resume"}
FREE = train.NOT_SAVED | CHANGEABLE - {"lr", "nmi"}  # options in which a kept run may differ
TESTED_WITH = ["dataset", "data_dir", "image_size", "device", "precision", "test_batch", "workers"]
FROZEN_WITH = [*TESTED_WITH, "backbone", "weights", "layers", "pool", "stripes", "flip_eval"]
PATHS = ("weights", "checkpoint", "checkpoint_dir", "data_dir", "log_dir")


class RunFailedError(UserError):
    """A script ended with an error, which it has said itself."""


@dataclass(frozen=True)
class Setting:
    """What all rows of a table share."""

    dataset: str
    backbone: str
    image_size: int | None  # None: the only one

    def name_of(self, table: str) -> str:
        """Return the name of a table's files, and of the folder of its runs."""
        size = [f"{self.image_size}px"] if self.image_size else []
        return plain_name("_".join([self.dataset, *size, self.backbone, table]))


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: the start of the names of its runs.
        title: what the table shows.
        options: of train.py; None: the frozen backbone, which test.py scores.
    """

    name: str
    title: str
    options: tuple[str, ...] | None


@dataclass(frozen=True)
class PlannedRun:
    """A row with one seed: the words for train.py, and the options that they come to."""

    row: Row
    seed: int
    words: list[str]
    options: argparse.Namespace

    @property
    def folder(self) -> Path:
        """Where the run lies."""
        return Path(self.options.checkpoint_dir) / self.options.model_name


def make_parser(description: str, table: str) -> Parser:
    """Make a parser with the options of all tables; `table` is the default name."""
    parser = Parser(f"{description} Options after -- are those of train.py, for all runs.")
    add = parser.add_argument
    add("--dataset", nargs="+", type=folder_name, default=["cub200"], help="a table for each")
    add("--backbone", nargs="+", default=["googlenet"], help="a table for each")
    add("--image_size", nargs="+", type=whole(8), default=[None], help="a table for each")
    add("--seeds", nargs="+", type=whole(0, LARGEST_SEED), default=[1, 2, 3], help="of each row")
    add("--dim", type=whole(1), help="score the first numbers alone, of heads in closed form")
    add("--name", type=folder_name, default=table, help="end of the names of results and folders")
    add("--checkpoint_dir", type=path_name, default="new_checkpoint", help="where runs are kept")
    add("--out_dir", type=path_name, default="misc/results", help="folder of the results")
    return parser


def parse(parser: Parser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of a table, and the words after `--`, for train.py."""
    words = sys.argv[1:] if argv is None else list(argv)
    end = [*words, "--"].index("--")
    args = parser.parse(words[:end])
    args.seeds = list(dict.fromkeys(args.seeds))
    return args, words[end + 1 :]


def run_tables(
    args: argparse.Namespace,
    rows: Sequence[Row],
    shared: Sequence[str],
    write: Callable[[Setting, list[dict]], None],
) -> None:
    """Train and score all runs of all tables, one after the other.

    A run that fails does not keep the next ones from running.

    Args:
        shared: options of train.py for all rows; those of a row stand above them.
        write: writes a table whose runs are complete, from their records (see `complete`).

    Raises UserError before any work for a mistake in the options, and in the end if runs failed.
    """
    failures = []
    for setting, runs in plan(args, rows, shared).items():
        records = []
        for run in runs:
            try:
                records.append(complete(run, args.dim))
            except RunFailedError as failure:
                failures.append(f"{run.folder} ({failure})")
        if len(records) == len(runs):
            write(setting, records)
    if failures:
        again = "the same command tries them again"
        raise UserError(f"{len(failures)} runs failed, {again}: {', '.join(failures)}")


def plan(
    args: argparse.Namespace, rows: Sequence[Row], shared: Sequence[str]
) -> dict[Setting, list[PlannedRun]]:
    """Plan all runs of all tables, so that a mistake in their options ends before any work."""
    check_words(shared, RESERVED | {"recipe"})
    runs: dict[Setting, list[PlannedRun]] = {}
    for values in product(args.dataset, args.backbone, args.image_size):
        pairs = product(args.seeds, rows)
        setting = Setting(*values)
        runs[setting] = [plan_run(args, setting, seed, row, shared) for seed, row in pairs]
    return runs


def plan_run(
    args: argparse.Namespace, setting: Setting, seed: int, row: Row, shared: Sequence[str]
) -> PlannedRun:
    """Plan one run. Raises UserError, or exits, for options that do not work."""
    fixed = vars(setting) | {"seed": seed, "model_name": f"{row.name}_seed{seed}"}
    fixed["checkpoint_dir"] = Path(args.checkpoint_dir) / setting.name_of(args.name)
    row_words = row.options or ()
    check_words(row_words, RESERVED)
    words = [*as_words(fixed), *shared, *row_words]
    options = train.parse_args(words)
    if args.dim and (row.options is None or options.head_init == "random"):
        raise UserError(f"{row.title}: --dim goes with heads in closed form; leave it out")
    return PlannedRun(row, seed, words, options)


def check_words(words: Sequence[str], reserved: set[str]) -> None:
    """Raise UserError for options of train.py that the table itself sets."""
    for word in words:
        if word.startswith("--") and word[2:].partition("=")[0] in reserved:
            raise UserError(f"{word}: not among the options of train.py, as the table sets it")


def complete(run: PlannedRun, dim: int | None) -> dict:
    """Train and score a run, but for what is done already, and return its record.

    The record holds the options, the last epoch's metrics and scores, and the machine.

    dim: how many numbers of the embedding are scored; None: all.
    """
    folder, options = run.folder, vars(run.options)
    planned = {name: v for name, v in options.items() if name not in train.NOT_SAVED}
    if (folder / PLAN).exists():
        check_same(run, read_json(folder / PLAN))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / PLAN, planned)
    suffix = f"_{dim}d" if dim else ""
    record_path = folder / f"record{suffix}.json"
    if record_path.exists():
        record = read_json(record_path)
        if is_complete(run, record["options"].get("n_epoch")):
            return record
    tested = {name: options[name] for name in FROZEN_WITH}
    recorded = tested
    if run.row.options is not None:
        train_to_end(run)
        recorded = read_json(folder / CONFIG)
        tested = {name: options[name] for name in TESTED_WITH}
        tested |= {"checkpoint_path": folder / LAST, "dim": dim}
    if options["nmi"] == "off":
        tested |= {"nmi": "off"}
    scores = folder / f"test{suffix}.json"
    call("test.py", *as_words(tested | {"seed": run.seed, "json": scores}))
    record = {
        "row": run.row.name,
        "title": run.row.title,
        "seed": run.seed,
        "options": without_folders(recorded),
        "machine": machine(),
        "last_epoch": last_epoch(folder),
        "epochs": scored_epochs(folder),
        "scores": without_folders(read_json(scores)),
    }
    write_json(record_path, record)
    return record


def check_same(run: PlannedRun, kept: dict) -> None:
    """Raise UserError if the run that lies in the folder has other options."""
    free = FREE
    if run.options.schedule != "constant":
        free = FREE - {"n_epoch"}  # all rates depend on it
    default = train.make_parser(run.options.method).get_default  # of options younger than the run
    for name, value in vars(run.options).items():
        was = kept.get(name, default(name))
        if name not in free and was != value:
            change = f"{name} {was}, not {value}"
            raise UserError(f"{run.folder}: holds a run with {change}; choose another --name")


def is_complete(run: PlannedRun, n_done: int | None) -> bool:
    """Tell whether a run needs no more epochs: a frozen network's (None), or all of them.

    A recipe trains no epoch on few images; so it is complete unless epochs were asked for.
    """
    is_untrained = n_done == 0 and "n_epoch" not in run.options.given
    return n_done is None or is_untrained or n_done == run.options.n_epoch


def train_to_end(run: PlannedRun) -> None:
    """Train a run to its last epoch, from where it stands."""
    n_epoch = run.options.n_epoch
    n_done = last_epoch(run.folder).get("epoch", -1)
    if n_done > n_epoch:
        raise UserError(f"{run.folder}: has {n_done} epochs, not {n_epoch}; choose another --name")
    if not (run.folder / CONFIG).exists():
        call("train.py", *run.words)
    elif not is_complete(run, n_done):
        changed = {"n_epoch": n_epoch, "data_dir": run.options.data_dir}
        call("train.py", f"--resume={run.folder}", *as_words(changed))


def call(script: str, *words: str) -> None:
    """Run a script of the project; pass a request to stop on to it, and wait for its end.

    Raises RunFailedError if it fails.
    """
    print("$ python", script, *words, flush=True)
    command = [sys.executable, str(ROOT / script), *words]
    with StopRequest() as stop:
        # in a session of its own: Ctrl-C would reach it twice
        process = subprocess.Popen(command, start_new_session=True)
        try:
            with stop.at_once():
                status = process.wait()
        except Stopped:
            process.terminate()
            process.wait()
            raise
    if status:
        raise RunFailedError(f"{script} ended with status {status}")


def as_words(options: dict) -> list[str]:
    """Write options as words of a command line; None and False leave them out."""
    valued = [f"--{k}={v}" for k, v in options.items() if not isinstance(v, bool | None)]
    return valued + [f"--{name}" for name, value in options.items() if value is True]


def plain_name(text: str) -> str:
    """Return a text as the name of a folder or file."""
    return re.sub(r"[^\w.-]+", "_", text).strip("._")


def without_folders(options: dict) -> dict:
    """Return options with the names alone of files: nobody else has these folders."""
    return options | {name: Path(options[name]).name for name in PATHS if options.get(name)}


def read_json(path: Path) -> dict:
    """Read a JSON object."""
    return json.loads(path.read_text(encoding="utf-8"))


def last_epoch(folder: Path) -> dict:
    """Return the metrics of the last epoch that is done, {} if none is."""
    return (read_metrics(folder) or [{}])[-1]


def scored_epochs(folder: Path) -> list[dict]:
    """Return number, R@1 and NMI of all epochs that were scored."""
    rows = [row for row in read_metrics(folder) if "recall@1" in row]
    return [{name: row.get(name) for name in ("epoch", "recall@1", "nmi")} for row in rows]
