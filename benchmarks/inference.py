"""Pooled features of images by the ways in which a CPU can compute them: PyTorch, ONNX Runtime.

python benchmarks/inference.py --backbone resnet18
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnxruntime
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, if run as a script

from benchmarks import paired
from datasets.views import crop_size
from embedder import Embedder
from models.export import export_onnx
from utils.errors import run_script
from utils.options import path_name, whole

FIRST = "PyTorch, fp32"


def main(argv: Sequence[str] | None = None) -> None:
    """Time all ways on the same crops, compare their results, and write the result."""
    parser = paired.make_parser("inference", "Images a second through a frozen network, on a CPU.")
    add = parser.add_argument
    add("--backbone", default="resnet18", help="that is frozen")
    add("--weights", type=path_name, default="auto", help="auto (ImageNet), none (random), or FILE")
    add("--image_size", type=whole(8), default=256, help="of which 7 / 8 are the crop")
    add("--batch", type=whole(1), default=100, help="images at once")
    options = parser.parse(argv)
    if options.tiny:
        options.backbone, options.weights = "resnet_small", "none"
        options.image_size, options.batch = 32, 4
    crop = crop_size(options.image_size)
    pixels = np.random.default_rng(0).integers(0, 256, (options.batch, crop, crop, 3), np.uint8)
    embedders = {
        precision: Embedder(options.backbone, options.weights, device="cpu", precision=precision)
        for precision in ("fp32", "bf16")
    }
    with TemporaryDirectory() as folder:
        file = Path(folder) / "network.onnx"
        export_onnx(embedders["fp32"].model, file, crop, embedders["fp32"].features, False)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(file, settings, ["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    crops = torch.from_numpy(pixels)
    ways = {
        FIRST: lambda: embedders["fp32"].embed_crops(crops),
        "PyTorch, bf16": lambda: embedders["bf16"].embed_crops(crops),
        "ONNX Runtime, fp32": lambda: session.run(None, {name: pixels})[0],
    }
    expected = ways[FIRST]()
    measured = paired.in_turn(ways, options.repeats)
    for way, figures in measured.items():
        figures["images_per_second"] = round(len(pixels) / figures["median_s"], 1)
        figures["least_cosine"] = round(float((ways[way]() * expected).sum(1).min()), 6)
    case = {"shape": list(pixels.shape), "ways": measured}
    paired.write({"data": "random pixels", options.backbone: case}, options)


if __name__ == "__main__":
    run_script(main)
