"""The pre-processed `.npy` files of a data set, memory-mapped and checked."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils.errors import UserError

if TYPE_CHECKING:  # reading the files needs no torch
    from torch import Tensor

SMALLEST_IMAGE_SIZE = 8  # pixels
DEFAULT_IMAGE_SIZE = 256  # pixels, of the released code
SCRIPTS = ("cub200", "car196", "sop", "inshop", "glyphs")  # data sets with a script of their own
UNLABELED = -1  # the label of every image of a data set without labels
HASH_BLOCK = 16 << 20  # bytes
QUERY = 0  # role of the images that search the gallery; every other role is the gallery


@dataclass(frozen=True)
class Split:
    """One half of a data set, or a part of a half (see `hold_out`).

    Attributes:
        images: uint8 RGB (M, S, S, 3) of the whole half, a memory-mapped array; in training it may
            be a tensor on a GPU.
        labels: int64 array (N,).
        path: the file of the images.
        rows: int64 array (N,), where each image of the part lies in `images`.
        roles: int64 array (N,), QUERY or gallery; None if every image searches all others.
    """

    images: np.ndarray | Tensor
    labels: np.ndarray
    path: Path
    rows: np.ndarray
    roles: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        classes = f"of {len(self.classes)} classes" if self.labeled else "without labels"
        return f"{len(self)} images {classes}"

    @property
    def image_size(self) -> int:
        """Side S of the stored images, in pixels."""
        return self.images.shape[1]

    @property
    def labeled(self) -> bool:
        """Whether the classes are known. Without them training works, and nothing can be scored."""
        return bool(self.labels[0] != UNLABELED)

    @property
    def classes(self) -> np.ndarray:
        """The class numbers that are present, ascending."""
        return np.unique(self.labels)

    def class_numbers(self) -> np.ndarray:
        """Return the classes of the images, numbered from 0: int64 (N,).

        Raises UserError if there are no labels.
        """
        if not self.labeled:
            raise UserError(f"{self.path}: has no labels, which this method goes by")
        return np.unique(self.labels, return_inverse=True)[1].astype(np.int64)

    @property
    def is_query(self) -> np.ndarray | None:
        """Bool array (N,): which images are queries; None if every image searches all others."""
        return None if self.roles is None else self.roles == QUERY

    def hold_out(self, n_classes: int) -> tuple[Split, Split]:
        """Divide this half by classes: all but the last `n_classes` classes by number, and these.

        Raises UserError if there are no labels, or fewer than two classes on either side.
        """
        if not self.labeled:
            raise UserError(f"{self.path}: has no labels, so no classes can be held out")
        if n_classes < 2 or len(self.classes) - n_classes < 2:
            raise UserError(
                f"{self.path}: the training half has {len(self.classes)} classes; hold out at "
                f"least 2 and leave at least 2 to train on, not {n_classes}"
            )
        is_held = self.labels >= self.classes[-n_classes]
        return self._part(~is_held), self._part(is_held)

    def sample(self, n_images: int, seed: int) -> Split:
        """Return so many images, drawn at random, in their order.

        Raises UserError if there are fewer.
        """
        if n_images > len(self):
            raise UserError(f"{self.path}: has {len(self)} images to train on, not {n_images}")
        mask = np.zeros(len(self), bool)
        mask[np.random.default_rng(seed).permutation(len(self))[:n_images]] = True
        return self._part(mask)

    def _part(self, mask: np.ndarray) -> Split:
        return replace(self, rows=self.rows[mask], labels=self.labels[mask])

    def fingerprint(self) -> dict[str, str]:
        """Return dtype, shape and SHA-256 of the whole half's arrays: {"images": .., "labels": ..}.

        The hash is that of the hashes of blocks of 16 MiB, so that all cores work on it.
        """
        arrays = {"images": self.images, "labels": self.labels, "roles": self.roles}
        return {name: _fingerprint(array) for name, array in arrays.items() if array is not None}


def _fingerprint(array: np.ndarray) -> str:
    content = memoryview(array).cast("B")
    blocks = (content[start : start + HASH_BLOCK] for start in range(0, len(content), HASH_BLOCK))
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda block: hashlib.sha256(block).digest(), blocks)
        digest = hashlib.sha256(b"".join(digests)).hexdigest()
    return f"{array.dtype} {array.shape} sha256 {digest}"


def load_split(
    data_dir: str | os.PathLike, dataset: str, split: str, image_size: int | None = None
) -> Split:
    """Open the `training` or the `validation` (test) half of a pre-processed data set.

    Args:
        data_dir: the folder that holds `<dataset>/`, or that folder itself.
        image_size: which size to take if pre-processing made several; None takes the only size, or
            256.

    Raises UserError that names the file if it is missing or not as pre-processing writes it.
    """
    homes = [Path(data_dir) / dataset, Path(data_dir)]
    folder = next((home for home in homes if _sizes(home, dataset, split)), homes[0])
    size = image_size or _only_size(folder, dataset, split)
    path = folder / f"{split}_{dataset}_{size}resized_img.npy"
    images = _open_array(path, dataset)
    labels = _open_array(beside(path, "label.npy"), dataset)
    if (
        images.shape[1:] != (size, size, 3)
        or images.dtype != np.uint8
        or size < SMALLEST_IMAGE_SIZE
    ):
        raise UserError(
            f"{path}: expected uint8 images (N, {size}, {size}, 3), found {images.dtype} "
            f"{images.shape}; pre-process again"
        )
    if not images.flags.c_contiguous:
        raise UserError(f"{path}: stored in Fortran order; pre-process again")
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise UserError(
            f"{beside(path, 'label.npy')}: expected {len(images)} integer labels, found "
            f"{labels.dtype} {labels.shape}; pre-process again"
        )
    if len(images) < 2:
        raise UserError(f"{path}: holds {len(images)} images; at least 2 are needed")
    if len(np.unique(labels == UNLABELED)) > 1:
        raise UserError(
            f"{beside(path, 'label.npy')}: -1 (no label) beside labels; label all or none"
        )
    roles = _open_roles(path, dataset, len(images)) if split == "validation" else None
    return Split(images, labels.astype(np.int64), path, np.arange(len(images)), roles)


def beside(image_path: Path, ending: str) -> Path:
    """Return the path of a file that belongs to an image file: ending label.npy, role.npy or
    paths.csv.
    """
    return image_path.with_name(image_path.name.replace("_img.npy", f"_{ending}"))


def _open_roles(image_path: Path, dataset: str, n_images: int) -> np.ndarray | None:
    path = beside(image_path, "role.npy")
    if dataset != "inshop" and not path.exists():
        return None
    roles = _open_array(path, dataset)
    is_whole = roles.shape == (n_images,) and roles.dtype.kind in "iu"
    if not is_whole or set(roles.tolist()) != {0, 1}:
        raise UserError(
            f"{path}: expected a role of each image, query (0) or gallery (1); pre-process again"
        )
    return roles.astype(np.int64)


def _sizes(folder: Path, dataset: str, split: str) -> list[int]:
    """Return the sizes in which a folder holds a half of a data set, the smallest first."""
    pattern = re.compile(rf"{split}_{re.escape(dataset)}_(\d+)resized_img\.npy")
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(match.group(1)) for name in names if (match := pattern.fullmatch(name)))


def _only_size(folder: Path, dataset: str, split: str) -> int:
    sizes = _sizes(folder, dataset, split)
    if not sizes:
        file = folder / f"{split}_{dataset}_{DEFAULT_IMAGE_SIZE}resized_img.npy"
        raise UserError(f"{file}: no such file; {_how_to_make(dataset)}")
    if len(sizes) > 1 and DEFAULT_IMAGE_SIZE not in sizes:
        raise UserError(f"{folder}: {dataset} is there in sizes {sizes}; choose an image size")
    return sizes[0] if len(sizes) == 1 else DEFAULT_IMAGE_SIZE


def _how_to_make(dataset: str) -> str:
    elsewhere = f"if it lies elsewhere, name the folder that holds {dataset}/ as data_dir"
    if dataset in SCRIPTS:
        return f"make it with python pre_process/pre_process_{dataset}.py; {elsewhere}"
    return (
        "make it from a folder of images with python pre_process/pre_process_folder.py --images "
        f"DIR --name {dataset} (data sets with a script of their own: {', '.join(SCRIPTS)}); "
        f"{elsewhere}"
    )


def _open_array(path: Path, dataset: str) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"{path}: no such file; {_how_to_make(dataset)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # about an overflow in the size that a damaged header claims
            return np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception:  # numpy raises almost anything for a damaged header
        raise UserError(
            f"{path}: not a plain .npy array of numbers, or truncated; pre-process again"
        ) from None
