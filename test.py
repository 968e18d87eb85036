"""Score a checkpoint, or a frozen backbone, on the unseen test classes of a data set: R@1/2/4/8 and NMI."""

from __future__ import annotations

from utils.stopping import StopRequest, interrupt_in_one_line

if __name__ == "__main__":
    interrupt_in_one_line()  # the imports below take a while

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from utils.arguments import (
    BACKBONE_NAMES,
    LARGEST_MEMORY,
    LARGEST_SEED,
    Parser,
    backbone_name,
    folder_name,
    name_of,
    path_name,
    whole,
)
from utils.errors import UserError, run_script
from utils.files import check_writable
from utils.process import share_cores
from utils.progress import progress
from utils.runs import run_folder

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
    g = p.add_argument_group("data and output")
    g.add_argument("--data_dir", type=path_name, default="data", help="the folder that holds <dataset>/")
    g.add_argument("--image_size", type=whole(8), help="which pre-processed size to take, if there are several")
    g.add_argument("--json", type=path_name, metavar="FILE", help="write the scores as JSON")
    g.add_argument("--save_embeddings", type=path_name, metavar="FILE.npy",
                   help="write the embeddings, float32 (N, D), in the order of the labels")  # fmt: skip
    g.add_argument("--nmi_engine", type=name_of(("auto", "torch", "sklearn", "faiss")), default="auto",
                   help="of the k-means behind NMI; sklearn: 10 independent restarts as the released code ran them, "
                   "many times slower")  # fmt: skip
    g.add_argument(
        "--seed", type=whole(0, LARGEST_SEED), default=0, help="of the k-means behind NMI, and of a random backbone"
    )
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
    if args.checkpoint_path and "weights" in args.given:
        parser.error("--weights goes with --backbone; a checkpoint brings its own weights")
    try:
        check_targets(args)
    except UserError as error:
        parser.error(str(error))  # once on a machine of many processes
    if args.save_embeddings and not args.save_embeddings.endswith(".npy"):
        parser.error(f"--save_embeddings {args.save_embeddings}: the name must end in .npy")
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
    from models import check_crop_size, load_network
    from utils.devices import choose_device
    from utils.evaluation import score
    from utils.features import extract_features

    device = choose_device(args.device, processes)
    split = load_split(args.data_dir, args.dataset, "validation", args.image_size)
    check_split(args, split)
    processes.check_same({"--test_batch": args.test_batch, "test images": split.images.shape})
    torch.manual_seed(args.seed)
    model, what = load_network(device, args.checkpoint_path, args.backbone, args.weights)
    check_crop_size(model.backbone_name, crop_size(split.image_size))
    batches = center_crops(split.images, args.test_batch, args.workers, split.check_unchanged, processes.share)
    batches = progress(batches, len(split) / (args.test_batch * processes.count), "test features")
    pooled, embeddings = extract_features(model, batches, args.precision, processes)
    if not processes.first:
        return
    features = pooled if args.backbone else embeddings
    result = {
        **what,
        "dataset": args.dataset,
        "images": len(split),
        "classes": len(set(split.labels.tolist())) if split.labelled else None,
        "image_size": split.image_size,
        "dimension": features.shape[1],
        "precision": args.precision,
        "device": device.type,
    }
    if split.labelled:
        result |= score(features.to(device), split.labels, args.seed, args.nmi_engine, args.eval_memory_mb, full=True)
    write_outputs(args, features, result)
    print_result(result)


def check_targets(args) -> None:
    """The files to write, before the work: each can be written and is none of those that are read, nor the other."""
    given = Path(args.checkpoint_path or args.weights)
    read = [os.path.realpath(path) for path in (given, run_folder(given) / "best.pth")]
    for target in filter(None, (args.json, args.save_embeddings)):
        path = Path(os.path.realpath(target))
        if path.is_dir():
            raise UserError(f"{target}: is a folder; give the name of a file")
        if not path.parent.is_dir():
            raise UserError(f"{target}: its folder does not exist; make it first")
        check_writable(path.parent, "choose another place for the file")
        if str(path) in read:
            raise UserError(f"{target}: is read and would be overwritten; choose another name for what is written")
        read.append(str(path))


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

    from utils.files import written_whole

    if args.save_embeddings:
        with written_whole(args.save_embeddings) as path, open(path, "wb") as file:
            np.save(file, features.numpy())
    if args.json:
        with written_whole(args.json) as path:
            path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def print_result(result: dict) -> None:
    """What was scored, and the scores."""
    source = result["checkpoint"] or f"frozen {result['backbone']}, weights {result['weights']}"
    trained = f" after epoch {result['epoch']}" if result["epoch"] is not None else ""
    print(f"{source}{trained}: {result['backbone']}, {result['features']} of {result['dimension']} dimensions")
    classes = "without labels" if result["classes"] is None else f"of {result['classes']} unseen classes"
    print(f"{result['dataset']}: {result['images']} test images {classes}, {result['image_size']} px stored")
    if result["classes"] is None:
        print("no scores: they need labels")
        return
    names = {**{f"R@{k}": f"recall@{k}" for k in (1, 2, 4, 8)}, "NMI": "nmi"}
    for line in (names, {"MAP@R": "map@r", "R-precision": "r_precision", "AMI": "ami"}):
        print("  ".join(f"{title} {100 * result[name]:.2f}" for title, name in line.items()))
    print(f"NMI by {result['nmi_protocol']}")


if __name__ == "__main__":
    run_script(main)
