"""Image files: which files of a folder are images, and what one of them decodes to."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from utils.errors import UserError

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")  # none of them starts a program
IMAGE_NAME = re.compile(
    r"\.(jpe?g|jpe|jfif|a?png|gif|bmp|dib|tiff?|webp|p[bgnp]m)\Z", re.IGNORECASE
)


class UnreadableError(ValueError):
    """An image file that cannot be read whole; the text says why, without the file's name."""


def decode_image(path: str | Path, image_size: int, upright: bool = True) -> np.ndarray:
    """Decode an image and squash all of it to a square with Lanczos, without cropping.

    Args:
        path: a file in one of `FORMATS`; of a moving image the first frame counts.
        image_size: side of the square in pixels.
        upright: turn the image as its EXIF data say; False takes it as it is stored.

    Returns:
        uint8 RGB of shape (image_size, image_size, 3).

    Raises:
        UnreadableError: the file is no image, is damaged, or has more pixels than
            `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    image = open_rgb(path, upright)
    return np.asarray(image.resize((image_size, image_size), Image.Resampling.LANCZOS))


def open_rgb(path: str | Path, upright: bool = True) -> Image.Image:
    """Decode an image in RGB at its own size; arguments and errors are those of `decode_image`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on metadata
            with Image.open(path, formats=FORMATS) as image:
                _check_pixels(image)
                return as_rgb(ImageOps.exif_transpose(image) if upright else image)
    except Image.UnidentifiedImageError:
        raise UnreadableError("is not an image") from None
    except Exception as error:  # Pillow's decoders raise almost anything for damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableError(f"cannot be read as an image ({reason})") from None


def _check_pixels(image: Image.Image) -> None:
    """Raise ValueError for more pixels than Pillow's limit, where Pillow itself would only warn."""
    n_pixels = image.width * image.height
    limit = Image.MAX_IMAGE_PIXELS
    if limit and n_pixels > limit:
        raise ValueError(f"its size of {n_pixels} pixels exceeds the limit of {limit}")


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB: gray to three equal channels, alpha dropped.

    Raises:
        ValueError: the pixels are floating-point numbers, which have no fixed range.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")
    if image.mode.startswith("I"):  # 16-bit gray: the high byte, which Pillow takes of 16-bit color
        gray = np.asarray(image).clip(0, 65535) >> 8
        image = Image.fromarray(gray.astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")  # keeps the colors of transparent palette entries
    return image.convert("RGB")


def find_images(folder: Path) -> list[Path]:
    """Find the image files in a folder and all folders below it by their endings.

    Links are followed; names with a leading dot do not count.

    Returns:
        Paths below `folder`, sorted part by part.

    Raises:
        UserError: `folder` is not a folder, cannot be listed, or holds no image.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a folder of images")
    paths = []
    listed = set()
    for place, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        real_place = os.path.realpath(place)
        if real_place in listed:  # a link to a folder that was listed already, perhaps a loop
            folders.clear()
            continue
        listed.add(real_place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        visible = (name for name in files if not name.startswith("."))
        images = (Path(place, name) for name in visible if IMAGE_NAME.search(name))
        paths += [path for path in images if path.is_file()]
    if not paths:
        raise UserError(f"{folder}: no images in it or below; give another folder")
    return sorted(paths, key=lambda path: path.parts)


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be listed ({error.strerror}); make it readable")
