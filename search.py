"""Search the images of an embeddings file of embed.py for those most like some query images."""

from __future__ import annotations

from utils.stopping import StopRequest, interrupt_in_one_line

if __name__ == "__main__":
    interrupt_in_one_line()  # the imports below take a while

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from utils.arguments import LARGEST_MEMORY, Parser, name_of, path_name, whole
from utils.errors import UserError, run_script
from utils.files import check_target
from utils.process import share_cores
from utils.progress import progress

if TYPE_CHECKING:  # --help does not wait for these
    import numpy as np


def make_parser() -> Parser:
    """The options, named as those of embed.py and test.py."""
    p = Parser(description="Find the images of an embeddings file that are most like some query images.")
    p.add_argument(
        "--embeddings", type=path_name, metavar="FILE.npy", help="made by embed.py; its network embeds the queries, too"
    )
    p.add_argument(
        "--query", nargs="+", type=path_name, default=[], metavar="PATH", help="images, and folders of images"
    )
    p.add_argument("--k", type=whole(1), default=10, help="hits for each query; the query itself is no hit")
    g = p.add_argument_group("search")
    g.add_argument("--index", type=name_of(("exact", "ivf", "hnsw")), default="exact",
                   help="ivf, hnsw: approximate, for millions of images (faiss); the recall against exact is "
                   "measured and printed")  # fmt: skip
    g.add_argument("--nprobe", type=whole(1), default=16, help="of --index ivf: cells looked into; more find more")
    g.add_argument("--ef_search", type=whole(1), default=64, help="of --index hnsw: candidates kept; more find more")
    g.add_argument(
        "--eval_memory_mb", type=whole(1, LARGEST_MEMORY), default=512, help="MiB for the search beside the embeddings"
    )
    g = p.add_argument_group("output")
    g.add_argument("--json", type=path_name, metavar="FILE", help="write the hits as JSON")
    g.add_argument("--sheet", type=path_name, metavar="FILE.png", help="draw queries, each with its hits to the right")
    g = p.add_argument_group("machine")
    g.add_argument(
        "--checkpoint_path",
        type=path_name,
        metavar="FILE",
        help="where the network's checkpoint is now, if it was moved",
    )
    g.add_argument("--test_batch", type=whole(1), default=100, help="images a batch")
    g.add_argument(
        "--workers", type=whole(0, 1024), default=2, help="threads that read images ahead; changes speed alone"
    )
    g.add_argument("--device", type=name_of(("auto", "cpu", "cuda")), default="auto", help="auto: cuda if there is one")
    return p


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The options, checked against each other."""
    parser = make_parser()
    args = parser.parse(argv)
    if args.embeddings is None or not args.query:
        parser.error("give --embeddings FILE.npy and --query PATH ...")
    for option, index in (("nprobe", "ivf"), ("ef_search", "hnsw")):
        if option in args.given and args.index != index:
            parser.error(f"--{option} goes with --index {index}")
    try:
        for target, ending in ((args.json, ""), (args.sheet, ".png")):
            if target:
                check_target(target, ending)
    except UserError as error:
        parser.error(str(error))
    return args


def main(argv: list[str] | None = None) -> int:
    """Read the options, then do the work."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    share_cores()
    import models  # noqa: F401  # and torch: slow, so before StopRequest takes over

    with StopRequest() as stop, stop.at_once():
        search(args)
    return 0


def search(args: argparse.Namespace) -> None:
    """Embed the queries, find their neighbours, print, write."""
    from datasets.folder import read_table
    from utils.embeddings import names_of, open_embeddings
    from utils.neighbours import Neighbours, Settings

    file = Path(args.embeddings)
    rows, facts = open_embeddings(file)
    paths = [path for (path,) in read_table(names_of(file)["csv"], ("path",))]
    if len(paths) != len(rows):
        raise UserError(f"{names_of(file)['csv']}: lists {len(paths)} images, not {len(rows)}; run embed.py again")
    queries = query_paths(args.query)
    embeddings = embed_queries(args, queries, facts)
    settings = Settings(args.index, args.nprobe, args.ef_search, memory_mb=args.eval_memory_mb)
    neighbours = Neighbours(rows, settings)
    print(f"{file}: {len(rows)} images; {neighbours.description}")
    if args.index != "exact":
        recall, sample = neighbours.recall(args.k)
        print(f"recall@{args.k} against exact search: {100 * recall:.2f} % (on {sample} of the images)")
    found = neighbours.search(embeddings, min(args.k + 1, len(rows)))  # one more: a query may find itself
    answers = [answer(query, *hits, paths, args.k) for query, *hits in zip(queries, *found, strict=True)]
    print_answers(answers)
    write_outputs(args, answers)


def query_paths(given: list[str]) -> list[str]:
    """The query images, absolute paths in the order given; a folder stands for all of its images."""
    import os

    from utils.images import find_images

    found = []
    for name in given:
        path = Path(name)
        if not path.exists():
            raise UserError(f"--query {name}: no such file; give images or folders of images")
        found += find_images(path) if path.is_dir() else [path]
    return [os.path.abspath(path) for path in found]


def embed_queries(args: argparse.Namespace, queries: list[str], facts: dict) -> np.ndarray:
    """The queries (Q, D) by the very network of the embeddings file; UserError where it is no longer to be had."""
    import torch

    from datasets.folder import FileSource
    from models import Pooling, load_network
    from utils.devices import choose_device
    from utils.embeddings import network_hash
    from utils.features import extract_features

    device = choose_device(args.device)
    frozen = facts["features"] == "pooled"
    checkpoint = None if frozen else args.checkpoint_path or facts["checkpoint"]
    torch.manual_seed(facts["seed"])
    pooling = Pooling.parse(facts.get("layers"), facts.get("pool"), False, facts.get("stripes"))
    model, _ = load_network(device, checkpoint, facts["backbone"], facts["weights"], pooling, facts.get("dim"))
    if network_hash(model) != facts["network_sha256"]:
        raise UserError(f"{checkpoint or facts['weights']}: is no longer the network that made {args.embeddings}; give "
                        "its --checkpoint_path, or embed the images again")  # fmt: skip
    source = FileSource(queries, facts["image_size"])
    parts = []
    for crops in progress(source.batches(args.test_batch, args.workers), len(source) / args.test_batch, "queries"):
        if crops.unreadable:
            row, reason = crops.unreadable[0]
            raise UserError(f"--query {queries[row]}: {reason}; leave it out")
        found = extract_features(model, [crops.pixels], facts["precision"], flip=facts.get("flip_eval", False))
        parts.append(found[0 if frozen else 1])
    return torch.cat(parts).numpy()


def answer(query: str, distances: np.ndarray, rows: np.ndarray, paths: list[str], k: int) -> dict:
    """The hits of a query, nearest first, without itself: {"query": .., "hits": [{"rank", "distance", "path"}]}."""
    found = [(float(d), paths[row]) for d, row in zip(distances, rows, strict=True) if row >= 0 and paths[row] != query]
    hits = [{"rank": rank, "distance": d, "path": path} for rank, (d, path) in enumerate(found[:k], 1)]
    return {"query": query, "hits": hits}


def print_answers(answers: list[dict]) -> None:
    """A line for each query, then one for each hit: rank, distance, path."""
    for one in answers:
        print(shown(one["query"]))
        for hit in one["hits"]:
            print(f"{hit['rank']:>4}  {hit['distance']:.4f}  {shown(hit['path'])}")


def shown(path: str) -> str:
    """A path that any terminal can print."""
    return path.encode("utf-8", errors="backslashreplace").decode()


def write_outputs(args: argparse.Namespace, answers: list[dict]) -> None:
    """The files asked for, each written whole."""
    from utils.files import write_json, written_whole
    from utils.sheets import MOST_ROWS, contact_sheet

    if args.json:
        write_json(args.json, answers)
    if args.sheet:
        if len(answers) > MOST_ROWS:
            print(f"{args.sheet}: shows the first {MOST_ROWS} of {len(answers)} queries")
        with written_whole(args.sheet) as path:
            contact_sheet(answers[:MOST_ROWS]).save(path, format="PNG")


if __name__ == "__main__":
    run_script(main)
