"""Contact sheets: rows of small images, each with a line or two of text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from datasets.images import UnreadableError, open_rgb

TILE = 160  # pixels, of the longer side of an image
MARGIN = 10
LINE = 17  # height of a line of text
CAPTION = 3 * LINE + 4
MOST_ROWS = 100
INK = "#222222"
FAINT = "#777777"
GRAY = "#dddddd"
ROW_OF_ARRAY = re.compile(r"(.+_img\.npy)#(\d+)")
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"  # DejaVu has many alphabets


class Tile(NamedTuple):
    """An image of a sheet, and what stands below it, above the name of its file."""

    path: str
    text: str


class SheetRow(NamedTuple):
    """A row of a sheet; a line divides the first tiles from the others."""

    tiles: Sequence[Tile]
    n_first: int = 0


def contact_sheet(title: str, rows: Sequence[SheetRow]) -> Image.Image:
    """Draw the first MOST_ROWS rows below a title."""
    dropped = len(rows) - MOST_ROWS
    if dropped > 0:
        title += f" (the first {MOST_ROWS} of {len(rows)} rows)"
        rows = rows[:MOST_ROWS]
    font = ImageFont.truetype(FONTS / "DejaVuSans-Bold.ttf", 18)
    n_columns = max(len(row.tiles) for row in rows)
    width = max(n_columns * (TILE + MARGIN) + 3 * MARGIN, int(font.getlength(title)) + 2 * MARGIN)
    head = 4 * MARGIN
    row_height = TILE + CAPTION + MARGIN
    sheet = Image.new("RGB", (width, head + len(rows) * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, INK, font)
    for number, row in enumerate(rows):
        top = head + number * row_height
        for column, tile in enumerate(row.tiles):
            gap = MARGIN if row.n_first and column >= row.n_first else 0
            draw_tile(sheet, MARGIN + column * (TILE + MARGIN) + gap, top, tile)
        if row.n_first:
            x = MARGIN / 2 + row.n_first * (TILE + MARGIN) + MARGIN / 2
            draw.line((x, top, x, top + TILE), "#888888", 2)
    return sheet


def draw_tile(sheet: Image.Image, left: int, top: int, tile: Tile) -> None:
    """Draw an image, and below it its text, its folder and its name, in two lines if need be."""
    draw = ImageDraw.Draw(sheet)
    image = thumbnail(tile.path)
    sheet.paste(image, (left + (TILE - image.width) // 2, top + (TILE - image.height) // 2))
    font = ImageFont.truetype(FONTS / "DejaVuSans.ttf", 13)
    lines = [(tile.text, INK)]
    lines += [(line, FAINT) for line in name_lines("/".join(Path(tile.path).parts[-2:]), font)]
    for number, (text, color) in enumerate(lines):
        place = (left + TILE / 2, top + TILE + 3 + LINE * number)
        draw.text(place, text, color, font, anchor="ma")


def name_lines(name: str, font: ImageFont.FreeTypeFont) -> list[str]:
    """Cut a name into at most two lines of a tile's width; of a longer one the middle is left out.

    What cannot be printed becomes a question mark.
    """
    name = "".join(sign if sign.isprintable() else "?" for sign in name)
    if font.getlength(name) <= TILE:
        return [name]
    start = next(n for n in range(len(name), 0, -1) if font.getlength(name[:n]) <= TILE)
    rest = name[start:]
    while font.getlength(rest) > TILE:
        rest = f"...{rest[4:]}" if rest.startswith("...") else f"...{rest[3:]}"
    return [name[:start], rest]


def thumbnail(path: str) -> Image.Image:
    """Read an image file, or a row of an array (`FILE_img.npy#row`), at most TILE wide and high.

    Returns a gray tile if the image is gone.
    """
    array_row = ROW_OF_ARRAY.fullmatch(path)
    try:
        if array_row:
            images = np.load(array_row.group(1), mmap_mode="r", allow_pickle=False)
            image = Image.fromarray(images[int(array_row.group(2))])
        else:
            image = open_rgb(path, least_side=TILE)
    except (UnreadableError, OSError, ValueError, IndexError):
        image = Image.new("RGB", (TILE, TILE), GRAY)
        center = (TILE / 2, TILE / 2)
        ImageDraw.Draw(image).text(center, "missing", INK, ImageFont.load_default(12), anchor="mm")
    image.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
    return image
