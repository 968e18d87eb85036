"""Score what the recipe starts from, with 60, 150, ... images to fit it to.

    python experiments/few_images.py --dataset cub200 car196 --photos my_photos

For each number of images, random subsets of the training half choose their start without labels, as
train.py does with --head_init auto, and the test half is scored: by frozen features (the last two
stages, generalized mean, mirror average), by the start that was chosen, and by one fixed start for
all, whitened to a power of 0.6 with stripes. With --photos a data set is a person's photos: subsets
are drawn from both halves, and all images are scored. The table says, too, which share of stripes
is aligned, what stripes change in R@1 (the mean over all heads), and how well the measure of heads
ranks them, compared with their R@1 (Spearman).

OUT_DIR/few_images_SIZEpx_BACKBONE.json holds all scores, .md the table.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, if run as a script

import train
from datasets.arrays import Split, load_split
from datasets.views import N_PARTS, center_crops, part_crops
from models import Pooling, build_model, pooled_channels
from models.closed_form import closed_form_head, head_size
from models.start import ALIGNED, FEWEST_ALIGNED, Head, aligned_share, best_of, score_heads
from recipes.start import START_IMAGES
from utils.devices import choose_device, machine
from utils.errors import UserError, run_script
from utils.evaluation import score, why_no_nmi
from utils.features import pooled_features
from utils.files import check_writable, write_json, write_text
from utils.options import Parser, add_machine, add_precision, folder_name, path_name, whole
from utils.progress import progress
from utils.tables import markdown_table

FIXED = Head(kind="whiten", power=0.6, score=0.0)
COLUMNS = ["images to fit to", "frozen", "chosen start", "whiten 0.6 with stripes for all"]
COLUMNS += ["chosen", "aligned stripes, %", "stripes change R@1 by", "rank correlation"]


def make_parser() -> Parser:
    """Make the parser of the options."""
    parser = Parser("Score what the recipe starts from, by how many images there are.")
    add = parser.add_argument
    add("--dataset", nargs="*", type=folder_name, default=[], help="a part of the table")
    add("--photos", nargs="*", type=folder_name, default=[], help="sets whose halves are joined")
    add("--data_dir", type=path_name, default="data", help="the folder that holds <dataset>/")
    add("--image_size", type=whole(8), help="which pre-processed size, if there are several")
    add("--backbone", default="resnet18", help="as of train.py")
    add("--weights", type=path_name, default="auto", help="auto (ImageNet), none (random), or FILE")
    sizes = [60, 150, 500, 1500, 5000]
    add("--sizes", nargs="+", type=whole(8), default=sizes, help="of images; all comes last")
    add("--subsets", type=whole(1), default=3, help="random subsets of each number")
    add("--out_dir", type=path_name, default="misc/results", help="folder of the results")
    add_precision(add_machine(parser))
    return parser


class Features:
    """Features of a data set by both poolings: of its images, and of their parts."""

    def __init__(
        self, args: argparse.Namespace, halves: Sequence[Split], is_joined: bool, seed: int = 0
    ) -> None:
        """Compute them.

        is_joined: whether images of both halves are fitted to, and scored.
        """
        options = train.parse_args(["--recipe=best"])
        self.low_dim = options.low_dim
        poolings = [
            Pooling.parse(options.layers, options.pool, True, stripes)
            for stripes in ("1", options.stripes)
        ]
        model = build_model(args.backbone, weights=args.weights, pooling=poolings[-1])
        model = model.to(choose_device(args.device), memory_format=torch.channels_last)
        self.sets = [str(half) for half in halves]

        def of_centers(half: Split) -> list[Tensor]:
            crops = center_crops(half, args.test_batch, args.workers)
            crops = progress(crops, half.path.name)
            return pooled_features(model, crops, args.precision, flip=True, poolings=poolings)

        def of_parts(half: Split) -> list[Tensor]:
            batch_size = -(-args.test_batch // N_PARTS)
            crops = part_crops(half, np.arange(len(half)), seed, batch_size, args.workers)
            crops = progress(crops, f"parts of {half.path.name}")
            return pooled_features(model, crops, args.precision, poolings=poolings)

        centers = [of_centers(half) for half in halves]
        fitted = halves if is_joined else halves[:1]
        self.train = [torch.cat(parts) for parts in zip(*centers[: len(fitted)], strict=True)]
        channels = pooled_channels(args.backbone, poolings[1])
        self.stripes = poolings[1].stripes_of(self.train[1], channels)
        parts = [of_parts(half) for half in fitted]
        self.parts = [
            torch.cat(half).unflatten(0, (-1, N_PARTS)) for half in zip(*parts, strict=True)
        ]
        self.test = self.train if is_joined else centers[1]
        labels = [half.labels for half in halves]
        self.labels = np.concatenate(labels) if is_joined else labels[1]
        self.is_query = None if is_joined else halves[1].is_query
        self.frozen = self.score(self.test[0])

    def embed(self, pooling: int, head: Head, fit_to: Tensor) -> Tensor:
        """Embed the test images by a head on a pooling, fitted to some images."""
        pooled = self.train[pooling][fit_to]
        size = head_size(self.low_dim, *pooled.shape)
        weight, bias = closed_form_head(pooled, size, head.kind, head.power)
        return F.normalize(self.test[pooling] @ weight.T + bias, dim=1)

    def score(self, embeddings: Tensor, no_nmi: str = "") -> dict:
        """Return R@1 and, unless it is left out, NMI of the test images, in percent."""
        no_nmi = no_nmi or why_no_nmi("auto", len(np.unique(self.labels)))
        values = score(embeddings, self.labels, is_query=self.is_query, no_nmi=no_nmi)
        return {name: 100 * values[name] for name in ("recall@1", "nmi") if name in values}

    def recall(self, pooling: int, head: Head, fit_to: Tensor) -> float:
        """Return R@1 in percent of a head on a pooling, fitted to some images."""
        return self.score(self.embed(pooling, head, fit_to), "not asked for")["recall@1"]

    def subset(self, count: int, number: int) -> dict:
        """Choose the start of a random subset, and score it beside the others."""
        drawn = torch.from_numpy(np.random.default_rng(number).permutation(len(self.train[0])))
        drawn = drawn[:count]
        looked_at = torch.arange(count)[:START_IMAGES]
        stripes = [layer[drawn] for layer in self.stripes]
        share = aligned_share(self.train[0][drawn], stripes)
        chosen = int(share >= ALIGNED and count >= FEWEST_ALIGNED)
        pooled = self.train[chosen][drawn]
        parts = self.parts[chosen][drawn[looked_at]]
        heads = score_heads(pooled, parts, looked_at, is_aligned=bool(chosen))
        best = best_of(heads, bool(chosen))
        measured = [head.score for head in heads]
        recalls = np.array([[self.recall(n, head, drawn) for head in heads] for n in (0, 1)])
        return {
            "images": count,
            "subset": number,
            "aligned": share,
            "chosen": f"{best.name}, stripes" if chosen else best.name,
            "stripes_gain": float((recalls[1] - recalls[0]).mean()),
            "rank_correlation": rank_correlation(measured, recalls[chosen].tolist()),
            "frozen": self.frozen,
            "start": self.score(self.embed(chosen, best, drawn)),
            "fixed": self.score(self.embed(1, FIXED, drawn)),
        }


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Spearman's correlation, None if one side has a single value."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(spearmanr(first, second).statistic)


def open_splits(args: argparse.Namespace, dataset: str) -> list[Split]:
    """Open both halves of a data set."""
    names = ("training", "validation")
    return [load_split(args.data_dir, dataset, name, args.image_size) for name in names]


def rows_of(args: argparse.Namespace, dataset: str, halves: Sequence[Split]) -> list[dict]:
    """Return the scores of all subsets of a data set."""
    features = Features(args, halves, dataset in args.photos)
    total = len(features.train[0])
    rows = []
    for count in [*(size for size in args.sizes if size < total), total]:
        for number in range(args.subsets if count < total else 1):
            row = {"dataset": dataset, "sets": features.sets, "joined": dataset in args.photos}
            row |= features.subset(count, number)
            rows.append(row)
            frozen, start = (cell([row], name) for name in ("frozen", "start"))
            print(f"{dataset}, {count}: {frozen} -> {start} ({row['chosen']})", flush=True)
    return rows


def table_of(rows: Sequence[dict]) -> str:
    """Return a line for each data set and number of images: R@1 / NMI, means over subsets."""
    lines = [["data set", *COLUMNS]]
    for dataset, count in dict.fromkeys((row["dataset"], row["images"]) for row in rows):
        of_line = [row for row in rows if (row["dataset"], row["images"]) == (dataset, count)]
        cells = [cell(of_line, name) for name in ("frozen", "start", "fixed")]
        chosen = "; ".join(dict.fromkeys(row["chosen"] for row in of_line))
        aligned = f"{100 * statistics.mean(row['aligned'] for row in of_line):.1f}"
        gain = f"{statistics.mean(row['stripes_gain'] for row in of_line):+.1f}"
        ranked = [row["rank_correlation"] for row in of_line]
        ranked = [value for value in ranked if value is not None]
        correlation = f"{statistics.mean(ranked):.2f}" if ranked else ""
        lines.append([dataset, str(count), *cells, chosen, aligned, gain, correlation])
    return markdown_table(lines)


def cell(rows: Sequence[dict], name: str) -> str:
    """Return mean R@1 / NMI in percent; R@1 alone of sets with too many classes for NMI."""
    scores = [score for score in ("recall@1", "nmi") if score in rows[0][name]]
    return " / ".join(
        f"{statistics.mean(row[name][score] for row in rows):.1f}" for score in scores
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Embed each data set once, score its subsets, write."""
    args = make_parser().parse(argv)
    check_writable(Path(args.out_dir), "choose another --out_dir")
    datasets = dict.fromkeys([*args.dataset, *args.photos])
    if not datasets:
        raise UserError("name a --dataset, or --photos")
    halves = {name: open_splits(args, name) for name in datasets}
    sizes = {training.image_size for training, _ in halves.values()}
    if len(sizes) > 1:
        raise UserError(f"the data sets have images of {sizes} pixels; give --image_size")
    name = args.backbone.replace(":", "_")
    stem = f"{args.out_dir}/few_images_{sizes.pop()}px_{name}"
    Path(args.out_dir).mkdir(parents=True, exist_ok=True)
    facts = {"backbone": args.backbone, "weights": Path(args.weights).name}
    facts |= {"precision": args.precision, "machine": machine()}
    rows = []
    for dataset in datasets:
        rows += rows_of(args, dataset, halves[dataset])
        write_json(f"{stem}.json", facts | {"rows": rows})
        write_text(f"{stem}.md", table_of(rows))
    print(f"{stem}.json")


if __name__ == "__main__":
    run_script(main)
