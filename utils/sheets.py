"""Contact sheets: query images on the left, their hits on the right."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pre_process.image_arrays import UnreadableError, open_rgb

TILE, MARGIN, CAPTION = 128, 8, 34  # pixels
MOST_ROWS = 100  # queries on a sheet
PAPER, INK, FAINT, LINE = "white", "#222222", "#dddddd", "#888888"
ROW_OF_ARRAY = re.compile(r"(.+_img\.npy)#(\d+)")


def contact_sheet(answers: list[dict]) -> Image.Image:
    """One row a query: its image, a line, its hits; below each its file, below hits rank and distance, too.

    answers as of search.py.
    """
    columns = 1 + max(len(one["hits"]) for one in answers)
    step, height = TILE + MARGIN, TILE + CAPTION + MARGIN
    sheet = Image.new("RGB", (columns * step + 3 * MARGIN, len(answers) * height + MARGIN), PAPER)
    draw, font = ImageDraw.Draw(sheet), caption_font()
    for row, one in enumerate(answers):
        top = MARGIN + row * height
        captions = [("query", one["query"])]
        captions += [(f"{hit['rank']}   distance {hit['distance']:.3f}", hit["path"]) for hit in one["hits"]]
        for column, (caption, path) in enumerate(captions):
            left = MARGIN + column * step + (MARGIN if column else 0)
            tile = thumbnail(path)
            sheet.paste(tile, (left + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2))
            for line, text in enumerate((caption, os.path.basename(path))):
                draw.text((left + TILE / 2, top + TILE + 2 + 15 * line), fitting(text, font), INK, font, anchor="ma")
        draw.line((TILE + 1.5 * MARGIN, top, TILE + 1.5 * MARGIN, top + TILE), LINE, 2)
    return sheet


def caption_font() -> ImageFont.FreeTypeFont:
    """A font with the letters of many languages: matplotlib brings it."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 11)


def fitting(caption: str, font: ImageFont.ImageFont) -> str:
    """A caption in printable signs, its middle left out where it is wider than a tile."""
    caption = "".join(sign if sign.isprintable() else "?" for sign in caption)
    if font.getlength(caption) <= TILE:
        return caption
    kept = len(caption)
    while font.getlength(short := f"{caption[: kept // 2]}...{caption[len(caption) - kept // 2 :]}") > TILE:
        kept -= 1
    return short


def thumbnail(path: str) -> Image.Image:
    """An image file, or a row of an array (`FILE_img.npy#row`), at most TILE wide and high; grey if it is gone."""
    in_array = ROW_OF_ARRAY.fullmatch(path)
    try:
        if in_array:
            array, row = in_array.groups()
            image = Image.fromarray(np.load(array, mmap_mode="r", allow_pickle=False)[int(row)])
        else:
            image = open_rgb(path)
    except (UnreadableError, OSError, ValueError, IndexError):
        image = Image.new("RGB", (TILE, TILE), FAINT)
        ImageDraw.Draw(image).text((TILE / 2, TILE / 2), "missing", INK, ImageFont.load_default(12), anchor="mm")
    image.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
    return image
