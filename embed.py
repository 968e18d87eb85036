"""Embed a folder of images, or a pre-processed data set, by a checkpoint or a frozen backbone."""

from __future__ import annotations

from utils.stopping import Stopped, StopRequest, interrupt_in_one_line

if __name__ == "__main__":
    interrupt_in_one_line()  # the imports below take a while

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from utils.arguments import (
    BACKBONE_NAMES,
    FLIP_HINT,
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
from utils.process import place, share_cores
from utils.progress import progress

if TYPE_CHECKING:  # --help does not wait for these
    from datasets.folder import ArraySource, Crops, FileSource
    from models import Pooling

DEFAULT_SIZE = 256  # pixels that a folder's images are squashed to, where the checkpoint does not know better
NAMED = 3  # unreadable images that an error names


def make_parser() -> Parser:
    """The options, named as those of test.py."""
    p = Parser(description="Embed a folder of images, or a pre-processed data set.")
    g = p.add_argument_group("what to embed (one of the two)")
    g.add_argument(
        "--images", type=path_name, metavar="DIR", help="a folder of images; those below it count, hidden ones do not"
    )
    g.add_argument("--dataset", type=folder_name, help="a pre-processed data set: cub200, my_set, ...")
    g.add_argument("--split", type=name_of(("all", "training", "validation")), default="all", help="of --dataset")
    g.add_argument("--data_dir", type=path_name, default="data", help="the folder that holds <dataset>/")
    g.add_argument("--image_size", type=whole(8), help="of --images: the side that they are squashed to (default: the "
                   f"checkpoint's, or {DEFAULT_SIZE}); of --dataset: which size, if there are several")  # fmt: skip
    g.add_argument("--skip_bad", action="store_true", help="leave unreadable images out and list them in FILE.json")
    g = p.add_argument_group("by which network (one of the two)")
    g.add_argument(
        "--checkpoint_path", type=path_name, metavar="FILE", help="a checkpoint, or a run's folder: its embedding"
    )
    g.add_argument("--backbone", type=backbone_name,
                   help=f"a frozen one, its pooled features: {', '.join(BACKBONE_NAMES)}, or timm:NAME")  # fmt: skip
    g.add_argument(
        "--weights", type=path_name, default="auto", help="auto (usual ImageNet weights), none (random), or a file"
    )
    add_pooling(g, "default: the last; a checkpoint brings its own")
    add_dim(g)
    add_flip(g)
    g.add_argument("--seed", type=whole(0, LARGEST_SEED), default=0, help="of --weights none")
    g = p.add_argument_group("output")
    g.add_argument("--out", type=path_name, metavar="FILE.npy",
                   help="the embeddings, rows of unit length; FILE.csv and FILE.json come "
                   "with it; interrupted, the same command goes on")  # fmt: skip
    g.add_argument("--onnx", type=path_name, metavar="FILE",
                   help="instead: write the network itself, for centre crops of images of "
                   "--image_size; needs no images")  # fmt: skip
    g.add_argument("--half", action="store_true", help="float16 instead of float32")
    g.add_argument("--overwrite", action="store_true", help="begin anew where a file of that name lies")
    g = p.add_argument_group("machine")
    g.add_argument("--test_batch", type=whole(1), default=100, help="images a batch")
    g.add_argument(
        "--workers", type=whole(0, 1024), default=2, help="threads that read images ahead; changes speed alone"
    )
    g.add_argument("--device", type=name_of(("auto", "cpu", "cuda")), default="auto", help="auto: cuda if there is one")
    g.add_argument("--precision", type=name_of(("fp32", "bf16")), default="fp32", help="of the network")
    return p


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The options, checked against each other."""
    parser = make_parser()
    args = parser.parse(argv)
    if args.onnx and (args.images or args.dataset or args.out):
        parser.error("--onnx writes the network alone; leave out --images, --dataset and --out")
    if not args.onnx and (args.images is None) == (args.dataset is None):
        parser.error("give either --images, or --dataset")
    if (args.checkpoint_path is None) == (args.backbone is None):
        parser.error("give either --checkpoint_path, or --backbone (with --weights) for a frozen backbone")
    refuse_network_options(parser, args)
    if args.dataset and args.skip_bad:
        parser.error("--skip_bad goes with --images; a data set has no unreadable images")
    target = args.onnx or args.out
    if target is None:
        parser.error("give --out FILE.npy")
    try:
        check_target(target, "" if args.onnx else ".npy")
    except UserError as error:
        parser.error(str(error))
    here = place()
    if here is not None and here.count > 1:
        parser.error("runs as one process; start it without torchrun")
    return args


def main(argv: list[str] | None = None) -> int:
    """Read the options, then do the work."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    share_cores()
    import models  # noqa: F401  # and torch: slow, so before StopRequest takes over

    with StopRequest() as stop:
        try:
            if args.onnx:
                with stop.at_once():
                    export(args)
            else:
                embed(args, stop)
        except Stopped as stopped:
            print(f"{stopped}; what is embedded is kept, the same command goes on from there")
            return stopped.status
    return 0


def export(args: argparse.Namespace) -> None:
    """Write the network as ONNX and say what the file takes and gives."""
    import torch

    from datasets import crop_size
    from models import check_crop_size, load_network
    from models.export import export_onnx

    torch.manual_seed(args.seed)
    model, what = load_network("cpu", args.checkpoint_path, args.backbone, args.weights, pooling_of(args), args.dim)
    size = args.image_size or what.get("image_size") or DEFAULT_SIZE
    crop = crop_size(size)
    check_crop_size(model.backbone_name, crop)
    export_onnx(model, args.onnx, crop, what["features"], args.flip_eval)
    print(f"{args.onnx}: {what['features']} of {what['backbone']}; images uint8 RGB (batch, {crop}, {crop}, 3), the "
          f"centre of images squashed to {size} px; features float32, of unit length")  # fmt: skip


def embed(args: argparse.Namespace, stop: StopRequest) -> None:
    """Load the network, open or continue the file, append batch after batch."""
    import torch

    from datasets import crop_size
    from models import check_crop_size, load_network
    from utils.devices import choose_device
    from utils.embeddings import EmbeddingWriter, network_hash
    from utils.features import extract_features

    with stop.at_once():
        device = choose_device(args.device)
        torch.manual_seed(args.seed)
        model, what = load_network(device, args.checkpoint_path, args.backbone, args.weights, pooling_of(args),
                                   args.dim)  # fmt: skip
        if what.get("flip_eval") and not args.flip_eval:
            print(FLIP_HINT, flush=True)
        source = open_source(args, what)
        check_crop_size(model.backbone_name, crop_size(source.image_size))
        dimension = what["low_dim"] if args.checkpoint_path else model.pooled_dim
        facts = {
            "backbone": what["backbone"], "features": what["features"], "network_sha256": network_hash(model),
            "image_size": source.image_size, "precision": args.precision, "source": source.fingerprint(),
            "images": len(source), **model.pooling.options(), "dim": args.dim, "flip_eval": args.flip_eval,
        }  # fmt: skip
        writer = EmbeddingWriter(Path(args.out), facts, dimension, args.half, args.overwrite)
    if writer.done:
        print(f"{args.out}: is complete already, {writer.rows} rows")
        return
    where = {"checkpoint": what["checkpoint"], "weights": what["weights"], "seed": args.seed}  # to find it again
    writer.facts |= where
    if writer.images:
        print(f"{args.out}: going on after {writer.images} of {len(source)} images")
    try:
        batches = source.batches(args.test_batch, args.workers, writer.images)
        for crops in progress(batches, (len(source) - writer.images) / args.test_batch, "embedding"):
            refuse_unreadable(args, source, crops)
            rows = torch.empty(0, dimension)
            if len(crops.rows):
                pooled, embeddings = extract_features(model, [crops.pixels], args.precision, flip=args.flip_eval)
                rows = pooled if args.backbone else embeddings
            listed = [(source.paths[row], source.classes[row]) for row in crops.rows]
            faults = [(source.paths[row], reason) for row, reason in crops.unreadable]
            writer.add(rows.numpy(), listed, len(listed) + len(faults), faults)
            stop.check()
        writer.finish()
    finally:
        writer.close()
    left_out = f"; {len(writer.unreadable)} unreadable images are left out, see the .json" if writer.unreadable else ""
    print(f"{args.out}: {writer.rows} rows of {dimension}, {writer.facts['dtype']}, {what['features']} of "
          f"{what['backbone']} at {source.image_size} px{left_out}")  # fmt: skip


def pooling_of(args: argparse.Namespace) -> Pooling:
    """What --layers, --pool and --stripes say."""
    from models import Pooling

    return Pooling.parse(args.layers, args.pool, False, args.stripes)


def open_source(args: argparse.Namespace, what: dict) -> FileSource | ArraySource:
    """The images to embed."""
    from datasets import load_split
    from datasets.folder import ArraySource, FileSource
    from utils.images import find_images

    if args.images:
        return FileSource(find_images(Path(args.images)), args.image_size or what.get("image_size") or DEFAULT_SIZE)
    names = ("training", "validation") if args.split == "all" else (args.split,)
    first = load_split(args.data_dir, args.dataset, names[0], args.image_size)
    others = [load_split(args.data_dir, args.dataset, name, first.image_size) for name in names[1:]]
    return ArraySource([first, *others])


def refuse_unreadable(args: argparse.Namespace, source: FileSource | ArraySource, crops: Crops) -> None:
    """Raise UserError naming the first unreadable images of a batch, unless they are to be left out."""
    if crops.unreadable and not args.skip_bad:
        named = ", ".join(f"{source.paths[row]} ({reason})" for row, reason in crops.unreadable[:NAMED])
        raise UserError(f"unreadable, perhaps among others: {named}; mend or remove them, or leave such images out "
                        "with --skip_bad")  # fmt: skip


if __name__ == "__main__":
    run_script(main)
