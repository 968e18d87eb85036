"""Score a checkpoint, or a frozen backbone, on the test half of a data set: R@K and NMI."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import utils.threads  # noqa: F401

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from datasets.arrays import Split, load_split
from datasets.views import center_crops, crop_size
from models import BACKBONES, Pooling, check_crop_size, load_network
from utils.clustering import ENGINES
from utils.devices import choose_device, memory_faults
from utils.distributed import Processes, joined
from utils.errors import UserError, run_script
from utils.evaluation import (
    alone_remark,
    check_classes,
    nmi_remark,
    recall_titles,
    score,
    why_no_nmi,
)
from utils.features import embeddings_of, pooled_features
from utils.files import write_json, written_whole
from utils.options import (
    LARGEST_SEED,
    Parser,
    add_flip_eval,
    add_machine,
    add_pooling,
    add_precision,
    folder_name,
    name_of,
    path_name,
    target_file,
    whole,
)
from utils.progress import progress
from utils.signals import StopRequest


def make_parser() -> Parser:
    """Make the parser; its first options are those of the released code."""
    parser = Parser("Score embeddings of the test half of a pre-processed data set.")
    add = parser.add_argument
    add("--dataset", type=folder_name, default="cub200", help="cub200, car196, or another name")
    add("--checkpoint_path", type=path_name, metavar="FILE", help="or a run's folder: its best.pth")
    add("--n_cluster", type=whole(1), help="read from the checkpoint; known, and not needed")
    add("--low_dim", type=whole(1), help="read from the checkpoint; known, and not needed")
    add("--dim", type=whole(1), metavar="D", help="the first D numbers of a closed-form embedding")
    group = parser.add_argument_group("a frozen backbone instead of a checkpoint")
    add = group.add_argument
    names = name_of(BACKBONES, "timm:")
    add("--backbone", type=names, help="or timm:NAME; with a checkpoint that does not say its own")
    add("--weights", type=path_name, default="auto", help="auto (ImageNet), none (random), or FILE")
    add_pooling(group)
    group = parser.add_argument_group("data, scores and output")
    add = group.add_argument
    add("--data_dir", type=path_name, default="data", help="the folder that holds <dataset>/")
    add("--image_size", type=whole(8), help="which pre-processed size (default: as trained)")
    add("--nmi", type=name_of(("on", "off")), default="on", help="off: leave out NMI and AMI")
    add("--nmi_engine", type=name_of(ENGINES), default="auto", help="of its k-means")
    add("--seed", type=whole(0, LARGEST_SEED), default=0, help="of k-means and random weights")
    add("--json", type=target_file(".json"), metavar="FILE.json", help="write the scores as JSON")
    array = target_file(".npy")
    add("--save_embeddings", type=array, metavar="FILE.npy", help="write them, float32 (N, D)")
    add_flip_eval(group, None)
    add_precision(add_machine(parser))
    return parser


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Return the options, checked against each other and against what lies on the disk."""
    parser = make_parser()
    args = parser.parse(argv)
    if not args.checkpoint_path and not args.backbone:
        parser.error("give --checkpoint_path, or --backbone for a frozen backbone")
    for name in {"weights", "layers", "pool", "stripes"} & args.given:
        if args.checkpoint_path:
            parser.error(f"--{name} goes with a frozen backbone; a checkpoint brings its own")
    for name in {"n_cluster", "low_dim", "dim"} & args.given:
        if not args.checkpoint_path:
            parser.error(f"--{name} goes with --checkpoint_path")
    return args


def main(argv: list[str] | None = None) -> int:
    """Load, embed, score, print."""
    args = parse_args(argv)
    advice = "lower --test_batch, or use --precision bf16"
    with memory_faults(advice), StopRequest() as stop, stop.at_once(), joined() as processes:
        test(args, processes)
    return 0


def test(args: argparse.Namespace, processes: Processes) -> None:
    """Embed the test half, each process a part of it, and score it in the first process."""
    device = choose_device(args.device, processes)
    torch.manual_seed(args.seed)
    pooling = Pooling.parse(args.layers, args.pool, False, args.stripes)
    model, about = load_network(
        device, args.checkpoint_path, args.backbone, args.weights, pooling, args.dim
    )
    size = args.image_size or about.get("image_size")
    split = load_split(args.data_dir, args.dataset, "validation", size)
    check_split(args, split)
    processes.check_same({"--test_batch": args.test_batch, "test images": split.images.shape})
    check_crop_size(model.backbone_name, crop_size(split.image_size))
    flip = about["flip_eval"] if args.flip_eval is None else args.flip_eval
    batches = center_crops(split, args.test_batch, args.workers, processes.share)
    batches = progress(batches, "test features")
    (pooled,) = pooled_features(model, batches, args.precision, processes, flip)
    if not processes.is_first:
        return
    is_frozen = args.checkpoint_path is None
    features = F.normalize(pooled, dim=1) if is_frozen else embeddings_of(model, pooled)
    result = {
        **about,
        "dataset": args.dataset,
        "images": len(split),
        "queries": None if split.roles is None else int(split.is_query.sum()),
        "classes": len(split.classes) if split.labeled else None,
        "image_size": split.image_size,
        "dimension": features.shape[1],
        "pooling": str(model.pooling),
        "flip_eval": flip,
        "precision": args.precision,
        "device": device.type,
    }
    if split.labeled:
        result["alone"] = check_classes(split.labels, split.is_query)
        result |= score(
            features.to(device),
            split.labels,
            args.dataset,
            is_query=split.is_query,
            seed=args.seed,
            engine=args.nmi_engine,
            no_nmi=why_no_nmi(args.nmi, len(split.classes)),
            full=True,
            memory_mb=args.eval_memory_mb,
        )
    write_outputs(args, features, result)
    print_result(args, result)


def check_split(args: argparse.Namespace, split: Split) -> None:
    """Refuse a test half that cannot be scored, and embeddings among the data set's own arrays."""
    if not split.labeled and not args.save_embeddings:
        raise UserError(
            f"{split.path}: the images have no labels, so nothing can be scored; give "
            "--save_embeddings FILE.npy, or use embed.py and search.py"
        )
    target = Path(os.path.realpath(args.save_embeddings or "."))
    if args.save_embeddings and target.parent == split.path.parent.resolve():
        raise UserError(f"{target}: lies among the data set's arrays; write to another folder")


def write_outputs(args: argparse.Namespace, features: Tensor, result: dict) -> None:
    """Write the files that are asked for."""
    if args.save_embeddings:
        with written_whole(args.save_embeddings) as path, open(path, "wb") as file:
            np.save(file, features.numpy())
    if args.json:
        write_json(args.json, result)


def print_result(args: argparse.Namespace, result: dict) -> None:
    """Print what was scored, and the scores."""
    for name in ("n_cluster", "low_dim"):
        if getattr(args, name) is not None:
            print(f"--{name} {getattr(args, name)}: not needed; the checkpoint says {result[name]}")
    source = result["checkpoint"] or f"frozen {result['backbone']}, weights {result['weights']}"
    epoch = "" if result["epoch"] is None else f" after epoch {result['epoch']}"
    mirrored = ", image and mirror image averaged" if result["flip_eval"] else ""
    print(f"{source}{epoch}: {result['backbone']}, {result['features']}, {result['dimension']}-d")
    print(f"pooled: {result['pooling']}{mirrored}")
    images = f"{result['images']} test images"
    if result["queries"]:
        images += f" ({result['queries']} queries, the rest is their gallery)"
    if result["classes"] is None:
        print(f"{result['dataset']}: {images} without labels: no scores")
        return
    px = result["image_size"]
    print(f"{result['dataset']}, {px} px: {images} of {result['classes']} classes")
    more = {"MAP@R": "map@r", "R-precision": "r_precision", "AMI": "ami"}
    for line in (recall_titles(result) | {"NMI": "nmi"}, more):
        shown = [
            f"{title} {100 * result[name]:.2f}" for title, name in line.items() if name in result
        ]
        print("  ".join(shown))
    print(f"NMI {nmi_remark(result)}")
    if result["alone"]:
        print(alone_remark(result["alone"]))


if __name__ == "__main__":
    run_script(main)
