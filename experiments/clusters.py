"""Compare ways to choose a number of clusters, on embeddings of images with classes.

    python embed.py --dataset cub200 --split validation --backbone resnet18 --out birds.npy
    python experiments/clusters.py --embeddings birds.npy

For each file the AMI with the classes is shown of k-means with the number of clusters that
`cluster.py --k auto` chooses, with the one of its candidates that has the best AMI, with the one
that has the best silhouette, and of HDBSCAN, which leaves images out (as a cluster of their own).

OUT_DIR/clusters.json holds all scores, .md the table.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.cluster import HDBSCAN
from sklearn.metrics import adjusted_mutual_info_score, silhouette_score

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, if run as a script

from utils.clustering import choose_k, kmeans
from utils.devices import machine
from utils.embeddings import open_embeddings
from utils.errors import run_script
from utils.files import write_json, write_text
from utils.options import Parser, path_name
from utils.tables import markdown_table

SMALLEST_DENSE = 5  # images of a cluster of HDBSCAN
SILHOUETTE_ROWS = 2000
COLUMNS = ["images", "classes", "--k auto, AMI", "best k tried, AMI", "best silhouette, AMI"]
COLUMNS += [f"HDBSCAN ({SMALLEST_DENSE}), AMI"]


def make_parser() -> Parser:
    """Make the parser of the options."""
    parser = Parser("Compare ways to choose a number of clusters.")
    add = parser.add_argument
    add("--embeddings", type=path_name, nargs="+", required=True, help="of images with classes")
    add("--out_dir", type=path_name, default="misc/results", help="folder of the results")
    return parser


def compare(file: Path) -> dict:
    """Cluster the rows of a file in all ways, and score them."""
    embeddings = open_embeddings(file)
    rows = np.array(embeddings.rows, np.float32)
    classes = np.unique(embeddings.columns["class"], return_inverse=True)[1]
    chosen, stability = choose_k(rows)
    sample = np.random.default_rng(0).permutation(len(rows))[:SILHOUETTE_ROWS]
    tried = {}
    for k in stability:
        clusters = kmeans(rows, k, n_init=5, max_iter=100)[0]
        tried[k] = {
            "stability": stability[k],
            "ami": adjusted_mutual_info_score(classes, clusters),
            "silhouette": float(silhouette_score(rows[sample], clusters[sample])),
        }
    dense = HDBSCAN(min_cluster_size=SMALLEST_DENSE, copy=True).fit_predict(rows)
    hdbscan = {"k": int(dense.max()) + 1, "ami": adjusted_mutual_info_score(classes, dense)}
    facts = {"file": file.stem, "images": len(rows), "classes": int(classes.max()) + 1}
    return facts | {"chosen": chosen, "tried": tried, "hdbscan": hdbscan}


def line_of(result: dict) -> list[str]:
    """Return a line of the table."""
    tried = result["tried"]
    ways = [
        (result["chosen"], tried[result["chosen"]]),
        max(tried.items(), key=lambda item: item[1]["ami"]),
        max(tried.items(), key=lambda item: item[1]["silhouette"]),
        (result["hdbscan"]["k"], result["hdbscan"]),
    ]
    cells = [f"{k}, {100 * values['ami']:.0f}" for k, values in ways]
    return [f"`{result['file']}`, {result['images']}", str(result["classes"]), *cells]


def main(argv: Sequence[str] | None = None) -> None:
    """Compare on each file, and write."""
    args = make_parser().parse(argv)
    results = [compare(Path(file)) for file in args.embeddings]
    Path(args.out_dir).mkdir(parents=True, exist_ok=True)
    write_json(f"{args.out_dir}/clusters.json", {"machine": machine(), "rows": results})
    text = markdown_table([COLUMNS, *map(line_of, results)])
    write_text(f"{args.out_dir}/clusters.md", text)
    print(text, end="")


if __name__ == "__main__":
    run_script(main)
