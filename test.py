"""Score a checkpoint, or a frozen backbone, on the unseen test classes of a data set: R@K and NMI."""

from __future__ import annotations

from utils.stopping import StopRequest, interrupt_in_one_line

if __name__ == "__main__":
    interrupt_in_one_line()  # the imports below take a while

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from utils.arguments import (
    BACKBONE_NAMES,
    FLIP_HINT,
    LARGEST_MEMORY,
    LARGEST_SEED,
    Parser,
    add_dim,
    add_flip,
    add_pooling,
    backbone_name,
    folder_name,
    name_of,
    path_name,
    refuse_network_options,
    whole,
)
from utils.errors import UserError, run_script
from utils.files import check_target
from utils.process import share_cores
from utils.progress import progress
from utils.runs import nmi_remark, recall_titles, run_folder

if TYPE_CHECKING:  # --help does not wait for these
    from utils.distributed import Processes


def make_parser() -> Parser:
    """The options; the first two are those of the released code."""
    p = Parser(description="Score embeddings of the test half of a pre-processed data set.")
    p.add_argument(
        "--dataset", type=folder_name, default="cub200", help="cub200, car196, glyphs, or any name with arrays"
    )
    p.add_argument("--checkpoint_path", type=path_name, metavar="FILE",
                   help="a checkpoint of this project or of the authors, or a run's folder (its best.pth); backbone, K "
                   "and embedding size are read from it")  # fmt: skip
    g = p.add_argument_group("a frozen backbone instead of a checkpoint (pooled features)")
    g.add_argument("--backbone", type=backbone_name, help=f"one of {', '.join(BACKBONE_NAMES)}, or timm:NAME")
    g.add_argument(
        "--weights", type=path_name, default="auto", help="auto (usual ImageNet weights), none (random), or a file"
    )
    add_pooling(g, "default: the last; a checkpoint brings its own")
    g = p.add_argument_group("data and output")
    g.add_argument("--data_dir", type=path_name, default="data", help="the folder that holds <dataset>/")
    g.add_argument("--image_size", type=whole(8), help="which pre-processed size to take, if there are several")
    g.add_argument("--json", type=path_name, metavar="FILE", help="write the scores as JSON")
    g.add_argument("--save_embeddings", type=path_name, metavar="FILE.npy",
                   help="write the embeddings, float32 (N, D), in the order of the labels")  # fmt: skip
    g.add_argument("--nmi", type=name_of(("on", "off")), default="on",
                   help="off: leave out NMI and AMI, which take many minutes with thousands of classes")  # fmt: skip
    g.add_argument("--nmi_engine", type=name_of(("auto", "torch", "sklearn", "faiss")), default="auto",
                   help="of the k-means behind NMI; sklearn: 10 independent restarts as the released code ran them, "
                   "many times slower")  # fmt: skip
    g.add_argument(
        "--seed", type=whole(0, LARGEST_SEED), default=0, help="of the k-means behind NMI, and of a random backbone"
    )
    add_dim(g)
    add_flip(g)
    g = p.add_argument_group("machine")
    g.add_argument("--test_batch", type=whole(1), default=100, help="images a batch")
    g.add_argument("--eval_memory_mb", type=whole(1, LARGEST_MEMORY), default=512,
                   help="MiB for the search for neighbours beside the embeddings; changes speed alone")  # fmt: skip
    g.add_argument(
        "--workers", type=whole(0, 1024), default=2, help="threads that cut crops ahead; changes speed alone"
    )
    g.add_argument("--device", type=name_of(("auto", "cpu", "cuda")), default="auto", help="auto: cuda if there is one")
    g.add_argument("--precision", type=name_of(("fp32", "bf16")), default="fp32", help="of the network")
    return p


def main(argv: list[str] | None = None) -> int:
    """Read the options, then do the work."""
    parser = make_parser()
    args = parser.parse(sys.argv[1:] if argv is None else argv)
    if (args.checkpoint_path is None) == (args.backbone is None):
        parser.error("give either --checkpoint_path, or --backbone (with --weights) for a frozen backbone")
    refuse_network_options(parser, args)
    if args.nmi == "off" and "nmi_engine" in args.given:
        parser.error("--nmi_engine goes with --nmi on; leave one of them out")
    try:
        check_targets(args)
    except UserError as error:
        parser.error(str(error))  # once on a machine of many processes
    share_cores()
    import models  # noqa: F401  # and torch: slow, so before StopRequest takes over
    from utils.distributed import joined

    with StopRequest() as stop, stop.at_once(), joined() as processes:
        test(args, processes)
    return 0


def test(args: argparse.Namespace, processes: Processes) -> None:
    """Load, embed, score, print; of many processes each embeds some of the images, the first does the rest."""
    import torch

    from datasets import center_crops, crop_size, load_split
    from models import Pooling, check_crop_size, load_network
    from utils.devices import choose_device
    from utils.evaluation import NMI_CLASSES, recall_ranks, score, why_no_nmi
    from utils.features import extract_features

    device = choose_device(args.device, processes)
    split = load_split(args.data_dir, args.dataset, "validation", args.image_size)
    check_split(args, split)
    processes.check_same({"--test_batch": args.test_batch, "test images": split.images.shape})
    torch.manual_seed(args.seed)
    model, what = load_network(device, args.checkpoint_path, args.backbone, args.weights,
                               Pooling.parse(args.layers, args.pool, False, args.stripes), args.dim)  # fmt: skip
    check_crop_size(model.backbone_name, crop_size(split.image_size))
    if what.get("flip_eval") and not args.flip_eval and processes.first:
        print(FLIP_HINT, flush=True)
    batches = center_crops(split.images, args.test_batch, args.workers, split.check_unchanged, processes.share)
    batches = progress(batches, len(split) / (args.test_batch * processes.count), "test features")
    pooled, embeddings = extract_features(model, batches, args.precision, processes, args.flip_eval)
    if not processes.first:
        return
    features = pooled if args.backbone else embeddings
    result = {
        **what,
        "dataset": args.dataset,
        "images": len(split),
        **({} if split.roles is None else {"queries": int(split.is_query.sum())}),
        "classes": len(set(split.labels.tolist())) if split.labelled else None,
        "image_size": split.image_size,
        "dimension": features.shape[1],
        "pooling": str(model.pooling),
        "flip_eval": args.flip_eval,
        "precision": args.precision,
        "device": device.type,
    }
    if split.labelled:
        if args.nmi == "on" and result["classes"] > NMI_CLASSES:
            print(f"NMI: k-means of {result['classes']} clusters takes minutes (--nmi off leaves it out)", flush=True)
        result |= score(features.to(device), split.labels, args.seed, args.nmi_engine, args.eval_memory_mb, full=True,
                        ks=recall_ranks(args.dataset), is_query=split.is_query,
                        no_nmi=why_no_nmi(args.nmi, result["classes"]))  # fmt: skip
    write_outputs(args, features, result)
    print_result(result)


def check_targets(args) -> None:
    """The files to write, before the work: each can be written and is none of those that are read, nor the other."""
    given = Path(args.checkpoint_path or args.weights)
    read = [os.path.realpath(path) for path in (given, run_folder(given) / "best.pth")]
    for target in filter(None, (args.json, args.save_embeddings)):
        check_target(target, ".npy" if target == args.save_embeddings else "")
        path = os.path.realpath(target)
        if path in read:
            raise UserError(f"{target}: is read and would be overwritten; choose another name for what is written")
        read.append(path)


def check_split(args, split) -> None:
    """A test half that can be scored, by an engine that is here, and no target that is one of its files."""
    from utils.clustering import has_faiss

    if not split.labelled and not args.save_embeddings:
        raise UserError(f"{split.label_path}: the images have no labels, so nothing can be scored; give "
                        "--save_embeddings FILE.npy, or use embed.py and search.py")  # fmt: skip
    if split.labelled and len(set(split.labels.tolist())) < 2:
        raise UserError(f"{split.path}: holds images of one class only; scores need at least two test classes")
    if args.nmi_engine == "faiss" and not has_faiss():
        raise UserError("--nmi_engine faiss: faiss cannot be imported here; install it, or use --nmi_engine torch")
    if args.save_embeddings and Path(os.path.realpath(args.save_embeddings)).parent == split.path.parent.resolve():
        raise UserError(f"{args.save_embeddings}: lies among the data set's own arrays; write to another folder")


def write_outputs(args, features, result: dict) -> None:
    """The files asked for, each written whole."""
    import numpy as np

    from utils.files import write_json, written_whole

    if args.save_embeddings:
        with written_whole(args.save_embeddings) as path, open(path, "wb") as file:
            np.save(file, features.numpy())
    if args.json:
        write_json(args.json, result)


def print_result(result: dict) -> None:
    """What was scored, and the scores."""
    source = result["checkpoint"] or f"frozen {result['backbone']}, weights {result['weights']}"
    trained = f" after epoch {result['epoch']}" if result["epoch"] is not None else ""
    print(f"{source}{trained}: {result['backbone']}, {result['features']} of {result['dimension']} dimensions")
    if result["pooling"] != "avg" or result["flip_eval"]:
        flip = ", image and mirror image averaged" if result["flip_eval"] else ""
        print(f"pooled: {result['pooling']}{flip}")
    classes = "without labels" if result["classes"] is None else f"of {result['classes']} unseen classes"
    roles = f" ({result['queries']} queries, the others their gallery)" if "queries" in result else ""
    print(f"{result['dataset']}: {result['images']} test images{roles} {classes}, {result['image_size']} px stored")
    if result["classes"] is None:
        print("no scores: they need labels")
        return
    names = {**recall_titles(result), "NMI": "nmi"}
    for line in (names, {"MAP@R": "map@r", "R-precision": "r_precision", "AMI": "ami"}):
        print("  ".join(f"{title} {100 * result[name]:.2f}" for title, name in line.items() if name in result))
    print(f"{'NMI and AMI' if 'nmi_left_out' in result else 'NMI'} {nmi_remark(result)}")


if __name__ == "__main__":
    run_script(main)
