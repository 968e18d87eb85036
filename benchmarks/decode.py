"""Photos to squares of 256 pixels, beside what a user would write with torchvision; one thread.

    python benchmarks/decode.py --images my_photos --backbone resnet18

Photos are enlarged or reduced to 0.2, 2 and 12 million pixels, and saved as JPEG of quality 92.
With a backbone, the cosine of its features to those of full decoding is measured, too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.io import decode_jpeg
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, if run as a script

from benchmarks import paired
from datasets.images import decode_image, find_images, open_rgb
from embedder import Embedder
from utils.errors import run_script
from utils.options import path_name

SIDE = 256
SIZES = {"0.2 MP": (520, 390), "2 MP": (1640, 1230), "12 MP": (4000, 3000)}
COUNT = 16  # photos
TINY = {"0.01 MP": (120, 90)}


def smooth_photos(count: int) -> list[Image.Image]:
    """Draw pictures of smooth random colors."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, 12, 16, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in coarse]


def saved(photo: Image.Image, size: tuple[int, int]) -> bytes:
    """Return a photo as a JPEG file of some size."""
    file = BytesIO()
    photo.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=92)
    return file.getvalue()


def ways(files: Sequence[bytes]) -> dict[str, Callable[[], Any]]:
    """Return the ways to decode all files; each gives uint8 squares."""
    resize = v2.Resize((SIDE, SIDE), antialias=True)

    def by_pillow(file: bytes) -> np.ndarray:
        return np.asarray(resize(Image.open(BytesIO(file)).convert("RGB")))

    def by_torchvision(file: bytes) -> torch.Tensor:
        return resize(decode_jpeg(torch.frombuffer(bytearray(file), dtype=torch.uint8)))

    makers = {
        "this project": lambda file: decode_image(file, SIDE),
        "this project, in full, as archives": lambda file: decode_image(file, SIDE, as_stored=True),
        "Pillow, torchvision's Resize": by_pillow,
        "torchvision's decode_jpeg, Resize": by_torchvision,
    }
    return {name: lambda make=make: [make(file) for file in files] for name, make in makers.items()}


def cosines(files: Sequence[bytes], embedder: Embedder) -> dict[str, float]:
    """Compare the features of files with those of the same files decoded in full."""
    squares = ([decode_image(f, SIDE, as_stored=full) for f in files] for full in (False, True))
    reduced, full = map(embedder, squares)
    values = (reduced * full).sum(1)
    return {"mean": round(float(values.mean()), 5), "least": round(float(values.min()), 5)}


def main(argv: Sequence[str] | None = None) -> None:
    """Time all ways at all sizes, and write the result."""
    parser = paired.make_parser("decode", "Images a second, from JPEG files to squares.")
    text = "photos to take (default: drawn ones)"
    parser.add_argument("--images", type=path_name, metavar="DIR", help=text)
    parser.add_argument("--backbone", help="a frozen one, whose features are compared")
    parser.add_argument("--weights", type=path_name, default="auto", help="of it: auto or a file")
    options = parser.parse(argv)
    embedder = Embedder(options.backbone, options.weights) if options.backbone else None
    torch.set_num_threads(1)
    count = 2 if options.tiny else COUNT
    photos = smooth_photos(count)
    if options.images:
        paths = find_images(Path(options.images))
        photos = [open_rgb(path) for path in paths[:: max(1, len(paths) // count)][:count]]
    result: dict[str, Any] = {"data": "photos" if options.images else "smooth random colors"}
    for name, size in (TINY if options.tiny else SIZES).items():
        files = [saved(photo, size) for photo in photos]
        measured = paired.in_turn(ways(files), options.repeats)
        for figures in measured.values():
            figures["images_per_second"] = round(len(photos) / figures["median_s"], 1)
        result[name] = {"shape": [len(photos), *size], "ways": measured}
        if embedder:
            result[name]["cosine_to_full_decoding"] = cosines(files, embedder)
    paired.write(result, options)


if __name__ == "__main__":
    run_script(main)
