"""Image files: which files of a folder are images, and what one of them decodes to."""

from __future__ import annotations

import logging
import os
import re
import struct
import warnings
import zlib
from collections import Counter
from contextlib import suppress
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, features

from utils.errors import UserError
from utils.options import LARGEST_IMAGE

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")  # none of them starts a program
IMAGE_NAME = re.compile(
    r"\.(jpe?g|jpe|jfif|a?png|gif|bmp|dib|tiff?|webp|p[bgnp]m|avif)\Z", re.IGNORECASE
)
HEIF_NAME = re.compile(r"\.(heic|heif|hif)\Z", re.IGNORECASE)
IMAGE_START = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n|GIF8|RIFF....WEBP|....ftypavi", re.DOTALL)
HEIF_START = re.compile(rb"....ftyp(hei|hev|mif1|msf1)", re.DOTALL)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
USED_CHUNKS = (b"tRNS", b"eXIf")  # beside the critical ones, which begin with a capital
MANY_EQUAL = 0.1  # share of images, worth a remark
DRAFT = 2  # how much larger than the square a photo is decoded
GRAY_BITS = (8, 10, 12, 14, 16, 24, 31, 32)  # what gray values may need: of sensors, and int32
log = logging.getLogger(__name__)
Image.MAX_IMAGE_PIXELS = LARGEST_IMAGE


class UnreadableError(ValueError):
    """An image file that cannot be read whole; the text says why, without the file's name."""


def decode_image(
    source: str | Path | bytes, image_size: int, as_stored: bool = False
) -> np.ndarray:
    """Decode an image and squash all of it to a square with Lanczos, without cropping.

    A photo that is much larger than the square is decoded at DRAFT times its size or more, by
    JPEG's own scaling, which is faster and hardly changes embeddings (benchmarks/decode.py). Images
    as stored are decoded in full.

    Returns uint8 RGB of shape (image_size, image_size, 3). Source, as_stored and errors are
    those of `open_rgb`; image_size is the side of the square in pixels.
    """
    return squash(open_rgb(source, as_stored, 0 if as_stored else DRAFT * image_size), image_size)


def squash(image: Image.Image, image_size: int) -> np.ndarray:
    """Resize all of an RGB image to a square with Lanczos: uint8 (image_size, image_size, 3)."""
    return np.asarray(image.resize((image_size, image_size), Image.Resampling.LANCZOS))


def open_rgb(
    source: str | Path | bytes, as_stored: bool = False, least_side: int = 0
) -> Image.Image:
    """Decode an image in RGB at its own size; of a moving image the first frame counts.

    Args:
        source: a file, or its content.
        as_stored: as the released code reads archives: not turned as EXIF says, transparency
            dropped, the high byte of 16-bit gray. Otherwise as people see it: turned, laid on
            white, and gray scaled by the bits that its largest value needs.
        least_side: a JPEG may come out smaller, with so many pixels a side or more; 0: it may not.

    Raises:
        UnreadableError: the file is no image, is damaged, or has more pixels than
            `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on metadata
            image = _load(source, least_side)
            return as_rgb(image, as_stored) if as_stored else as_rgb(upright(image))
    except Image.UnidentifiedImageError:
        raise UnreadableError("is not an image") from None
    except Exception as error:  # Pillow's decoders raise almost anything for damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableError(f"cannot be read as an image ({reason})") from None


def _load(source: str | Path | bytes, least_side: int) -> Image.Image:
    """Decode an image in its own mode; a PNG with damaged metadata without them."""
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    if HEIF_START.match(content) and not _has_heif():
        raise ValueError("HEIC; pip install pillow-heif to read it")
    try:
        return _load_content(content, least_side)
    except (OSError, SyntaxError, ValueError):
        if not content.startswith(PNG_SIGNATURE):
            raise
        return _load_content(png_without_metadata(content), least_side)


def _load_content(content: bytes, least_side: int) -> Image.Image:
    with Image.open(BytesIO(content), formats=_formats()) as image:
        n_pixels = image.width * image.height
        limit = Image.MAX_IMAGE_PIXELS
        if limit and n_pixels > limit:  # Pillow itself only warns, up to twice its limit
            raise ValueError(f"it has {n_pixels} pixels, more than max_pixels {limit}")
        if least_side:
            image.draft(None, (least_side, least_side))
        image.load()
        return image


def allow_pixels(count: int) -> None:
    """Set how many pixels an image may have, in this process."""
    Image.MAX_IMAGE_PIXELS = count


@cache
def _formats() -> tuple[str, ...]:
    """Return the formats that this machine can decode."""
    avif = ("AVIF",) if features.check("avif") else ()
    return (*FORMATS, *avif, *(("HEIF",) if _has_heif() else ()))


@cache
def _has_heif() -> bool:
    """Return whether pillow-heif is installed, and make Pillow use it."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def png_without_metadata(content: bytes) -> bytes:
    """Return a PNG file with what its pixels need alone, and right checksums.

    Raises ValueError if it is cut short.
    """
    parts = [PNG_SIGNATURE]
    place = len(PNG_SIGNATURE)
    kind = b""
    while kind != b"IEND":
        if place + 12 > len(content):
            raise ValueError("the file is truncated")
        length, kind = struct.unpack_from(">I4s", content, place)
        chunk = content[place + 4 : place + 8 + length]
        if kind[:1].isupper() or kind in USED_CHUNKS:
            parts.append(struct.pack(">I", length) + chunk + struct.pack(">I", zlib.crc32(chunk)))
        place += 12 + length
    return b"".join(parts)


def upright(image: Image.Image) -> Image.Image:
    """Turn an image, in place, as its EXIF says, if that can be read."""
    with suppress(Exception):  # Pillow's, for odd metadata, which no pixel needs
        ImageOps.exif_transpose(image, in_place=True)
    return image


def as_rgb(image: Image.Image, as_stored: bool = False) -> Image.Image:
    """Convert an image of any mode to RGB: gray to three equal channels.

    as_stored: see `open_rgb`. Raises ValueError for floating-point pixels, which have no range.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")
    if image.mode.startswith("I"):  # integers of 16 or 32 bits
        image = Image.fromarray(_gray_bytes(np.asarray(image).astype(np.int64), as_stored))
    if image.has_transparency_data and image.mode != "1":
        image = image.convert("RGBA")  # keeps the colors of transparent palette entries
        if not as_stored:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _gray_bytes(values: np.ndarray, as_stored: bool) -> np.ndarray:
    """Scale gray values of more than 8 bits to 8: uint8 of the same shape."""
    if as_stored:
        return (values.clip(0, 65535) >> 8).astype(np.uint8)
    values = values - min(0, int(values.min()))  # signed ones begin anywhere
    largest = int(values.max())
    bits = next(bits for bits in GRAY_BITS if largest < 2**bits)
    if bits != 16:
        _say_bits(bits)
    return (values >> (bits - 8)).astype(np.uint8)


@cache
def _say_bits(bits: int) -> None:
    log.warning(
        "gray values that stay below 2^%d in wider pixels are scaled to the full range", bits
    )


def warn_of_equal(n_equal: int, n_images: int, share: str) -> None:
    """Log that many images have something in common with another one, such as their pixels."""
    if n_equal > MANY_EQUAL * n_images:
        log.warning(
            "%d images have the %s of another one: they are copies, or show nothing", n_equal, share
        )


def find_images(folder: Path) -> list[Path]:
    """Find the image files in a folder and all folders below it, by their endings or content.

    Links are followed, but for links to what is listed itself; names with a leading dot do not
    count. What is no image is counted in a line of the log.

    Returns:
        Paths below `folder`, sorted part by part.

    Raises:
        UserError: `folder` is not a folder, cannot be listed, or holds no image.
    """
    if not folder.is_dir():
        fault = "is a file" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {fault}; give a folder of images")
    paths = []
    others: Counter[str] = Counter()
    listed = set()
    for place, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        real_place = os.path.realpath(place)
        if real_place in listed:  # a link to a folder that was listed already, perhaps a loop
            folders.clear()
            continue
        listed.add(real_place)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and not _links_into(Path(place, name), folder)
        )
        for path in (Path(place, name) for name in files if not name.startswith(".")):
            other = _other_kind(path)
            if other:
                others[other] += 1
            else:
                paths.append(path)
    counts = ", ".join(f"{count} {kind}" for kind, count in others.most_common())
    if not paths:
        remark = f" (it holds {counts})" if counts else ""
        raise UserError(f"{folder}: no images in it or below{remark}; give another folder")
    if counts:
        log.warning("%s: left out are %s", folder, counts)
    return _without_links(sorted(paths, key=lambda path: path.parts))


def _links_into(path: Path, folder: Path) -> bool:
    """Return whether a path is a link to what lies below a folder and is not hidden there."""
    if not path.is_symlink():
        return False
    below = os.path.relpath(os.path.realpath(path), os.path.realpath(folder))  # or ../...
    return not any(part.startswith(".") and part != "." for part in below.split(os.sep))


def _without_links(paths: list[Path]) -> list[Path]:
    """Leave out links to files that are in the list themselves; says how many in the log."""
    links = {path for path in paths if path.is_symlink()}
    if not links:
        return paths
    files = {os.path.realpath(path) for path in paths if path not in links}
    links = {path for path in links if os.path.realpath(path) in files}
    if links:
        log.warning("%d links to images that are here themselves are left out", len(links))
    return [path for path in paths if path not in links]


def _other_kind(path: Path) -> str:
    """Return what kind of file it is instead of an image, "" for an image."""
    if not path.is_file():
        return "links to nothing" if path.is_symlink() else "special files"
    if IMAGE_NAME.search(path.name):
        return ""
    try:
        with open(path, "rb") as file:
            start = file.read(16)
    except OSError:
        return "files that cannot be read"
    kind = path.suffix or "files without a suffix"
    if HEIF_START.match(start) or (HEIF_NAME.search(path.name) and not IMAGE_START.match(start)):
        return "" if _has_heif() else f"{kind} (pip install pillow-heif to read them)"
    return "" if IMAGE_START.match(start) else kind


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be listed ({error.strerror}); make it readable")
