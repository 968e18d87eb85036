"""Write the tables of docs/scaling.md anew, from misc/benchmarks/*.json, between their markers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, if run as a script

from benchmarks.paired import RESULTS
from utils.errors import UserError, run_script
from utils.files import write_text
from utils.options import Parser
from utils.tables import markdown_table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
WORK = {
    "train_step": "training step",
    "recall": "Recall@K",
    "kmeans": "k-means",
    "decode": "photos to squares",
    "inference": "features",
}


def number(value: float) -> str:
    """Return three digits, or a whole number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def cases_of(name: str) -> Iterator[tuple[dict, str, dict]]:
    """Yield the machine, name and figures of each case of a benchmark, on whatever machine."""
    for path in sorted(RESULTS.glob(f"{name}*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        machine = result.pop("machine")
        cases = {case: figures for case, figures in result.items() if isinstance(figures, dict)}
        for case, figures in cases.items():
            yield machine, case, figures


def speed_lines() -> Iterator[list[str]]:
    """Yield a line for each way to do each work; the first way is this project's."""
    yield ["work", "by", "seconds", "times the first", "NMI", "machine"]
    for name, work in WORK.items():
        for machine, case, figures in cases_of(name):
            first = next(iter(figures["ways"].values()))["median_s"]
            shape = "×".join(map(str, figures.get("shape", ())))
            title = ", ".join(filter(None, (work, case, shape)))
            for way, measured in figures["ways"].items():
                seconds = measured["median_s"]
                nmi = ""
                if "nmi_mean" in measured:
                    nmi = f"{100 * measured['nmi_mean']:.1f} ± {100 * measured['nmi_std']:.1f}"
                times = number(seconds), f"{seconds / first:.2g}"
                yield [title, way, *times, nmi, place_of(machine)]


def scale_lines() -> Iterator[list[str]]:
    """Yield a line for each way to cluster or to find neighbors, at each number of images."""
    yield ["images", "by", "seconds", "MiB beside the rows", "inertia", "recall", "machine"]
    for machine, case, figures in cases_of("scale"):
        for way, measured in figures["ways"].items():
            inertia = f"{measured['inertia']:.4f}" if "inertia" in measured else ""
            recall = f"{100 * measured['recall']:.1f}" if "recall" in measured else ""
            times = number(measured["median_s"]), number(measured["memory_mb"])
            yield [case.removesuffix(" images"), way, *times, inertia, recall, place_of(machine)]


def index_lines() -> Iterator[list[str]]:
    """Yield a line for each kind of index and effort, at each number of rows."""
    names = ["build_s", "build_memory_mb", "file_mb", "queries_per_second", "one_query_ms"]
    yield [
        "rows",
        "index",
        *("build, s", "build, MiB", "file, MiB", "queries/s", "one query, ms"),
        "recall@10, %",
        "machine",
    ]
    for machine, case, figures in cases_of("index"):
        for way, measured in figures["ways"].items():
            numbers = [number(measured[name]) for name in names]
            recall = f"{100 * measured['recall']:.1f}"
            yield [case.removesuffix(" rows"), way, *numbers, recall, place_of(machine)]


def stage_lines() -> Iterator[list[str]]:
    """Yield a line for each command: its seconds, and the shares of its stages."""
    yield ["command", "seconds", "shares in percent", "machine"]
    for path in sorted(RESULTS.glob("stages_*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        total = sum(result["stages"].values())
        shares = {name: round(100 * value / total) for name, value in result["stages"].items()}
        texts = [f"{name} {share}" for name, share in shares.items() if share]
        machine = place_of(result["machine"])
        yield [f"`{result['command']}`", number(total), "; ".join(texts), machine]


def place_of(machine: dict) -> str:
    """Return the name of a machine: its GPU, or its processor and the number of threads."""
    return machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"


TABLES = {
    "speed": speed_lines,
    "scale": scale_lines,
    "index": index_lines,
    "stages": stage_lines,
}


def placed(page: str, name: str, lines: Sequence[Sequence[str]]) -> str:
    """Return a page with a table between its markers."""
    table = markdown_table(lines)
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, _, rest = page.partition(start)
    _, marker, after = rest.partition(end)
    if not marker:
        raise UserError(f"{PAGE}: {start.strip()} ... {end} are missing; put them back")
    return f"{before}{start}{table}{end}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; with --check only say, by the exit status, whether it would change."""
    parser = Parser("Write the tables of docs/scaling.md from misc/benchmarks/*.json.")
    parser.add_argument("--check", action="store_true", help="exit status 1 if they are old")
    options = parser.parse(argv)
    page = PAGE.read_text(encoding="utf-8")
    fresh = page
    for name, lines in TABLES.items():
        fresh = placed(fresh, name, list(lines()))
    if options.check:
        return int(fresh != page)
    write_text(PAGE, fresh)
    return 0


if __name__ == "__main__":
    run_script(main)
