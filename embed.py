"""Embed a folder of images, or a pre-processed data set, by a checkpoint or a frozen backbone."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import utils.threads  # noqa: F401

import numpy as np
import torch

from datasets.arrays import DEFAULT_IMAGE_SIZE, SMALLEST_IMAGE_SIZE, load_split
from datasets.folder import ArraySource, FileSource, ImageBatch, batches_of
from datasets.images import allow_pixels, find_images, warn_of_equal
from datasets.views import crop_size
from embedder import Embedder
from models import BACKBONES, Pooling, check_crop_size
from models.export import export_onnx
from utils.devices import choose_device, memory_faults
from utils.distributed import Processes, joined
from utils.embedding_store import EmbeddingStore
from utils.embeddings import count_equal, open_rows, paths_of, read_facts
from utils.errors import UserError, run_script
from utils.options import (
    LARGEST_SEED,
    Parser,
    add_flip_eval,
    add_machine,
    add_max_pixels,
    add_pooling,
    add_precision,
    folder_name,
    name_of,
    path_name,
    target_file,
    usable_cores,
    whole,
)
from utils.progress import progress
from utils.signals import Stopped, StopRequest

GOES_WITH = {
    "skip_bad": "images",
    "shard": "images",
    "max_pixels": "images",
    "split": "dataset",
    "data_dir": "dataset",
    "weights": "backbone",
    "layers": "backbone",
    "pool": "backbone",
    "stripes": "backbone",
    "seed": "backbone",
    "dim": "checkpoint_path",
    "half": "out",
    "overwrite": "out",
    "precision": "out",
}
SPLITS = ("all", "training", "validation")
MOST_NAMED = 3  # unreadable images that an error names


def shard_number(text: str) -> tuple[int, int]:
    """Argparse type: I/N, as a number from 0 and a count."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"expected I/N, such as 1/4 to 4/4, not {text!r}")
    return int(number) - 1, int(count)


def make_parser() -> Parser:
    """Declare the options."""
    parser = Parser("Embed a folder of images, or a pre-processed data set.")
    group = parser.add_argument_group("images")
    add = group.add_mutually_exclusive_group(required=True).add_argument
    add("--images", type=path_name, metavar="DIR", help="a folder, with all folders below it")
    add("--dataset", type=folder_name, help="a pre-processed data set")
    add(
        "--onnx",
        type=target_file(".onnx"),
        metavar="FILE.onnx",
        help="no images: write the network itself, for center crops of images of --image_size",
    )
    add = group.add_argument
    add("--split", type=name_of(SPLITS), default=SPLITS[0], help="of --dataset")
    add("--data_dir", type=path_name, default="data", help="the folder that holds <dataset>/")
    size_default = f"(default: as trained, or {DEFAULT_IMAGE_SIZE})"
    add("--image_size", type=whole(SMALLEST_IMAGE_SIZE), help=f"side in pixels {size_default}")
    add("--skip_bad", action="store_true", help="leave unreadable images out, list them in .json")
    add_max_pixels(group)
    group = parser.add_argument_group("network")
    add = group.add_mutually_exclusive_group(required=True).add_argument
    add("--checkpoint_path", type=path_name, help="a checkpoint or a run's folder: its embedding")
    backbone = name_of(BACKBONES, prefix="timm:")
    add("--backbone", type=backbone, help="a frozen one, or timm:NAME: its pooled features")
    add = group.add_argument
    add("--weights", type=path_name, default="auto", help="of --backbone: auto, none or a file")
    add("--seed", type=whole(0, LARGEST_SEED), default=0, help="of the random --weights none")
    add("--dim", type=whole(1), help="the first numbers of the embedding of a closed-form head")
    add_pooling(group)
    add_flip_eval(group, None)
    add = parser.add_argument_group("output").add_argument
    add(
        "--out",
        type=target_file(".npy", is_alone=False),
        metavar="FILE.npy",
        help="rows of unit length; FILE.csv and FILE.json come with it; after an interruption the "
        "same command goes on",
    )
    add("--half", action="store_true", help="float16 instead of float32")
    add("--overwrite", action="store_true", help="replace a file of that name, whatever it is of")
    text = "embed part I of N alone, from 1; when all are done, the command without it joins them"
    add("--shard", type=shard_number, metavar="I/N", help=text)
    add_precision(add_machine(parser, neighbors=False, workers=usable_cores()))
    return parser


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options and check them against each other."""
    parser = make_parser()
    args = parser.parse(argv)
    for name, needed in GOES_WITH.items():
        if name in args.given and getattr(args, needed) is None:
            parser.error(f"--{name} goes with --{needed}")
    if (args.images is None or args.shard) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parser.error("torchrun goes with --images, and gives each process its --shard itself")
    if (args.out is None) == (args.onnx is None):
        parser.error("give --out FILE.npy with images, or --onnx FILE.onnx without")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Embed the images, or write the network."""
    args = parse_args(argv)
    allow_pixels(args.max_pixels)
    advice = "lower --test_batch, or use --precision bf16"
    try:
        with memory_faults(advice), StopRequest() as stop, joined() as processes:
            if args.onnx:
                with stop.at_once():
                    export(args)
            else:
                embed(args, stop, processes)
    except Stopped as stopped:
        kept = "what is embedded is kept, the same command goes on from there"
        print(f"{stopped}; {kept}" if args.out else stopped)
        return stopped.status
    return 0


def load_embedder(args: argparse.Namespace, device: torch.device) -> Embedder:
    """Load the network that the options name."""
    return Embedder(
        Path(args.checkpoint_path) if args.checkpoint_path else args.backbone,
        args.weights,
        device=device,
        image_size=args.image_size,
        pooling=Pooling.parse(args.layers, args.pool, False, args.stripes),
        dim=args.dim,
        flip=args.flip_eval,
        precision=args.precision,
        seed=args.seed,
    )


def export(args: argparse.Namespace) -> None:
    """Write the network as ONNX, and say what the file takes and gives."""
    embedder = load_embedder(args, torch.device("cpu"))
    size = embedder.image_size
    crop = crop_size(size)
    export_onnx(embedder.model, args.onnx, crop, embedder.features, embedder.flip)
    print(
        f"{args.onnx}: {embedder.features} of {embedder.facts['backbone']}; images uint8 RGB "
        f"(batch, {crop}, {crop}, 3), the center of images squashed to {size} px; features "
        "float32, of unit length"
    )


def embed(args: argparse.Namespace, stop: StopRequest, processes: Processes) -> None:
    """Embed all images; or a shard of them; or, of several processes, each its shard, then join."""
    out = Path(args.out)
    with stop.at_once():
        paths = find_images(Path(args.images)) if args.images else []
        embedder = load_embedder(args, choose_device(args.device, processes))
        source = open_source(args, paths, embedder.image_size)
        check_crop_size(embedder.model.backbone_name, crop_size(source.image_size))
        facts = embedder.facts | embedder.location | source.facts()
        facts["folder"] = os.path.abspath(args.images) if args.images else None
        facts["dtype"] = "float16" if args.half else "float32"
    shard = args.shard or (processes.share if processes.world_size > 1 else None)
    if shard:
        part = source.part(*shard, args.test_batch)
        with EmbeddingStore(out, facts, args.overwrite, is_shared=True) as store:
            collect(args, embedder, part, store, stop)
        print(f"{out}: shard {shard[0] + 1} of {shard[1]}: {len(part)} images are embedded")
        processes.wait()
    if args.shard or not processes.is_first:
        return
    with EmbeddingStore(out, facts, args.overwrite) as store:
        if store.is_complete:
            print(f"{out}: is complete already, {len(store.earlier.rows)} rows")
            return
        collect(args, embedder, source, store, stop)
        join(args, embedder, source, store, stop)


def collect(
    args: argparse.Namespace,
    embedder: Embedder,
    source: FileSource | ArraySource,
    store: EmbeddingStore,
    stop: StopRequest,
) -> None:
    """Embed the images of a source that have no row yet, and keep their rows."""
    source.known_rows = store.known_rows()
    if len(source.known_rows):
        print(f"{store.file}: goes on; {len(source.known_rows)} images have a row already")
    for crops, rows in embedded(args, embedder, source, "embedding"):
        if not crops.is_unchanged:
            store.add(rows, crops.listed)
        stop.check()


def join(
    args: argparse.Namespace,
    embedder: Embedder,
    source: FileSource | ArraySource,
    store: EmbeddingStore,
    stop: StopRequest,
) -> None:
    """Write the rows of all images, in order, to the file; what changed meanwhile is embedded."""
    store.save()
    source.known_rows = store.known_rows()

    def batches() -> Iterator[tuple[np.ndarray, list, list]]:
        for crops, rows in embedded(args, embedder, source, "joining"):
            yield rows, crops.listed, crops.unreadable
            stop.check()

    changes = store.join(batches())
    if changes:
        print(f"{store.file}: {changes}")
    rows = open_rows(store.file)
    facts = read_facts(paths_of(store.file)["json"])
    print(
        f"{store.file}: {len(rows)} rows of {embedder.dimension}, {facts['dtype']}, "
        f"{embedder.features} of {facts['backbone']} at {source.image_size} px"
    )
    if facts["unreadable"]:
        print(f"{len(facts['unreadable'])} unreadable images are left out, see the .json")
    warn_of_equal(count_equal(rows), len(rows), "embedding")


def embedded(
    args: argparse.Namespace, embedder: Embedder, source: FileSource | ArraySource, title: str
) -> Iterator[tuple[ImageBatch, np.ndarray]]:
    """Iterate the batches of a source with their rows (b, D), known or new."""
    for crops in progress(batches_of(source, args.test_batch), title):
        if not args.skip_bad:
            refuse_unreadable(crops)
        yield crops, crops.rows(embedder.embed_crops, embedder.dimension)


def open_source(
    args: argparse.Namespace, paths: Sequence[Path], image_size: int
) -> FileSource | ArraySource:
    """Open the images: files, which are squashed to `image_size`, or those of a data set, of that
    size or, for a frozen backbone, of the size that there is.
    """
    if paths:
        return FileSource(paths, image_size, args.workers)
    names = SPLITS[1:] if args.split == "all" else [args.split]
    splits = []
    size = image_size if args.checkpoint_path else args.image_size
    for name in names:
        splits.append(load_split(args.data_dir, args.dataset, name, size))
        size = splits[0].image_size
    return ArraySource(splits)


def refuse_unreadable(crops: ImageBatch) -> None:
    """Raise UserError that names the first unreadable images of a batch, if there are any."""
    names = [f"{path} ({reason})" for path, reason in crops.unreadable[:MOST_NAMED]]
    if names:
        raise UserError(
            f"unreadable, perhaps among others: {', '.join(names)}; mend or remove them, or leave "
            "such images out with --skip_bad"
        )


if __name__ == "__main__":
    run_script(main)
