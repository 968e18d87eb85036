"""Score embeddings that need no training and no labels: frozen features, and heads in closed form.

    python experiments/closed_form.py --dataset cub200 --backbone resnet18

One pass over each half gives the features for all rows of the table; heads are fitted on the
training half alone. OUT_DIR/closed_form_DATASET_SIZEpx_BACKBONE.json holds all scores, .md the
table; with --val_classes N the names end in _valN.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, if run as a script

from benchmarks.paired import machine
from datasets.arrays import Split, load_split
from datasets.views import center_crops
from models import BACKBONES, CBSwR, Pooling, build_model
from models.closed_form import closed_form_head
from utils.devices import choose_device
from utils.errors import run_script
from utils.evaluation import score, why_no_nmi
from utils.files import check_writable, write_json, written_whole
from utils.options import (
    LARGEST_SEED,
    Parser,
    add_machine,
    folder_name,
    name_of,
    path_name,
    whole,
    whole_list,
)
from utils.progress import progress

POWERS = (0, 0.5, 0.7)  # of the singular values
STRIPES = ("3,1", "3,2", "5,1")


def make_parser() -> Parser:
    """Make the parser of the options."""
    parser = Parser("Score frozen features and heads in closed form, without training and labels.")
    add = parser.add_argument
    add("--dataset", type=folder_name, default="cub200", help="cub200, car196, or another name")
    add("--data_dir", type=path_name, default="data", help="the folder that holds <dataset>/")
    add("--image_size", type=whole(8), help="which pre-processed size, if there are several")
    add("--backbone", type=name_of(BACKBONES), default="resnet18", help="that is frozen")
    add("--weights", type=path_name, default="auto", help="auto (ImageNet), none (random), or FILE")
    add("--dims", type=whole_list(1, 65536), default=[128, 512], help="sizes of the embeddings")
    add("--val_classes", type=whole(0), default=0, help="score held-out training classes instead")
    add("--out_dir", type=path_name, default="misc/results", help="folder of the results")
    add("--seed", type=whole(0, LARGEST_SEED), default=0, help="of k-means and random weights")
    add_machine(parser)
    return parser


def poolings(last_two: str) -> list[Pooling]:
    """Return what is compared: average, generalized mean, the last two stages, and stripes."""
    return [
        Pooling.parse(None, "avg", unit=True),
        Pooling.parse(None, "gem", unit=True),
        Pooling.parse(last_two, "gem", unit=True),
        *(Pooling.parse(last_two, "gem", unit=True, stripes=stripes) for stripes in STRIPES),
    ]


@torch.inference_mode()
def pooled_features(
    model: CBSwR, split: Split, kinds: Sequence[Pooling], args: argparse.Namespace
) -> list[Tensor]:
    """Compute pooled features by each pooling: (2, N, C) of images and mirror images."""
    pooled: list[list[Tensor]] = [[] for _ in kinds]
    batches = center_crops(split, args.test_batch, args.workers)
    device = next(model.parameters()).device
    for batch in progress(batches, len(split) / args.test_batch, split.path.name):
        inputs = model.normalization(batch.to(device))
        views = [model.maps(inputs), model.maps(inputs.flip(3))]
        for parts, pooling in zip(pooled, kinds, strict=True):
            n_layers = max(1, len(pooling.layers))
            parts.append(torch.stack([pooling(maps[-n_layers:]) for maps in views]).cpu())
    return [torch.cat(parts, 1) for parts in pooled]


def score_all(
    args: argparse.Namespace, model: CBSwR, kinds: Sequence[Pooling], halves: tuple[Split, Split]
) -> list[dict]:
    """Score each pooling with and without the mirror image, under each head of each size."""
    features = [pooled_features(model, half, kinds, args) for half in halves]
    test_half = halves[1]
    options = {"seed": args.seed, "no_nmi": why_no_nmi("auto", len(test_half.classes))}
    options |= {"is_query": test_half.is_query, "memory_mb": args.eval_memory_mb}
    rows = []
    for (pooling, *pair), flip in product(zip(kinds, *features, strict=True), (False, True)):
        train, test = (F.normalize(x.mean(0) if flip else x[0], dim=1) for x in pair)
        embeddings = {("frozen", test.shape[1]): test}
        for power, dim in product(POWERS, args.dims):
            if dim <= min(train.shape[1], len(train) - 1):
                head = f"whiten {power:g}" if power else "pca"
                weight, bias = closed_form_head(train, dim, "whiten", power)
                embeddings[head, dim] = F.normalize(test @ weight.T + bias, dim=1)
        for (head, dim), embedding in embeddings.items():
            row = {"pooling": str(pooling), "flip_eval": flip, "head": head, "dimension": dim}
            row |= score(embedding, test_half.labels, args.dataset, **options)
            rows.append(row)
            print(f"{pooling}, mirror {flip}, {title_of(row)}: {cell_of(row)}", flush=True)
    return rows


def table_of(rows: Sequence[dict]) -> str:
    """Return a line for each pooling: R@1 / NMI in percent of each head and size."""
    titles = list(dict.fromkeys(title_of(row) for row in rows))
    lines = [["pooled", "mirror average", *titles], ["---"] * (2 + len(titles))]
    for pooling, flip in dict.fromkeys((row["pooling"], row["flip_eval"]) for row in rows):
        of_line = [row for row in rows if (row["pooling"], row["flip_eval"]) == (pooling, flip)]
        cells = {title_of(row): cell_of(row) for row in of_line}
        lines.append([pooling, "yes" * flip, *(cells.get(title, "") for title in titles)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines).replace(" --- ", "---")


def title_of(row: dict) -> str:
    """Return the head and its size; a frozen feature is as wide as it is."""
    if row["head"] == "frozen":
        return row["head"]
    return f"{row['head']}, {row['dimension']}-d"


def cell_of(row: dict) -> str:
    """Return R@1 and, if it was computed, NMI in percent."""
    return " / ".join(f"{100 * row[name]:.1f}" for name in ("recall@1", "nmi") if name in row)


def main(argv: Sequence[str] | None = None) -> None:
    """Load, embed, score, write."""
    args = make_parser().parse(list(argv or sys.argv[1:]))
    check_writable(Path(args.out_dir), "choose another --out_dir")
    names = ("training", "validation")
    halves = [load_split(args.data_dir, args.dataset, name, args.image_size) for name in names]
    if args.val_classes:
        halves = halves[0].hold_out(args.val_classes)
    torch.manual_seed(args.seed)
    kinds = poolings(",".join(list(BACKBONES[args.backbone].stages)[-2:]))
    model = build_model(args.backbone, weights=args.weights, pooling=kinds[-1]).eval()
    model = model.to(choose_device(args.device), memory_format=torch.channels_last)
    rows = score_all(args, model, kinds, halves)
    stem = f"{args.out_dir}/closed_form_{args.dataset}_{halves[0].image_size}px_{args.backbone}"
    if args.val_classes:
        stem += f"_val{args.val_classes}"
    Path(args.out_dir).mkdir(parents=True, exist_ok=True)
    facts = vars(args) | {"weights": Path(args.weights).name, "machine": machine()}
    facts |= {"training": str(halves[0]), "test": str(halves[1])}
    unused = {"given", "data_dir", "out_dir"}
    facts = {name: value for name, value in facts.items() if name not in unused}
    write_json(f"{stem}.json", facts | {"rows": rows})
    with written_whole(f"{stem}.md") as beside:
        beside.write_text(table_of(rows), encoding="utf-8")
    print(f"{stem}.json")


if __name__ == "__main__":
    run_script(main)
