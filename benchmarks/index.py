"""Search among many rows by the kinds of index of search.py: queries a second against recall.

    python benchmarks/index.py --embeddings photos.npy --sizes 1000000 --folder big

Rows are drawn as in benchmarks/scale.py and lie in a float16 file in the folder, as those of
`embed.py --half`. Each index is built and written by one process, and searched, memory-mapped, by
another.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, if run as a script

from benchmarks import paired
from benchmarks.scale import TINY, many_rows, peak_memory, width_of
from utils.errors import run_script
from utils.index import Index, faiss
from utils.options import path_name, whole

K = 10  # neighbors that are asked for
N_QUERIES = 1000
NPROBES = (4, 16, 64)
KINDS = ("exact", "ivf")


def build(rows_file: Path, kind: str, file: Path) -> dict[str, float]:
    """Build an index and write it: seconds, peak memory and size in MiB."""
    started = time.perf_counter()
    index = Index(np.load(rows_file, mmap_mode="r"), kind)
    if index.faiss is not None:
        faiss.write_index(index.faiss, str(file))
    seconds = time.perf_counter() - started
    return {
        "build_s": round(seconds, 1),
        "build_memory_mb": round(peak_memory()),
        "file_mb": round(file.stat().st_size / 2**20) if file.exists() else 0,
    }


def search(rows_file: Path, kind: str, file: Path, turns: int, drawn: np.ndarray) -> list[dict]:
    """Search with each effort (see `searched`)."""
    rows = np.load(rows_file, mmap_mode="r")
    queries = rows[np.sort(drawn)].astype(np.float32)
    results = []
    for nprobe in (1,) if kind == "exact" else NPROBES:
        opened = None
        if kind != "exact":
            opened = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)
        efforts = {"nprobe": nprobe, "ef_search": 4 * nprobe}
        index = Index(rows, kind, opened=opened, **efforts)
        results.append(efforts | searched(index, queries, turns))
    return results


def searched(index: Index, queries: np.ndarray, turns: int) -> dict[str, float]:
    """Return queries a second, all at once, milliseconds of one alone, recall, peak memory."""
    times = [paired.seconds(lambda: index.search(queries, K)) for _ in range(1 + turns)][1:]
    few = queries[:: max(1, len(queries) // 50)]
    alone = paired.seconds(lambda: [index.search(query[None], K) for query in few])
    memory = peak_memory()
    summary = paired.summary(times)
    return summary | {
        "queries_per_second": round(len(queries) / summary["median_s"], 1),
        "one_query_ms": round(1000 * alone / len(few), 2),
        "recall": round(index.recall(K)[0], 4),
        "memory_mb": round(memory),
    }


def measure(options: argparse.Namespace, count: int, folder: Path) -> dict[str, Any]:
    """Build and search each kind of index of so many rows."""
    rows_file = folder / "rows.npy"
    shape = (count, width_of(options.embeddings))
    rows = np.lib.format.open_memmap(rows_file, "w+", np.float16, shape)
    many_rows(options.embeddings, rows)
    rows.flush()
    drawn = np.random.default_rng(1).permutation(count)[: min(N_QUERIES, count // 2)]
    context = multiprocessing.get_context("spawn")
    ways = {}
    for kind in KINDS if options.tiny else options.kinds:
        file = folder / "rows.index"
        with ProcessPoolExecutor(1, context) as alone:
            built = alone.submit(build, rows_file, kind, file).result()
        with ProcessPoolExecutor(1, context) as alone:
            order = (search, rows_file, kind, file, options.repeats, drawn)
            for figures in alone.submit(*order).result():
                title = kind if kind == "exact" else f"{kind}, nprobe {figures['nprobe']}"
                ways[title] = built | figures
        file.unlink(missing_ok=True)
    rows_file.unlink()
    return {"shape": list(shape), "ways": ways}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure at each size, and write the result."""
    parser = paired.make_parser("index", "Queries a second against recall, of kinds of index.")
    add = parser.add_argument
    add("--embeddings", type=path_name, metavar="FILE.npy", help="of embed.py (default: drawn)")
    add("--sizes", type=whole(100), nargs="+", default=[1_000_000], help="rows")
    add("--kinds", nargs="+", default=list(KINDS), help="as search.py --index takes them")
    add("--folder", type=path_name, metavar="DIR", help="for rows and index (default: a new one)")
    options = parser.parse(argv)
    result: dict[str, Any] = {"data": "rows of a file" if options.embeddings else "drawn rows"}
    with TemporaryDirectory(dir=options.folder) as folder:
        for count in [TINY[0]] if options.tiny else options.sizes:
            result[f"{count:,} rows"] = measure(options, count, Path(folder))
    paired.write(result, options)


if __name__ == "__main__":
    run_script(main)
