"""From stored images to crops: two random views in training, the center crop everywhere else.

All randomness of an epoch is drawn at once by a generator seeded with (seed, epoch). A batch
therefore depends neither on the number of workers nor on where a run was stopped and resumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import resized_crop

from datasets.arrays import Split
from utils.errors import UserError
from utils.read_ahead import ReadAhead

FLIP_PROBABILITY = 0.75  # of the released code
POSITIVE_PROBABILITY = 0.5  # of the released code
COPIED_AT_ONCE = 1024  # images
N_PARTS = 4  # of an image, see `part_crops`


def crop_size(image_size: int) -> int:
    """Return the side of the crop that the network sees: 224 of 256 pixels, 7/8 of other sizes."""
    return image_size * 7 // 8


@dataclass(frozen=True)
class CropPlan:
    """What to cut for B rows, each (B,): stored row, top, left, side (pixels), mirrored or not."""

    row: np.ndarray
    top: np.ndarray
    left: np.ndarray
    side: np.ndarray
    flip: np.ndarray


class EpochPlan:
    """The batches of one epoch: which images, and which crops of them."""

    def __init__(
        self,
        split: Split,
        batch_size: int,
        seed: int,
        epoch: int,
        positives: np.ndarray | None = None,
        neighbors: np.ndarray | None = None,
        crop_area: float | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """Draw an epoch over N images.

        Args:
            batch_size: m, images a batch; the last incomplete batch is dropped.
            positives: (N,) the positive of each image. The second view is of the positive or of
                the image itself, with probability 1/2 each. None: always of the image itself.
            neighbors: (N, G - 1) nearest neighbors of each image. A batch is then m / G images
                drawn at random, each followed by its neighbors. None: every image is drawn once.
            crop_area: a crop is a square of at least this share of the image's area, the share
                drawn anew for each. None: of the side that `crop_size` says.
            share: (r, n) takes the r-th of n equal parts of every batch, that of one of n
                processes.
        """
        rng = np.random.default_rng([seed, epoch])
        count = len(split)
        size = split.image_size
        order = rng.permutation(count)
        if neighbors is not None:
            n_groups = count // batch_size * batch_size // (1 + neighbors.shape[1])
            drawn = order[:n_groups, None]
            order = np.concatenate([drawn, neighbors[drawn[:, 0]]], 1).reshape(-1)
        self.batch_size = batch_size
        self.share = share
        self.order = order  # (P,), an image number for each place of the epoch
        shape = (2, len(order))  # (view, place)
        self.sides = np.full(shape, crop_size(size))
        if crop_area is not None:
            self.sides = np.ceil(np.sqrt(rng.uniform(crop_area, 1, shape)) * size).astype(int)
        n_places = size - self.sides + 1
        self.corners = rng.integers(0, n_places, (2, *shape))  # (top or left, view, place)
        self.flips = rng.random(shape) < FLIP_PROBABILITY
        self.second = order  # (P,), the image of the second view
        if positives is not None:
            takes_positive = rng.random(len(order)) < POSITIVE_PROBABILITY
            self.second = np.where(takes_positive, positives[order], order)
        self.rows = split.rows

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.order) // self.batch_size

    def places(self, batch: int) -> slice:
        """Return the places (m / n) of this process's share of a batch."""
        part, n_parts = self.share
        size = self.batch_size // n_parts
        start = batch * self.batch_size + part * size
        return slice(start, start + size)

    def index(self, batch: int) -> np.ndarray:
        """Return the image numbers (m / n,) of this process's share of a batch."""
        return self.order[self.places(batch)]

    def crops(self, batch: int) -> CropPlan:
        """Return the crops of a batch: first views of its images, then their second views."""
        places = self.places(batch)
        images = np.concatenate([self.order[places], self.second[places]])
        draws = (*self.corners, self.sides, self.flips)
        drawn = (np.concatenate([d[0, places], d[1, places]]) for d in draws)
        return CropPlan(self.rows[images], *drawn)


def cut_crops(images: np.ndarray, crops: CropPlan, size: int) -> np.ndarray:
    """Cut crops whose side is `size`: images uint8 (M, S, S, 3) -> uint8 (B, size, size, 3)."""
    pixels = images.view("V3")[..., 0]  # three bytes move as one: mirroring is ten times faster
    out = np.empty((len(crops.row), size, size), pixels.dtype)
    fields = zip(crops.row, crops.top, crops.left, crops.flip, strict=True)
    for place, (row, top, left, flip) in enumerate(fields):
        patch = pixels[row, top : top + size, left : left + size]
        out[place] = patch[:, ::-1] if flip else patch
    return out.view(np.uint8).reshape(*out.shape, 3)


def gather_crops(images: Tensor, crops: CropPlan, size: int) -> Tensor:
    """Do what `cut_crops` does, by one gather on the device where the images lie."""
    fields = np.stack([crops.row, crops.top, crops.left, crops.flip])
    fields = torch.from_numpy(fields).to(images.device, non_blocking=True)
    row, top, left, flip = fields[..., None, None]  # (B, 1, 1) each
    offsets = torch.arange(size, device=images.device)
    columns = left + torch.where(flip.bool(), size - 1 - offsets, offsets)
    return images[row, top + offsets[:, None], columns]


def resize_crops(images: np.ndarray | Tensor, crops: CropPlan, size: int) -> Tensor:
    """Cut squares of any sides and resize them, where the images lie.

    images: uint8 (M, S, S, 3). Returns uint8 (B, size, size, 3).
    """
    pixels = torch.as_tensor(images[crops.row]).permute(0, 3, 1, 2)
    fields = zip(pixels, crops.top, crops.left, crops.side, crops.flip, strict=True)
    patches = []
    for image, top, left, side, flip in fields:
        patch = resized_crop(image, top, left, side, side, [size, size])
        patches.append(patch.flip(2) if flip else patch)
    return torch.stack(patches).permute(0, 2, 3, 1)


def images_on(
    device: torch.device, arrays: Sequence[np.ndarray], data_on: str
) -> Sequence[np.ndarray | Tensor]:
    """Copy stored images, each (M, S, S, 3), to a GPU, or leave them in their files.

    Args:
        data_on: device, host, or auto: the GPU if half of its free memory holds all of them.

    Raises UserError if they should be on a GPU and there is none.
    """
    if device.type == "cpu" and data_on == "device":
        raise UserError("there is no GPU to hold the images; leave them on the host")
    if device.type == "cpu" or data_on == "host":
        return arrays
    n_bytes = sum(images.nbytes for images in arrays)
    if data_on == "auto" and n_bytes > torch.cuda.mem_get_info(device)[0] / 2:
        return arrays
    return [_copied(images, device) for images in arrays]


def _copied(images: np.ndarray, device: torch.device) -> Tensor:
    resident = torch.empty(images.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(images), COPIED_AT_ONCE):
        block = images[start : start + COPIED_AT_ONCE]
        resident[start : start + COPIED_AT_ONCE] = torch.from_numpy(block.copy())
    return resident


def two_view_batches(
    images: np.ndarray | Tensor, plan: EpochPlan, workers: int, first_batch: int = 0
) -> ReadAhead:
    """Iterate an epoch: views uint8 (2m, crop, crop, 3) and image numbers (m,) of each batch.

    images: an array (M, S, S, 3), cut ahead by `workers` threads, or a tensor on a device,
        gathered there.
    """
    size = crop_size(images.shape[1])
    batches = range(first_batch, len(plan))

    def cut(batch: int) -> tuple[Tensor, Tensor]:
        crops = plan.crops(batch)
        index = torch.from_numpy(plan.index(batch))
        if (crops.side != size).any():
            return resize_crops(images, crops, size), index
        if isinstance(images, Tensor):
            return gather_crops(images, crops, size), index
        return torch.from_numpy(cut_crops(images, crops, size)), index

    return ReadAhead(cut, batches, ahead(images, workers))


def ahead(images: np.ndarray | Tensor, workers: int) -> int:
    """Return how many threads cut ahead: none where the images lie on a device."""
    return 0 if isinstance(images, Tensor) else workers


def center_crop(images: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """Return the center of stored images, a view: uint8 (N, S, S, 3) -> (N, crop, crop, 3)."""
    size = crop_size(images.shape[1])
    start = (images.shape[1] - size) // 2
    return images[:, start : start + size, start : start + size]


def center_crops(
    split: Split, batch_size: int, workers: int = 1, share: tuple[int, int] = (0, 1)
) -> ReadAhead:
    """Iterate the center crops of all images in order: uint8 (b, crop, crop, 3), b <= batch_size.

    share: (r, n) takes every n-th batch beginning with number r, those of one of n processes.
    """
    centers = center_crop(split.images)

    def cut(start: int) -> Tensor:
        return torch.as_tensor(centers[split.rows[start : start + batch_size]])

    part, n_parts = share
    starts = range(part * batch_size, len(split), n_parts * batch_size)
    return ReadAhead(cut, starts, ahead(split.images, workers))


def part_crops(
    split: Split,
    index: np.ndarray,
    seed: int,
    batch_size: int,
    workers: int = 1,
    share: tuple[int, int] = (0, 1),
) -> ReadAhead:
    """Iterate parts of images, enlarged to crops: uint8 (4 b, crop, crop, 3), b <= batch_size.

    The parts of an image are its left and its right side (squares of 60 % of its side, at middle
    height), and two random squares of 15 to 50 % of its area, mirrored or not.

    Args:
        index: numbers of the images; the four parts of an image follow each other.
        share: as of `center_crops`.
    """
    rng = np.random.default_rng([seed, 0])
    size = split.image_size
    sides = np.full((len(index), N_PARTS), 0.6)
    sides[:, 2:] = np.sqrt(rng.uniform(0.15, 0.5, (len(index), 2)))
    places = rng.random((len(index), N_PARTS, 2))  # top and left, shares of the room
    places[:, :2] = [(0.5, 0.0), (0.5, 1.0)]
    mirrored = rng.random((len(index), N_PARTS)) < 0.5
    mirrored[:, :2] = False
    sides = (sides * size).round().astype(int)
    corners = (places * (size - sides[..., None])).round().astype(int)

    def cut(start: int) -> Tensor:
        part = slice(start, start + batch_size)
        rows = np.repeat(split.rows[index[part]], N_PARTS)
        drawn = (corners[..., 0], corners[..., 1], sides, mirrored)
        crops = CropPlan(rows, *(field[part].reshape(-1) for field in drawn))
        return resize_crops(split.images, crops, crop_size(size))

    rank, count = share
    starts = range(rank * batch_size, len(index), count * batch_size)
    return ReadAhead(cut, starts, workers)
