"""Write the tables of docs/scaling.md anew, from misc/benchmarks/*.json, between their markers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, if run as a script

from benchmarks.paired import RESULTS
from utils.errors import UserError, run_script
from utils.files import written_whole
from utils.options import Parser

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
WORK = {
    "train_step": "training step",
    "recall": "Recall@K",
    "kmeans": "k-means",
    "decode": "photos to squares",
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
            place = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
            for way, measured in figures["ways"].items():
                seconds = measured["median_s"]
                nmi = ""
                if "nmi_mean" in measured:
                    nmi = f"{100 * measured['nmi_mean']:.1f} ± {100 * measured['nmi_std']:.1f}"
                yield [title, way, number(seconds), f"{seconds / first:.2g}", nmi, place]


def placed(page: str, name: str, lines: Sequence[Sequence[str]]) -> str:
    """Return a page with a table between its markers."""
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
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
    options = parser.parse(list(argv or sys.argv[1:]))
    page = PAGE.read_text(encoding="utf-8")
    fresh = placed(page, "speed", list(speed_lines()))
    if options.check:
        return int(fresh != page)
    with written_whole(PAGE) as beside:
        beside.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_script(main)
