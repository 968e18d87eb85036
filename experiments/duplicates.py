"""Measure how well cluster.py --duplicates finds changed copies of photos.

    python experiments/duplicates.py --images my_photos

Of each photo a copy is made of every kind of `CHANGES`, and all are embedded by a frozen backbone
(the last two stages, generalized mean, mirror average). A pair of images counts as found if its
cosine is at least SIMILARITY. Recall is the share found of the pairs of a photo and its copy,
precision the share of right pairs among all pairs found.

OUT_DIR/duplicates_BACKBONE.json holds all scores, .md the table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, if run as a script

from datasets.images import find_images, open_rgb
from embedder import Embedder
from models import Pooling
from utils.devices import machine
from utils.errors import run_script
from utils.files import write_json, write_text
from utils.options import Parser, path_name, real, whole
from utils.progress import progress
from utils.tables import markdown_table

SIMILARITIES = [0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99]


def recompressed(photo: Image.Image, quality: int) -> Image.Image:
    """Return a photo as a JPEG file of some quality shows it."""
    file = BytesIO()
    photo.save(file, format="JPEG", quality=quality)
    return Image.open(file)


def cut(photo: Image.Image, share: float) -> Image.Image:
    """Return a photo without `share` of its width and height at each side."""
    x, y = int(share * photo.width), int(share * photo.height)
    return photo.crop((x, y, photo.width - x, photo.height - y))


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "half the size": lambda photo: photo.resize((photo.width // 2, photo.height // 2)),
    "a sixth of the size": lambda photo: photo.resize((photo.width // 6, photo.height // 6)),
    "JPEG quality 30": lambda photo: recompressed(photo, 30),
    "mirrored": ImageOps.mirror,
    "10 % cut off each side": lambda photo: cut(photo, 0.1),
    "brighter by 30 %": lambda photo: ImageEnhance.Brightness(photo).enhance(1.3),
    "gray": lambda photo: ImageOps.grayscale(photo).convert("RGB"),
}


def make_parser() -> Parser:
    """Make the parser of the options."""
    parser = Parser("Measure how well changed copies of photos are found.")
    add = parser.add_argument
    add("--images", type=path_name, required=True, metavar="DIR", help="photos without copies")
    add("--backbone", default="resnet18", help="as of train.py")
    add("--weights", type=path_name, default="auto", help="auto (ImageNet), none (random), or FILE")
    add("--image_size", type=whole(8), default=256, help="side in pixels")
    text = "the cosines to try"
    add("--similarities", nargs="+", type=real(-1, most=1), default=SIMILARITIES, help=text)
    add("--out_dir", type=path_name, default="misc/results", help="folder of the results")
    return parser


def embed_all(args: argparse.Namespace) -> np.ndarray:
    """Embed all photos and copies: (1 + kinds of change, photos, D)."""
    embedder = Embedder(
        args.backbone,
        args.weights,
        image_size=args.image_size,
        pooling=Pooling.parse("last2", "gem", False),
        flip=True,
    )
    paths = find_images(Path(args.images))
    rows = []
    for path in progress(paths, "photos"):
        photo = open_rgb(path)
        rows.append(embedder([photo, *(change(photo) for change in CHANGES.values())]))
    return np.stack(rows, 1)


def scores_at(rows: np.ndarray, similarity: float) -> dict[str, float]:
    """Return recall of each kind of change and precision over all, in percent."""
    originals = rows[0]
    n_right = 0
    n_found = 0
    recalls = {}
    for name, copies in zip(CHANGES, rows[1:], strict=True):
        is_found = originals @ copies.T >= similarity
        right = int(np.diagonal(is_found).sum())
        recalls[name] = 100 * right / len(originals)
        n_right += right
        n_found += int(is_found.sum())
    return recalls | {"precision": 100 * n_right / max(1, n_found)}


def main(argv: Sequence[str] | None = None) -> None:
    """Embed, score, write."""
    args = make_parser().parse(argv)
    rows = embed_all(args)
    lines = [{"similarity": s} | scores_at(rows, s) for s in args.similarities]
    stem = f"{args.out_dir}/duplicates_{args.backbone.replace(':', '_')}"
    Path(args.out_dir).mkdir(parents=True, exist_ok=True)
    facts = {"backbone": args.backbone, "weights": Path(args.weights).name, "machine": machine()}
    facts |= {"photos": rows.shape[1], "image_size": args.image_size}
    write_json(f"{stem}.json", facts | {"rows": lines})
    table = [[f"{s:g}", *(f"{v:.1f}" for v in rest)] for s, *rest in map(dict.values, lines)]
    text = markdown_table([list(lines[0]), *table])
    write_text(f"{stem}.md", text)
    print(text, end="")


if __name__ == "__main__":
    run_script(main)
