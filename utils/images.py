"""Which files of a folder are images."""

from __future__ import annotations

import os
from pathlib import Path

from utils.errors import UserError

# of the formats that pre-processing reads
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".ppm",
            ".pgm", ".pbm", ".pnm")  # fmt: skip


def find_images(folder: Path) -> list[Path]:
    """The image files in a folder and all folders below it, by their suffixes, sorted by path; links are followed.

    Hidden files and folders (a leading dot) do not count. Raises UserError for what is no folder, cannot be listed or
    holds no image.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}; give a folder of images")

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror}); make it readable, or move it away")

    found, seen = [], set()
    for place, below, files in os.walk(folder, onerror=refuse, followlinks=True):
        entry = os.stat(place)
        if (entry.st_dev, entry.st_ino) in seen:  # a link to a folder that was listed already, perhaps a loop
            below.clear()
            continue
        seen.add((entry.st_dev, entry.st_ino))
        below[:] = sorted(name for name in below if not name.startswith("."))
        here = Path(place)
        images = (here / name for name in files if not name.startswith("."))
        found += [path for path in images if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not found:
        raise UserError(f"{folder}: no images in it or below ({' '.join(SUFFIXES)}); give another folder")
    return sorted(found, key=lambda path: path.parts)
