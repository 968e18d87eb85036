"""Group the images of a file of embeddings, or find those that show the same.

python cluster.py --embeddings photos.npy --k auto --sheet clusters.png
python cluster.py --embeddings photos.npy --duplicates
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import utils.threads  # noqa: F401

import numpy as np
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from reports.sheets import MOST_ROWS, SheetRow, Tile, contact_sheet
from utils.clustering import FEWEST_CLUSTERS, choose_k, distances_to, kmeans_of_any_size
from utils.duplicates import duplicate_groups
from utils.embeddings import Embeddings, check_apart, open_embeddings
from utils.errors import UserError, run_script
from utils.files import check_writable, written_whole
from utils.options import LARGEST_SEED, Parser, name_or, path_name, real, target_file, whole
from utils.signals import StopRequest
from utils.tables import write_table

SIMILARITY = 0.95  # measured in docs/photos.md
STARTS, ITERATIONS = 5, 100  # of k-means
MOST_OUTLIERS = 32  # on the sheet


def make_parser() -> Parser:
    """Declare the options."""
    parser = Parser("Group images by their embeddings, or find those that show the same.")
    add = parser.add_argument
    add("--embeddings", type=path_name, required=True, metavar="FILE.npy", help="of embed.py")
    text = "number of groups; auto: as many as are stable"
    add("--k", type=name_or(("auto",), whole(1)), default="auto", help=text)
    add(
        "--duplicates",
        type=real(-1, most=1),
        nargs="?",
        const=SIMILARITY,
        metavar="SIMILARITY",
        help="find images that show the same instead: equal files, and a cosine of embeddings of "
        f"at least SIMILARITY (if left out: {SIMILARITY})",
    )
    add("--seed", type=whole(0, LARGEST_SEED), default=0, help="of k-means")
    add = parser.add_argument_group("output").add_argument
    table = target_file(".csv", is_alone=False)  # also the default is checked, in main
    add("--out", type=table, metavar="FILE.csv", help="(default: beside the embeddings)")
    add("--sheet", type=target_file(".png"), metavar="FILE.png", help="draw the groups")
    add("--images_each", type=whole(1, 100), default=10, help="of each group on the sheet")
    add("--link", type=path_name, metavar="DIR", help="make a folder of links for each group")
    return parser


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options and check them against each other."""
    parser = make_parser()
    kind = "clusters"
    args = parser.parse(argv)
    if args.duplicates is not None:
        kind = "duplicates"
        for name in {"k", "seed"} & args.given:
            parser.error(f"--{name} does not go with --duplicates")
    if args.link:
        if os.path.lexists(args.link):
            parser.error(f"--link {args.link}: is there already; name a new folder")
        check_writable(Path(args.link), "choose another folder for --link")
    args.out = args.out or f"{Path(args.embeddings).with_suffix('')}_{kind}.csv"
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Group the images, write the files, print what was found."""
    args = parse_args(argv)
    with StopRequest() as stop, stop.at_once():
        file = open_embeddings(Path(args.embeddings))
        if len(file.rows) == 0:
            raise UserError(f"{args.embeddings}: holds no images")
        check_apart([args.sheet], file)
        if Path(args.out).with_suffix(".npy").exists():
            raise UserError(f"{args.out}: belongs to the .npy file beside it; give another --out")
        if args.duplicates is None:
            find_clusters(args, file)
        else:
            find_duplicates(args, file)
    return 0


def find_clusters(args: argparse.Namespace, file: Embeddings) -> None:
    """Cluster by k-means, the clusters numbered by size; the most central images come first."""
    rows = np.array(file.rows, np.float32)
    k = args.k
    if k == "auto" and len(rows) < 2 * FEWEST_CLUSTERS:
        k = 1
    elif k == "auto":
        k, stability = choose_k(rows, args.seed)
        shares = ", ".join(f"{count} {value:.2f}" for count, value in stability.items())
        print(f"{k} clusters; stability by number of clusters: {shares}")
    clusters, centers, _ = kmeans_of_any_size(
        rows, k, n_init=STARTS, max_iter=ITERATIONS, seed=args.seed
    )
    by_size = np.argsort(-np.bincount(clusters, minlength=k), kind="stable")
    clusters = np.argsort(by_size)[clusters]
    distances = distances_to(rows, centers[by_size], clusters)
    order = np.lexsort((distances, clusters))
    groups = np.split(order, np.flatnonzero(np.diff(clusters[order])) + 1)
    table = [
        (file.columns["path"][row], number, f"{distances[row]:.4f}", rank)
        for number, group in enumerate(groups, 1)
        for rank, row in enumerate(group, 1)
    ]
    outliers = np.argsort(-distances, kind="stable")[:MOST_OUTLIERS]
    starts = range(0, len(outliers), args.images_each)
    drawn = groups[: MOST_ROWS - len(starts)]
    tiles = [group[: args.images_each] for group in drawn]
    tiles += [outliers[start : start + args.images_each] for start in starts]
    texts = [f"cluster {n} ({len(group)} images)" for n, group in enumerate(drawn, 1)]
    texts += ["far from all"] * len(starts)
    write_files(args, file, ("path", "cluster", "distance", "rank"), table, groups, tiles, texts)
    sizes = [len(group) for group in groups]
    print(
        f"{args.out}: {len(rows)} images in {len(groups)} clusters of {min(sizes)} to {max(sizes)}"
    )
    print_agreement(file, clusters)


def find_duplicates(args: argparse.Namespace, file: Embeddings) -> None:
    """Find images that show the same; the first of a group is that of the first row."""
    contents = file.columns.get("sha256", [""] * len(file.rows))
    groups = duplicate_groups(file.rows, contents, args.duplicates)
    table = []
    for number, group in enumerate(groups, 1):
        first = file.rows[group[0]].astype(np.float32)
        for row in group:
            is_equal = contents[row] != "" and contents[row] == contents[group[0]]
            cosine = float(file.rows[row].astype(np.float32) @ first)
            kind = "equal file" if is_equal else "alike"
            if row == group[0]:
                kind = "first"
            table.append((file.columns["path"][row], number, f"{cosine:.4f}", kind))
    tiles = [group[: args.images_each] for group in groups]
    texts = [f"group {number} ({len(group)})" for number, group in enumerate(groups, 1)]
    columns = ("path", "group", "similarity_to_first", "kind")
    write_files(args, file, columns, table, groups, tiles, texts)
    n_more = sum(len(group) - 1 for group in groups)
    images = f"{n_more + len(groups)} images, {n_more} beside the first ones"
    print(f"{args.out}: {len(groups)} groups of {images}")
    if file.facts.get("features") == "embedding":
        print("learned features lie farther apart, so copies can be missed; frozen ones find more")


def write_files(
    args: argparse.Namespace,
    file: Embeddings,
    columns: Sequence[str],
    table: Sequence[tuple],
    groups: Sequence[np.ndarray],
    tiles: Sequence[np.ndarray],
    texts: Sequence[str],
) -> None:
    """Write the table and what else is asked for.

    Args:
        groups: row numbers of the images of each group, the most central first.
        tiles: row numbers of the images on each row of the sheet; texts: of these rows.
    """
    paths = file.columns["path"]
    with written_whole(args.out) as beside:
        write_table(beside, columns, table)
    if args.sheet and not tiles:
        print(f"{args.sheet}: is not written, as there are no groups")
    elif args.sheet:
        rows = [
            SheetRow([Tile(paths[row], text) for row in numbers])
            for numbers, text in zip(tiles, texts, strict=True)
        ]
        sheet = contact_sheet(f"{args.embeddings}: {len(groups)} groups", rows)
        with written_whole(args.sheet) as beside:
            sheet.save(beside, format="PNG")
    if args.link:
        link_groups(Path(args.link), [[paths[row] for row in group] for group in groups])


def link_groups(folder: Path, groups: Sequence[Sequence[str]]) -> None:
    """Make a folder of links to the images of each group, all of them or none.

    Raises UserError if an image is no file.
    """
    for path in chain.from_iterable(groups):
        if not os.path.isfile(path):
            raise UserError(f"{path}: no such file to link to; embed the folder as it is now")
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        beside.mkdir(parents=True)
        for number, paths in enumerate(groups, 1):
            place = beside / f"{number:0{len(str(len(groups)))}}"
            place.mkdir()
            for rank, path in enumerate(paths, 1):
                name = f"{rank:0{len(str(len(paths)))}}_{os.path.basename(path)}"
                (place / name).symlink_to(path)
        beside.rename(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def print_agreement(file: Embeddings, clusters: np.ndarray) -> None:
    """Say how well clusters agree with the classes, if images have one."""
    classes = np.array(file.columns.get("class", [""] * len(clusters)))
    if (classes == "").any():
        return
    counts = contingency_matrix(classes, clusters)
    scores = {
        "purity": counts.max(0).sum() / len(clusters),
        "NMI": normalized_mutual_info_score(classes, clusters),
        "AMI": adjusted_mutual_info_score(classes, clusters),
    }
    text = ", ".join(f"{name} {100 * value:.1f}" for name, value in scores.items())
    print(f"agreement with {len(counts)} classes: {text}")


if __name__ == "__main__":
    run_script(main)
