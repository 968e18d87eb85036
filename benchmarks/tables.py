"""Write the tables of docs/scaling.md anew from misc/benchmarks/*.json, between their markers."""

from __future__ import annotations

import argparse
import json
import sys

import paired

BENCHMARKS = paired.ROOT / "misc" / "benchmarks"
PAGE = paired.ROOT / "docs" / "scaling.md"
UNITS = {"images": "N images", "rows": "N", "columns": "D", "clusters": "K", "batch": "m"}


def number(value: float) -> str:
    """Three significant digits, whole numbers with separators."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def machine_of(result: dict) -> str:
    """The machine in a few words."""
    facts = result["machine"]
    return facts["gpu"] or f"{facts['cpu']}, {facts['cores']} cores"


def load(name: str) -> dict | None:
    """A benchmark's result, None where it was not run."""
    path = BENCHMARKS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def speed_rows() -> list[list[str]]:
    """What, the rival, seconds of both, the ratio, the machine."""
    rows: list[list[str]] = []

    def add(result: dict, what: str, ways: dict, rivals: list[str], ours: str | None = None) -> None:
        ours = ours or next(iter(ways))
        for rival in rivals:
            ratio = ways[rival]["median_s"] / ways[ours]["median_s"]
            rows.append([what, rival, number(ways[ours]["median_s"]), number(ways[rival]["median_s"]),
                         f"{ratio:.2g}×", machine_of(result)])  # fmt: skip

    for path in sorted(BENCHMARKS.glob("train_step*.json")):
        result = json.loads(path.read_text())
        for backbone in ("googlenet", "resnet18"):
            for ours in ("ours, bf16", "ours, fp32") if backbone in result else ():
                ways = result[backbone]["ways"]
                if ours in ways:
                    what = f"training step, {backbone}, {result[backbone]['rows']} views, {ours[6:]}"
                    add(result, what, ways, ["literal, fp32"], ours)
    for name in ("recall", "kmeans"):
        result = load(name) or {}
        for value in result.values():
            if isinstance(value, dict) and "ways" in value:
                shape = "×".join(map(str, value["shape"]))
                what = f"Recall@K, {shape}" if name == "recall" else f"k-means, {shape}, K = {value['k']}"
                add(result, what, value["ways"], list(value["ways"])[1:])
    result = load("pre_process")
    if result:
        add(result, f"pre-processing, two workers, {result['data']}", result["ways"], list(result["ways"])[1:])
    return rows


def quality_rows() -> list[list[str]]:
    """Inertia and NMI of the ways to cluster."""
    rows, result = [], load("kmeans") or {}
    for value in result.values():
        if isinstance(value, dict) and "ways" in value:
            what = f"{'×'.join(map(str, value['shape']))}, K = {value['k']}"
            for way, found in value["ways"].items():
                nmi = f"{100 * found['mean_nmi']:.1f} ± {100 * found['std_nmi']:.1f}"
                rows.append([what, way, f"{found['inertia_of_ours']:.4f}", nmi])
    return rows


def growth_rows() -> list[list[str]]:
    """Stage, what grows, and for each size seconds and memory."""
    rows, result = [], load("growth") or {}
    for stage, grown in result.items():
        for what, points in grown.items() if isinstance(grown, dict) and stage not in ("machine", "base") else ():
            for point in points:
                memory = point.get("peak_mb_above_start", point.get("largest_process_mb"))
                rows.append([stage, f"{UNITS[what]} = {point[what]:,}", number(point["seconds"]), number(memory),
                             point["what"]])  # fmt: skip
    return rows


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def tables() -> dict[str, str]:
    """The text between the page's markers."""
    speed = markdown(["what", "beside", "ours, s", "theirs, s", "faster", "machine"], speed_rows())
    quality = markdown(["k-means of", "by", "inertia / ours", "NMI, mean ± std of 5 seeds"], quality_rows())
    growth = markdown(["stage", "size", "seconds", "MiB", "what"], growth_rows())
    return {"speed": f"{speed}\n{quality}", "growth": growth}


def placed(page: str, name: str, text: str) -> str:
    """The page with the text between its markers."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, _, rest = page.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"tables.py: error: no {start.strip()} ... {end} in the page")
    return f"{before}{start}{text}{end}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a page is out of date")
    options = parser.parse_args()
    page = fresh = PAGE.read_text(encoding="utf-8")
    for name, text in tables().items():
        fresh = placed(fresh, name, text)
    if fresh == page:
        return 0
    print(f"{PAGE.name}: {'out of date' if options.check else 'written anew'}")
    if not options.check:
        with paired.written_whole(PAGE) as file:
            file.write_text(fresh, encoding="utf-8")
    return int(options.check)


if __name__ == "__main__":
    sys.exit(main())
