"""From stored images to network-sized crops: the random two views of training, the centre crop of everything else.

All randomness of an epoch is drawn at once from a generator seeded by (seed, epoch). What a batch holds therefore
depends on nothing else: not on the number of workers, nor on where a run was stopped and resumed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FLIP_PROBABILITY = 0.75  # of the released code
POSITIVE_PROBABILITY = 0.5


def crop_size(image_size: int) -> int:
    """Side of the crop that the network sees of stored images: 224 of 256, and 7/8 of any other size."""
    return image_size * 7 // 8


@dataclass(frozen=True)
class Views:
    """What to cut for a batch of B rows: image index, top, left (pixels), mirrored or not; each (B,)."""

    index: np.ndarray
    top: np.ndarray
    left: np.ndarray
    flip: np.ndarray


class EpochPlan:
    """The order, crops, flips and second views of one epoch over N images of side S, in batches of m images."""

    def __init__(
        self,
        count: int,
        batch_size: int,
        image_size: int,
        seed: int,
        epoch: int,
        positives: np.ndarray | None = None,
        share: tuple[int, int] = (0, 1),
        rows: np.ndarray | None = None,
        neighbors: np.ndarray | None = None,
    ) -> None:
        """positives: (N,) index of each image's positive; the second view is of it or of the image itself, by coin.

        neighbors: (N, g - 1) index of the nearest neighbours of each image, for batches of m / g images drawn at random
        and their neighbours, m in all (in which an image may be there twice).

        rows: (N,) where each image lies among those stored; None for images stored alone and in order.

        share: (r, n) gives of every batch's images the r-th of n parts (those of one of n processes).
        """
        if not 1 <= batch_size <= count:
            raise ValueError(f"a batch of {batch_size} images needs at least as many; there are {count}")
        if batch_size % share[1]:
            raise ValueError(f"a batch of {batch_size} images cannot be shared by {share[1]} processes")
        rng = np.random.default_rng([seed, epoch])
        margin = image_size - crop_size(image_size)
        self.batch_size, self.share, self.rows = batch_size, share, rows
        self.order = rng.permutation(count)  # (N,)
        if neighbors is not None:
            groups = count // batch_size * batch_size // (1 + neighbors.shape[1])
            drawn = self.order[:groups, None]
            self.order = np.concatenate([drawn, neighbors[drawn[:, 0]]], 1).reshape(-1)
        self.top, self.left = rng.integers(0, margin + 1, (2, 2, count))  # (2, N) each, a row for each view
        self.flip = rng.random((2, count)) < FLIP_PROBABILITY  # (2, N)
        take_positive = rng.random(count) < POSITIVE_PROBABILITY  # (N,)
        itself = np.arange(count)
        self.second = itself if positives is None else np.where(take_positive, positives, itself)  # (N,)

    def __len__(self) -> int:
        """Number of batches; the last incomplete one is dropped."""
        return len(self.order) // self.batch_size

    def images(self, batch: int) -> np.ndarray:
        """Index (m,) of the images of a batch, or of the share of it."""
        part, parts = self.share
        images = self.batch_size // parts
        start = batch * self.batch_size + part * images
        return self.order[start : start + images]

    def views(self, batch: int) -> Views:
        """The 2m rows of a batch (of the share): first views of its images, then second views in the same order."""
        images = self.images(batch)
        both = [np.concatenate([a[0, images], a[1, images]]) for a in (self.top, self.left, self.flip)]
        index = np.concatenate([images, self.second[images]])
        return Views(index if self.rows is None else self.rows[index], *both)


def cut_views(images: np.ndarray, views: Views, crop: int) -> np.ndarray:
    """Cut the crops of a batch: images uint8 (N, S, S, 3) -> uint8 (B, crop, crop, 3)."""
    pixels = images.view("V3")[..., 0]  # (N, S, S): three bytes move as one, which makes mirroring ten times faster
    out = np.empty((len(views.index), crop, crop), pixels.dtype)
    for row, (index, top, left, flip) in enumerate(zip(views.index, views.top, views.left, views.flip, strict=True)):
        patch = pixels[index, top : top + crop, left : left + crop]
        out[row] = patch[:, ::-1] if flip else patch
    return out.view(np.uint8).reshape(*out.shape, 3)


class TwoViewLoader:
    """Iterate an epoch: (views uint8 (2m, crop, crop, 3), image index (m,)), batches cut ahead by worker threads."""

    def __init__(
        self,
        images: np.ndarray,
        plan: EpochPlan,
        workers: int = 2,
        first_batch: int = 0,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """check: called before and after the images of a batch are read; may raise."""
        self.images, self.plan, self.workers, self.first_batch = images, plan, workers, first_batch
        self.check = check

    def __len__(self) -> int:
        return len(self.plan) - self.first_batch

    def _batch(self, number: int) -> tuple[Tensor, Tensor]:
        crops = cut_views(self.images, self.plan.views(number), crop_size(self.images.shape[1]))
        return torch.from_numpy(crops), torch.from_numpy(self.plan.images(number))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from _ahead(self._batch, range(self.first_batch, len(self.plan)), self.workers, self.check)


class ResidentLoader:
    """As `TwoViewLoader`, from images that lie on the device: every batch is one gather there, nothing is copied."""

    def __init__(self, images: Tensor, plan: EpochPlan, first_batch: int = 0) -> None:
        """images: uint8 (N, S, S, 3) on the device."""
        self.images, self.plan, self.first_batch = images, plan, first_batch

    def __len__(self) -> int:
        return len(self.plan) - self.first_batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(self.first_batch, len(self.plan)):
            yield gather_views(self.images, self.plan.views(number)), torch.from_numpy(self.plan.images(number))


def gather_views(images: Tensor, views: Views) -> Tensor:
    """`cut_views` on a device: images uint8 (N, S, S, 3) -> uint8 (B, crop, crop, 3)."""
    crop = crop_size(images.shape[1])
    offsets = np.arange(crop)
    rows = views.top[:, None] + offsets  # (B, crop)
    columns = views.left[:, None] + np.where(views.flip[:, None], offsets[::-1], offsets)  # (B, crop)
    where = (views.index[:, None, None], rows[:, :, None], columns[:, None, :])
    return images[tuple(torch.from_numpy(part).to(images.device, non_blocking=True) for part in where)]


def center_crop(images: np.ndarray) -> np.ndarray:
    """The centre of stored images: uint8 (N, S, S, 3) -> (N, crop, crop, 3), contiguous."""
    crop = crop_size(images.shape[1])
    start = (images.shape[1] - crop) // 2
    inner = slice(start, start + crop)
    return np.ascontiguousarray(images[:, inner, inner])


def center_crops(
    images: np.ndarray,
    batch_size: int,
    workers: int = 1,
    check: Callable[[], None] = lambda: None,
    share: tuple[int, int] = (0, 1),
    rows: np.ndarray | None = None,
) -> Iterator[Tensor]:
    """Iterate the centre crops of all images (or of these rows) in order: uint8 (<= batch_size, crop, crop, 3).

    check: called before and after the images of a batch are read; may raise.
    share: (r, n) gives every n-th batch only, beginning with number r (those of one of n processes).
    """

    def batch(first: int) -> Tensor:
        own = slice(first, first + batch_size)
        return torch.from_numpy(center_crop(images[own] if rows is None else images[rows[own]]))

    part, parts = share
    count = len(images if rows is None else rows)
    yield from _ahead(batch, range(part * batch_size, count, parts * batch_size), workers, check)


def _ahead(make, numbers: range, workers: int, check: Callable[[], None]) -> Iterator:
    """make(number) for each number, in order, computed up to workers + 1 ahead by threads; 0 workers: on demand.

    check() is called before and after each.
    """

    def checked(number: int):
        check()
        made = make(number)
        check()
        return made

    if workers == 0:
        yield from map(checked, numbers)
        return
    with ThreadPoolExecutor(workers) as pool:
        pending: deque = deque()
        try:
            for number in numbers:
                pending.append(pool.submit(checked, number))
                if len(pending) > workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
