"""Score embeddings that need no training and no labels: frozen features and heads in closed form, on a data set.

One pass over each half gives the features for every row of the table; heads are fitted on the training half alone.
Writes misc/results/closed_form_<dataset>_<size>px_<backbone>.json, and a table of the same name ending in .md
(with --val_classes N, names ending in _valN).
"""

from __future__ import annotations

import argparse
import os
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.paired import machine
from datasets import Split, center_crops, load_split
from models import BACKBONES, CBSwR, Pooling, build_model
from models.closed_form import closed_form_head
from utils.arguments import BACKBONE_NAMES, Parser, folder_name, name_of, whole
from utils.devices import choose_device
from utils.errors import run_script
from utils.evaluation import recall_ranks, score, why_no_nmi
from utils.files import check_writable, write_json, written_whole
from utils.progress import progress

POWERS = (0, 0.5, 0.7)  # of the singular values
STRIPES = ("3,1", "3,2", "5,1")


def make_parser() -> Parser:
    """The options."""
    p = Parser(description="Score frozen features and heads in closed form, without training and labels.")
    p.add_argument("--dataset", type=folder_name, default="cub200")
    p.add_argument("--data_dir", default="data", help="the folder that holds <dataset>/")
    p.add_argument("--image_size", type=whole(8), help="which pre-processed size to take, if there are several")
    p.add_argument("--backbone", type=name_of(BACKBONE_NAMES), default="resnet18")
    p.add_argument("--weights", default="auto", help="auto, none or a file")
    p.add_argument("--dims", default="128,512", metavar="D[,D]", help="sizes of the embeddings")
    p.add_argument("--val_classes", type=whole(0), default=0, metavar="N", help="score the last N classes of the "
                   "training half, unseen by the heads then, instead of the test half; 0: none")  # fmt: skip
    p.add_argument("--out_dir", default="misc/results")
    p.add_argument("--test_batch", type=whole(1), default=100)
    p.add_argument("--device", type=name_of(("auto", "cpu", "cuda")), default="auto")
    p.add_argument("--seed", type=whole(0), default=0, help="of the k-means behind NMI, and of a random backbone")
    return p


def poolings(backbone: str) -> list[Pooling]:
    """What is compared: the last stage by its average and its generalised mean, the last two stages, and stripes."""
    last_two = ",".join(list(BACKBONES[backbone].stages)[-2:])
    return [
        Pooling.parse(None, "avg", unit=True),
        Pooling.parse(None, "gem", unit=True),
        Pooling.parse(last_two, "gem", unit=True),
        *(Pooling.parse(last_two, "gem", unit=True, stripes=stripes) for stripes in STRIPES),
    ]


@torch.inference_mode()
def pooled_features(model: CBSwR, split: Split, kinds: list[Pooling], args: argparse.Namespace) -> list[Tensor]:
    """Pooled features of a half, by each pooling: (2, N, C_p) of images and mirror images, of unit length."""
    found: list[list[Tensor]] = [[] for _ in kinds]
    batches = center_crops(split.images, args.test_batch, 2, split.check_unchanged, rows=split.rows)
    device = next(model.parameters()).device
    for batch in progress(batches, len(split) / args.test_batch, split.path.name):
        x = model.normalization(batch.to(device))
        both = [model.maps(x), model.maps(x.flip(3))]
        for parts, kind in zip(found, kinds, strict=True):
            parts.append(torch.stack([kind(maps[-max(1, len(kind.layers)) :]) for maps in both]).float().cpu())
    return [torch.cat(parts, 1) for parts in found]


def rows(args: argparse.Namespace, model: CBSwR, training: Split, validation: Split) -> list[dict]:
    """A row for every pooling, with and without the mirror image, every head and size."""
    kinds = poolings(args.backbone)
    halves = [pooled_features(model, half, kinds, args) for half in (training, validation)]
    found, no_nmi = [], why_no_nmi("auto", len(set(validation.labels.tolist())))
    for (kind, train, test), flip in product(zip(kinds, *halves, strict=True), (False, True)):
        train, test = (F.normalize(half.mean(0) if flip else half[0], dim=1) for half in (train, test))
        heads = [("frozen", test.shape[1], None)]
        for power, dim in product(POWERS, map(int, args.dims.split(","))):
            if dim <= min(train.shape[1], len(train) - 1):
                name = f"whiten {power:g}" if power else "pca"
                heads.append((name, dim, closed_form_head(train, dim, "whiten", power)))
        for name, dim, head in heads:
            embeddings = test if head is None else F.normalize(test @ head[0].T + head[1], dim=1)
            scores = score(embeddings, validation.labels, args.seed, ks=recall_ranks(args.dataset),
                           is_query=validation.is_query, no_nmi=no_nmi)  # fmt: skip
            found.append({"pooling": str(kind), "flip_eval": flip, "head": name, "dimension": dim, **scores})
            mirror = ", mirror average" if flip else ""
            print(f"{kind}{mirror}, {name}, {dim}-d: {scores_of(found[-1])}", flush=True)
    return found


def table(found: list[dict]) -> str:
    """A line for every pooling: R@1 / NMI, in per cent, of every head and size. The JSON has the other scores."""
    titles = list(dict.fromkeys(_title(row) for row in found))
    lines = [f"| pooled | mirror average | {' | '.join(titles)} |", "|---" * (2 + len(titles)) + "|"]
    for pooling, flip in dict.fromkeys((row["pooling"], row["flip_eval"]) for row in found):
        cells = {_title(row): scores_of(row) for row in found if (row["pooling"], row["flip_eval"]) == (pooling, flip)}
        line = [pooling, "yes" if flip else "", *(cells.get(title, "") for title in titles)]
        lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines) + "\n"


def _title(row: dict) -> str:
    """Head and size; a frozen feature is as wide as it is."""
    return row["head"] if row["head"] == "frozen" else f"{row['head']}, {row['dimension']}-d"


def scores_of(row: dict) -> str:
    """R@1 and, if it was computed, NMI, in per cent."""
    return " / ".join(f"{100 * row[name]:.1f}" for name in ("recall@1", "nmi") if name in row)


def main(argv: list[str] | None = None) -> int:
    """Load, embed, score, write."""
    args = make_parser().parse(sys.argv[1:] if argv is None else argv)
    check_writable(Path(args.out_dir), "choose another --out_dir")
    training, validation = (load_split(args.data_dir, args.dataset, half, args.image_size)
                            for half in ("training", "validation"))  # fmt: skip
    if args.val_classes:
        training, validation = training.hold_out(args.val_classes)
    torch.manual_seed(args.seed)
    last_two = Pooling.parse(",".join(list(BACKBONES[args.backbone].stages)[-2:]), "gem", unit=True)
    model = build_model(args.backbone, weights=args.weights, pooling=last_two).eval()
    model = model.to(choose_device(args.device), memory_format=torch.channels_last)
    found = rows(args, model, training, validation)
    weights = os.path.basename(args.weights)
    facts = {
        "dataset": args.dataset, "image_size": training.image_size, "backbone": args.backbone, "weights": weights,
        "val_classes": args.val_classes,
        "training_images": len(training), "test_images": len(validation), "seed": args.seed,
        "torch": torch.__version__, "machine": machine(), "rows": found,
    }  # fmt: skip
    stem = Path(args.out_dir) / f"closed_form_{args.dataset}_{training.image_size}px_{args.backbone}"
    stem = stem.with_name(stem.name + f"_val{args.val_classes}") if args.val_classes else stem
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_json(f"{stem}.json", facts)
    with written_whole(f"{stem}.md") as beside:
        beside.write_text(table(found), encoding="utf-8")
    print(f"{stem}.json")
    return 0


if __name__ == "__main__":
    run_script(main)
