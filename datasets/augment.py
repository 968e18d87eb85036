"""Stronger views than those of training: random resized crops, mirrored, in other colours."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datasets.views import _ahead, crop_size

AREA = (0.5, 1.0)  # of the image, in the crop
ASPECT = (3 / 4, 4 / 3)  # width by height, before it is squashed to a square
JITTER = 0.3  # brightness, contrast and saturation are multiplied by 1 - JITTER to 1 + JITTER


def augmented(image: np.ndarray, crop: int, rng: np.random.Generator) -> np.ndarray:
    """A random view of an image, uint8 RGB (S, S, 3) -> (crop, crop, 3)."""
    size = len(image)
    area, ratio = rng.uniform(*AREA), np.exp(rng.uniform(*np.log(ASPECT)))
    width, height = (min(1.0, np.sqrt(area * r)) * size for r in (ratio, 1 / ratio))
    left, top = rng.uniform(0, size - width), rng.uniform(0, size - height)
    box = (left, top, left + width, top + height)
    view = np.asarray(Image.fromarray(image).resize((crop, crop), Image.Resampling.BILINEAR, box), np.float32)
    view = view[:, ::-1] if rng.random() < 0.5 else view
    brightness, contrast, saturation = rng.uniform(1 - JITTER, 1 + JITTER, 3).astype(np.float32)
    view = view * brightness
    view = (view - view.mean()) * contrast + view.mean()
    grey = view.mean(2, keepdims=True)
    return (grey + (view - grey) * saturation).round().clip(0, 255).astype(np.uint8)


def augmented_crops(
    images: np.ndarray,
    batch_size: int,
    seed: tuple[int, ...],
    workers: int = 1,
    check: Callable[[], None] = lambda: None,
    share: tuple[int, int] = (0, 1),
    rows: np.ndarray | None = None,
) -> Iterator[Tensor]:
    """Iterate a random view of all images (or of these rows) in order: uint8 (<= batch_size, crop, crop, 3).

    What an image's view is depends on `seed` and its place alone. check and share: as for `center_crops`.
    """
    count, crop = len(images if rows is None else rows), crop_size(images.shape[1])

    def batch(first: int) -> Tensor:
        own = range(first, min(first + batch_size, count))
        made = [augmented(images[i if rows is None else rows[i]], crop, np.random.default_rng([*seed, i])) for i in own]
        return torch.from_numpy(np.stack(made))

    part, parts = share
    yield from _ahead(batch, range(part * batch_size, count, parts * batch_size), workers, check)
