"""What the tests of embedding and searching share: photos, a small network, a table."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from models import build_model
from utils.embedding_store import EmbeddingStore

CLASSES = ("cat", "dog", "owl", "rat")
SIZE = 32  # pixels that photos are squashed to


def make_photos(folder: Path, first: int = 0) -> Path:
    """Write three photos of 40 x 30 pixels of each class, the second one in a deeper folder.

    first: the seed of the first photo; others show others.
    """
    endings = ("jpg", "png", "JPEG")
    for number in range(3 * len(CLASSES)):
        place = folder / CLASSES[number // 3] / ("", "deep", "")[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(first + number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        photo = Image.fromarray(coarse).resize((40, 30), Image.Resampling.BICUBIC)
        photo.save(place / f"{number:02d}.{endings[number % 3]}")
    return folder


def save_network(path: Path, seed: int = 5, **config: object) -> Path:
    """Save a checkpoint of a random network that says it was trained on images of SIZE pixels."""
    torch.manual_seed(seed)
    content = {
        "model": build_model("resnet_small", n_cluster=4, low_dim=12).state_dict(),
        "epoch": 1,
        "config": {"backbone": "resnet_small"} | config,
        "data": {"training": {"images": f"uint8 (9, {SIZE}, {SIZE}, 3) sha256 00"}},
    }
    torch.save(content, path)
    return path


def write_embeddings(file: Path, rows: np.ndarray, listed: list[tuple], **facts: object) -> None:
    """Write a file of embeddings (N, D), with the columns of each row."""
    facts |= {"dimension": rows.shape[1], "dtype": str(rows.dtype), "source": "a"}
    with EmbeddingStore(file, facts) as store:
        store.join([(rows, listed, [])])


def read_table(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file."""
    with open(path, encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))
