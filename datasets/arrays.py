"""The pre-processed `.npy` files of a data set, memory-mapped and checked."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from utils.errors import UserError

SMALLEST_IMAGE_SIZE = 8  # px, of pre-processing too
SCRIPTS = ("cub200", "car196", "sop", "inshop", "glyphs")  # with a pre_process script each
HASH_BLOCK = 16 << 20  # bytes
UNLABELLED = -1  # the label of every image of a data set without labels
WITH_ROLES = ("inshop",)  # their test images are queries and gallery
QUERY, GALLERY = 0, 1  # roles


@dataclass(frozen=True)
class Split:
    """One half of a data set: images uint8 RGB (N, S, S, 3), memory-mapped; labels int64 (N,); the image file.

    A part of a half (see `hold_out`) has the images of the whole half, and of them the `rows` that are its own.
    """

    images: np.ndarray
    labels: np.ndarray
    path: Path
    stamp: tuple[int, ...] = ()  # of the image file when it was opened: device, inode, size, time of its last change
    roles: np.ndarray | None = None  # int64 (N,), QUERY or GALLERY; None: every image searches all others
    rows: np.ndarray | None = None  # (n,) which images are this part's, with labels (n,); None: all

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_size(self) -> int:
        """Side S of the stored images, in pixels."""
        return self.images.shape[1]

    @property
    def labelled(self) -> bool:
        """Whether the classes are known; without them training works and nothing can be scored."""
        return bool(self.labels[0] != UNLABELLED)

    @property
    def label_path(self) -> Path:
        """The file of the labels."""
        return self.path.with_name(self.path.name.replace("_img.npy", "_label.npy"))

    @property
    def role_path(self) -> Path:
        """The file of the roles, where there is one."""
        return self.path.with_name(self.path.name.replace("_img.npy", "_role.npy"))

    @property
    def is_query(self) -> np.ndarray | None:
        """Which images are queries, bool (N,), the others being their gallery; None: each image searches all others."""
        return None if self.roles is None else self.roles == QUERY

    def hold_out(self, classes: int) -> tuple[Split, Split]:
        """This half without its last `classes` classes by number, and these: nothing is copied.

        Raises UserError where there are no labels, or fewer than two classes on either side.
        """
        if not self.labelled:
            raise UserError(f"--val_classes {classes}: {self.label_path} holds no labels; leave the option out")
        present = np.unique(self.labels)
        if classes < 2 or len(present) - classes < 2:
            raise UserError(f"--val_classes {classes}: the training half has {len(present)} classes; hold out at least "
                            "2 and leave at least 2 to train on")  # fmt: skip
        held = self.labels >= present[-classes]
        return tuple(replace(self, rows=np.flatnonzero(own), labels=self.labels[own]) for own in (~held, held))

    def check_unchanged(self) -> None:
        """Raise UserError if the image file has been written to since it was opened; a look at its entry, microseconds.

        Whoever reads a page that a shortened file no longer has is ended by the system without a word. A file put in
        its place under the same name does no harm: what was opened stays as it was.
        """
        try:
            now = _stamp(self.path)
        except OSError:
            return  # removed: what was opened stays
        if now[:2] == self.stamp[:2] and now != self.stamp:
            raise UserError(f"{self.path}: was changed while it was in use; put the old file back and go on from there")

    def fingerprint(self) -> dict[str, str]:
        """Dtype, shape and content of the arrays, in words: {"images": .., "labels": ..}, and "roles" if it has them.

        Labels and roles count as int64.

        The content is the SHA-256 of the SHA-256s of blocks of 16 MiB: every byte counts, all cores work.
        """
        self.check_unchanged()
        arrays = {"images": self.images, "labels": self.labels, "roles": self.roles}
        return {name: _fingerprint(array) for name, array in arrays.items() if array is not None}


def load_split(data_dir: str | os.PathLike, dataset: str, split: str, image_size: int | None = None) -> Split:
    """Open `training` or `validation` (the test half) of a pre-processed data set.

    data_dir: the folder that holds `<dataset>/`, or that folder itself. image_size: which size to take when
    pre-processing made several; None takes the only one (256 if it is among several).
    The test half may have a file of roles beside it, `..._role.npy`. Raises UserError naming the file when it is
    missing or not what pre-processing writes.
    """
    folder = Path(data_dir) / dataset
    if not folder.is_dir() and Path(data_dir).name == dataset:
        folder = Path(data_dir)
    size = image_size or _only_size(folder, dataset, split)
    stem = f"{split}_{dataset}_{size}resized"
    path = folder / f"{stem}_img.npy"
    images = _open_array(path, dataset)
    labels = _open_array(folder / f"{stem}_label.npy", dataset)
    if images.ndim != 4 or images.shape[3] != 3 or images.shape[1] != images.shape[2] or images.dtype != np.uint8:
        raise UserError(
            f"{path}: expected uint8 images (N, S, S, 3), found {images.dtype} {images.shape}; pre-process again"
        )
    if images.shape[1] != size or size < SMALLEST_IMAGE_SIZE:
        raise UserError(
            f"{path}: holds images of {images.shape[1]} px, not the {size} of its name, of {SMALLEST_IMAGE_SIZE} or "
            f"more; pre-process again"
        )
    if not images.flags.c_contiguous and len(images):
        raise UserError(f"{path}: stored in Fortran order; save it in C order, or pre-process again")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(
            f"{folder / f'{stem}_label.npy'}: expected integer labels (N,), found {labels.dtype} {labels.shape}; "
            f"pre-process again"
        )
    if len(labels) != len(images):
        raise UserError(f"{path}: {len(images)} images but {len(labels)} labels; pre-process again")
    if len(labels) and len(np.unique(labels == UNLABELLED)) > 1:
        raise UserError(f"{folder / f'{stem}_label.npy'}: -1 (no label) beside labels; give all images one, or none")
    if len(images) < 2:
        raise UserError(f"{path}: holds {len(images)} images; at least 2 are needed; pre-process again")
    roles = None
    if split == "validation":
        roles = _open_roles(folder / f"{stem}_role.npy", dataset, len(images))
    return Split(images, labels.astype(np.int64), path, _stamp(path), roles)


def _open_roles(path: Path, dataset: str, count: int) -> np.ndarray | None:
    """The roles of `count` images; None for a data set without; UserError for anything but queries and a gallery."""
    if dataset not in WITH_ROLES and not path.exists():
        return None
    roles = _open_array(path, dataset)
    if roles.shape != (count,) or roles.dtype.kind not in "iu":
        raise UserError(
            f"{path}: expected {count} roles, integers, one an image, found {roles.dtype} {roles.shape}; "
            f"pre-process again"
        )
    if set(np.unique(roles).tolist()) != {QUERY, GALLERY}:
        raise UserError(f"{path}: expected queries ({QUERY}) and a gallery ({GALLERY}); pre-process again")
    return roles.astype(np.int64)


def _stamp(path: Path) -> tuple[int, ...]:
    entry = os.stat(path)
    return entry.st_dev, entry.st_ino, entry.st_size, entry.st_mtime_ns


def _fingerprint(array: np.ndarray) -> str:
    content = memoryview(array).cast("B")
    blocks = (content[start : start + HASH_BLOCK] for start in range(0, len(content), HASH_BLOCK))
    with ThreadPoolExecutor() as pool:  # hashlib lets other threads run meanwhile
        digests = pool.map(lambda block: hashlib.sha256(block).digest(), blocks)
        return f"{array.dtype} {array.shape} sha256 {hashlib.sha256(b''.join(digests)).hexdigest()}"


def _only_size(folder: Path, dataset: str, split: str) -> int:
    pattern = re.compile(rf"{split}_{re.escape(dataset)}_(\d+)resized_img\.npy")
    names = os.listdir(folder) if folder.is_dir() else []
    sizes = sorted(int(m.group(1)) for name in names if (m := pattern.fullmatch(name)))
    if not sizes:
        above = folder.parent
        if any(pattern.fullmatch(path.name) for path in above.glob("*.npy")):
            raise UserError(f"{folder}: holds no arrays of {dataset}, but {above} does; move them to {folder}")
        raise UserError(f"{folder / f'{split}_{dataset}_256resized_img.npy'}: no such file; {_how_to_make(dataset)}")
    if len(sizes) > 1 and 256 not in sizes:
        raise UserError(f"{folder}: {dataset} is there in sizes {sizes}; choose one with --image_size")
    return sizes[0] if len(sizes) == 1 else 256


def _how_to_make(dataset: str) -> str:
    if dataset in SCRIPTS:
        return f"make it with python pre_process/pre_process_{dataset}.py (see the README, Preprocessing)"
    return (
        f"make it of a folder of images with python pre_process/pre_process_folder.py --images DIR --name {dataset} "
        f"(data sets with a script of their own: {', '.join(SCRIPTS)})"
    )


def _open_array(path: Path, dataset: str) -> np.ndarray:
    """Memory-map an array, so that a header alone, whatever size it claims, takes no memory; objects are refused."""
    if not path.exists():
        raise UserError(f"{path}: no such file; {_how_to_make(dataset)}")
    if not path.is_file():
        raise UserError(f"{path}: not a file; {_how_to_make(dataset)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of overflow in the product of a shape
            return np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception:  # numpy's parser of headers raises almost anything for damaged ones
        raise UserError(f"{path}: not a plain .npy array of numbers, or truncated; pre-process again") from None
