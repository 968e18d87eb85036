"""Contact sheets: query images on the left, their hits on the right."""

from __future__ import annotations

import os
import re
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from datasets.images import UnreadableError, open_rgb

TILE = 128  # pixels, of the longer side of an image
MARGIN = 8
CAPTION = 34  # height of the two lines below an image
LINE = 15  # height of a line of text
MOST_ROWS = 100  # queries on a sheet
INK = "#222222"
GRAY = "#dddddd"
ROW_OF_ARRAY = re.compile(r"(.+_img\.npy)#(\d+)")
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"  # many alphabets


def contact_sheet(answers: list[dict]) -> Image.Image:
    """Draw a row for each query: its image, a line, its hits with rank and distance.

    answers: [{"query": path, "hits": [{"rank", "distance", "path"}, ...]}, ...]
    """
    n_columns = 1 + max(len(answer["hits"]) for answer in answers)
    row_height = TILE + CAPTION + MARGIN
    size = (n_columns * (TILE + MARGIN) + 3 * MARGIN, len(answers) * row_height + MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for row, answer in enumerate(answers):
        top = MARGIN + row * row_height
        draw_tile(sheet, MARGIN, top, "query", answer["query"])
        draw.line((TILE + 1.5 * MARGIN, top, TILE + 1.5 * MARGIN, top + TILE), "#888888", 2)
        for hit in answer["hits"]:
            left = 2 * MARGIN + hit["rank"] * (TILE + MARGIN)
            title = f"{hit['rank']}   distance {hit['distance']:.3f}"
            draw_tile(sheet, left, top, title, hit["path"])
    return sheet


def draw_tile(sheet: Image.Image, left: int, top: int, title: str, path: str) -> None:
    """Draw an image, and below it a title and the name of its file."""
    draw = ImageDraw.Draw(sheet)
    tile = thumbnail(path)
    sheet.paste(tile, (left + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2))
    font = ImageFont.truetype(FONT, 11)
    for line, text in enumerate((title, os.path.basename(path))):
        place = (left + TILE / 2, top + TILE + 2 + LINE * line)
        draw.text(place, shortened(text, font), INK, font, anchor="ma")


def shortened(text: str, font: ImageFont.FreeTypeFont) -> str:
    """Replace what cannot be printed, and cut the middle of a text that is wider than a tile."""
    text = "".join(sign if sign.isprintable() else "?" for sign in text)
    half = len(text) // 2
    short = text
    while font.getlength(short) > TILE:
        short = f"{text[:half]}...{text[len(text) - half :]}"
        half -= 1
    return short


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
            image = open_rgb(path)
    except (UnreadableError, OSError, ValueError, IndexError):
        image = Image.new("RGB", (TILE, TILE), GRAY)
        center = (TILE / 2, TILE / 2)
        ImageDraw.Draw(image).text(center, "missing", INK, ImageFont.load_default(12), anchor="mm")
    image.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
    return image
