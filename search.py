"""Search the images of a file of embeddings for those most like some query images."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import utils.threads  # noqa: F401

import numpy as np

from datasets.folder import FileSource, batches_of
from datasets.images import allow_pixels, find_images
from embedder import Embedder
from reports.sheets import SheetRow, Tile, contact_sheet
from utils.embeddings import Embeddings, KnownRows, check_apart, open_embeddings
from utils.errors import UserError, run_script
from utils.files import write_json, written_whole
from utils.index import KINDS, Index
from utils.index_file import kept_index
from utils.options import (
    Parser,
    add_machine,
    add_max_pixels,
    name_of,
    path_name,
    target_file,
    usable_cores,
    whole,
)
from utils.progress import progress
from utils.signals import StopRequest


def index_kind(text: str) -> str:
    """Argparse type: one of KINDS, or a text of faiss's index factory, with a capital in it."""
    return text if text != text.lower() else name_of(KINDS, "IVF...")(text)


def make_parser() -> Parser:
    """Declare the options."""
    parser = Parser("Find the images of a file of embeddings that are most like some query images.")
    group = parser.add_argument_group("search")
    add = group.add_argument
    add("--embeddings", type=path_name, required=True, metavar="FILE.npy", help="of embed.py")
    add("--query", type=path_name, required=True, nargs="+", help="images, and folders of images")
    add("--k", type=whole(1), default=10, help="hits of each query; the query itself is no hit")
    text = "exact, or for millions of images ivf, hnsw, or a text of faiss's index factory, whose"
    default = "(default: exact, or what --index_file holds)"
    add("--index", type=index_kind, help=f"{text} recall is measured {default}")
    text = "keep the index there: built once, opened and grown afterwards"
    add("--index_file", type=target_file(".index"), metavar="FILE.index", help=text)
    add("--nprobe", type=whole(1), default=16, help="of ivf: cells to look into; more find more")
    add("--ef_search", type=whole(1), default=64, help="of hnsw: candidates; more find more")
    add("--checkpoint_path", type=path_name, help="of the embeddings, if it was moved")
    add("--weights", type=path_name, help="of their frozen backbone, if they were moved")
    add("--skip_bad", action="store_true", help="leave unreadable queries out")
    add_max_pixels(group)
    add = parser.add_argument_group("output").add_argument
    add("--json", type=target_file(".json"), metavar="FILE.json", help="write the hits as JSON")
    add(
        "--sheet",
        type=target_file(".png"),
        metavar="FILE.png",
        help="draw the queries and their hits",
    )
    add_machine(parser, neighbors=False, workers=usable_cores())
    return parser


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options and check them against each other."""
    args = make_parser().parse(argv)
    if not args.index_file:
        check_effort(args, args.index or "exact")
    return args


def check_effort(args: argparse.Namespace, kind: str) -> None:
    """Raise UserError for a given option that this kind of index does not read."""
    for name, reader in (("nprobe", "ivf"), ("ef_search", "hnsw")):
        if name in args.given and reader not in kind.lower():
            raise UserError(f"--{name} goes with --index {reader}; this index is {kind}")


def main(argv: Sequence[str] | None = None) -> int:
    """Embed the queries, find their neighbors, print them and write the files."""
    args = parse_args(argv)
    allow_pixels(args.max_pixels)
    with StopRequest() as stop, stop.at_once():
        file = open_embeddings(Path(args.embeddings))
        check_apart([args.json, args.sheet], file)
        queries, embeddings = embed_queries(args, file)
        done = ""
        options = {"nprobe": args.nprobe, "ef_search": args.ef_search}
        if args.index_file:
            index, done = kept_index(file, Path(args.index_file), args.index, **options)
            check_effort(args, index.kind)
            print(f"{args.index_file}: {done}")
        else:
            index = Index(file.rows, args.index or "exact", **options)
        print(f"{args.embeddings}: {len(file.rows)} images; {index.description}")
        was_measured = done == "opened" and not {"nprobe", "ef_search"} & args.given
        if index.kind != "exact" and not was_measured:
            recall, n_queries = index.recall(args.k)
            share = f"{100 * recall:.2f} % (on {n_queries} of the images)"
            print(f"recall@{args.k} against exact search: {share}")
        k = min(args.k + 1, len(file.rows))  # a query may find itself
        results = zip(queries, *index.search(embeddings, k), strict=True)
        answers = [make_answer(*result, file.columns, args.k) for result in results]
        write_files(args, answers)
        print_answers(answers)
        if file.facts.get("folder"):  # rows of a data set have no files
            hits = {hit["path"] for answer in answers for hit in answer["hits"]}
            n_missing = sum(not os.path.exists(path) for path in hits)
            if n_missing:
                print(f"{n_missing} of these images are no longer there; run embed.py again")
    return 0


def query_paths(names: Sequence[str], skip_bad: bool) -> list[Path]:
    """List the query images in the order of the options; a folder stands for all of its images."""
    paths = []
    for name in names:
        path = Path(name)
        if not path.exists() and not skip_bad:
            raise UserError(f"--query {name}: no such file; give images or folders of images")
        paths += find_images(path) if path.is_dir() else [path]
    return paths


def embed_queries(
    args: argparse.Namespace, file: Embeddings
) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Return path and content hash of each query, and the embeddings (Q, D).

    Images that have a row need no network.
    """
    source = FileSource(
        query_paths(args.query, args.skip_bad), file.facts["image_size"], args.workers
    )
    source.known_rows = KnownRows([file])
    embedder = None
    queries = []
    parts = []
    batches = batches_of(source, args.test_batch)
    for crops in progress(batches, "queries"):
        for path, reason in crops.unreadable:
            if not args.skip_bad:
                raise UserError(f"--query {path}: {reason}; leave it out, or give --skip_bad")
            print(f"{path}: {reason}: left out")
        if len(crops.pixels) and embedder is None:
            embedder = load_embedder(args, file.facts)
        queries += [(path, sha256) for path, *_, sha256 in crops.listed]
        parts.append(crops.rows(embedder and embedder.embed_crops, file.rows.shape[1]))
    if not queries:
        raise UserError("--query: none of the images can be read")
    return queries, np.concatenate(parts)


def load_embedder(args: argparse.Namespace, facts: dict) -> Embedder:
    """Load the network that made the embeddings."""
    try:
        return Embedder.from_facts(facts, args.device, args.checkpoint_path, args.weights)
    except UserError as error:
        advice = "if the file was moved, name it by --checkpoint_path or --weights"
        raise UserError(f"{error}; {advice}") from None


def make_answer(
    query: tuple[str, str],
    distances: np.ndarray,
    numbers: np.ndarray,
    columns: dict[str, Sequence[str]],
    k: int,
) -> dict:
    """Name the k hits of a query, nearest first, without itself."""
    path, sha256 = query
    places = [number for number in numbers if number >= 0]
    paths = columns["path"]
    contents = columns.get("sha256", [""] * len(paths))
    same_place = [n for n in places if os.path.realpath(paths[n]) == os.path.realpath(path)]
    moved = [n for n in places if contents[n] == sha256 and not os.path.exists(paths[n])]
    moved.sort(key=lambda n: os.path.basename(paths[n]) != os.path.basename(path))
    itself = same_place or moved
    hits = []
    for distance, number in zip(distances, places, strict=False):
        if number not in itself[:1] and len(hits) < k:
            rank = len(hits) + 1
            hits.append({"rank": rank, "distance": float(distance), "path": paths[number]})
    return {"query": path, "hits": hits}


def print_answers(answers: Sequence[dict]) -> None:
    """Print each query, then a line for each hit."""
    for answer in answers:
        print(answer["query"])
        for hit in answer["hits"]:
            print(f"{hit['rank']:>4}  {hit['distance']:.4f}  {hit['path']}")


def write_files(args: argparse.Namespace, answers: list[dict]) -> None:
    """Write the files that the options ask for."""
    if args.json:
        write_json(args.json, answers)
    if args.sheet:
        sheet = contact_sheet(f"Most similar images of {args.embeddings}", sheet_rows(answers))
        with written_whole(args.sheet) as path:
            sheet.save(path, format="PNG")


def sheet_rows(answers: Sequence[dict]) -> list[SheetRow]:
    """Return a row for each query: its image, then its hits with rank and distance."""
    rows = []
    for answer in answers:
        hits = [
            Tile(h["path"], f"{h['rank']}   distance {h['distance']:.3f}") for h in answer["hits"]
        ]
        rows.append(SheetRow([Tile(answer["query"], "query"), *hits], n_first=1))
    return rows


if __name__ == "__main__":
    run_script(main)
