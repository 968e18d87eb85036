"""A tiny data set of colored shapes, and an object that must not be unpickled."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

COLORS = (
    (220, 40, 40),
    (40, 200, 60),
    (50, 70, 230),
    (230, 210, 40),
    (200, 60, 220),
    (40, 210, 210),
)


class Malicious:
    """Pickles into a call that makes a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def shapes(count: int, classes: range, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw images uint8 (count, size, size, 3) with labels (count,).

    Class c is a disc or a square of its own color, somewhere on noise.
    """
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size]
    images = rng.integers(90, 130, (count, size, size, 3)).astype(np.uint8)
    labels = np.array([classes[i % len(classes)] for i in range(count)])
    for image, label in zip(images, labels, strict=True):
        y, x = rng.integers(size // 3, 2 * size // 3 + 1, 2)
        down = np.abs(rows - y)
        right = np.abs(columns - x)
        distance = np.hypot(down, right) if label % 2 else np.maximum(down, right)
        image[distance < size / 4] = COLORS[label % len(COLORS)]
    return images, labels


def write_split(
    folder: Path, dataset: str, split: str, images: np.ndarray, labels: np.ndarray
) -> Path:
    """Write one half of a data set below `folder`; returns the image file."""
    stem = f"{split}_{dataset}_{images.shape[1]}resized"
    (folder / dataset).mkdir(parents=True, exist_ok=True)
    np.save(folder / dataset / f"{stem}_label.npy", labels)
    np.save(folder / dataset / f"{stem}_img.npy", images)
    return folder / dataset / f"{stem}_img.npy"


def write_dataset(
    folder: Path, dataset: str = "tiny", count: int = 24, size: int = 32, seed: int = 0
) -> Path:
    """Write both halves, `count` images of 4 classes each; returns `folder`, the --data_dir."""
    write_split(folder, dataset, "training", *shapes(count, range(1, 5), size, seed))
    write_split(folder, dataset, "validation", *shapes(count, range(5, 9), size, seed + 1))
    return folder


def write_dataset_by_chance(folder: Path) -> Path:
    """Write the data set with shuffled test labels: scores in the middle, where a fault shows."""
    write_dataset(folder)
    images, labels = shapes(24, range(5, 9), 32, seed=1)
    shuffled = np.random.default_rng(2).permutation(labels)
    write_split(folder, "tiny", "validation", images, shuffled)
    return folder
