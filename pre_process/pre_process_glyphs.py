"""glyphs -> data/glyphs/*.npy: 100 drawn characters to train on, 100 to test on; no download.

    python pre_process/pre_process_glyphs.py

A small data set in the form of the large ones, to try the whole way from images to scores in
minutes. Each image shows one character in one of the fonts that come with matplotlib, turned,
sheared, scaled and shifted at random, dark on plain, graded or cloudy paper, blurred and under
strong noise. A class is a character; its fonts, sizes and places differ, so that only its shape
tells it from others, and the noise hides it from a network that has not learned.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFilter, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, if run as a script

from pre_process.raw_lists import halves_by_class
from pre_process.script import home_of, option_parser, write
from utils.errors import UserError, run_script
from utils.options import LARGEST_SEED, whole

# Every script and subject lies in both halves. Left out are letters that scripts share (A, Alpha),
# that differ in size alone (o, O), and that mirror each other (b, d; arrows to the left), since
# training flips images.
TRAINING_CHARACTERS = {
    "Latin": "ACEKMPSUWYegmrŒÞ",
    "digits": "147",
    "punctuation": "@%?¶©*",
    "Greek": "ΞΦΩβμ",
    "Cyrillic": "ДШЫЂЉ",
    "Armenian": "ԲԹԾՀՇՖԴ",
    "Georgian": "დკრფყჰ",
    "mathematics": "∞±∴⊢⊞⌂",
    "arrows": "↑⇒↯↘↬⇶",
    "geometry": "◐▲★○",
    "sky and signs": "☽♂♅♈♋♎♑❄☂☄☊",
    "games, music, plants": "♔♗♙♫♠⚅☘⚜❦",
    "things": "☯⚓⚙✈✌✡☠♨⚒⚗✍☣⌨☤⚰☞",
}
VALIDATION_CHARACTERS = {
    "Latin": "BDHLNQTVXZfhnÆØð",
    "digits": "26",
    "punctuation": "&#$§€‡£",
    "Greek": "ΣΨαλξ",
    "Cyrillic": "ЖЪЮЊѪ",
    "Armenian": "ԶԽԿՃՔՊ",
    "Georgian": "ბელტქჯ",
    "mathematics": "√≈÷⊥∠⊗≤",
    "arrows": "↓↻↗↵⇄↔",
    "geometry": "◇▼■",
    "sky and signs": "☀♀♄♆♉♌♏⚡☁☃♓☍",
    "games, music, plants": "♖♘♪♭⚀✿⚘✥",
    "things": "☢☺⚖✂✉✎☎☥♲⚔⚛☝⌘⚑☧⚱✆",
}
# Class c is CHARACTERS[c - 1].
CHARACTERS = "".join((*TRAINING_CHARACTERS.values(), *VALIDATION_CHARACTERS.values()))

FACES = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)
# Fonts that hold other signs than Unicode's in the places of all but letters and digits.
ASCII_FACES = ("cmr10", "cmb10", "cmss10", "cmtt10", "cmti10")


class Glyph(NamedTuple):
    """What one image is drawn from; equal glyphs give equal images."""

    character: str
    faces: Sequence[str]  # paths of the fonts that have the character
    label: int  # class, 1-200
    index: int  # of the image in its class, from 0 on
    seed: int


def main() -> None:
    """Read the options, draw the images, write the four files."""
    parser = option_parser("glyphs", __doc__.splitlines()[0], image_size=64)
    add = parser.add_argument_group("drawing").add_argument
    add("--per_class", type=whole(1, 10_000), default=30, help="images of each character")
    add("--seed", type=whole(0, LARGEST_SEED), default=0, help="another one draws other images")
    args = parser.parse(sys.argv[1:])
    glyphs = all_glyphs(args.per_class, args.seed)
    labels = [glyph.label for glyph in glyphs]
    splits = halves_by_class(glyphs, labels, len(CHARACTERS) // 2, Path(__file__))
    write("glyphs", splits, home_of("glyphs", args.data_dir), args, render_glyph)


def all_glyphs(per_class: int, seed: int) -> list[Glyph]:
    """List `per_class` glyphs of each of the 200 classes, ordered by class."""
    faces_of = find_faces(CHARACTERS)
    return [
        Glyph(character, faces_of[character], label, index, seed)
        for label, character in enumerate(CHARACTERS, start=1)
        for index in range(per_class)
    ]


def find_faces(characters: str) -> dict[str, list[str]]:
    """Find for each character the fonts of matplotlib that have it.

    Raises UserError if a character is in no font.
    """
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    faces_of: dict[str, list[str]] = {character: [] for character in characters}
    for face in (*FACES, *ASCII_FACES):
        path = folder / f"{face}.ttf"
        if not path.is_file():
            continue
        drawn = FT2Font(str(path)).get_charmap()
        for character, faces in faces_of.items():
            usable = face not in ASCII_FACES or (character.isascii() and character.isalnum())
            if usable and ord(character) in drawn:
                faces.append(str(path))
    for character, faces in faces_of.items():
        if not faces:
            raise UserError(f"{folder}: no font has {character!r}; install matplotlib anew")
    return faces_of


def render_glyph(glyph: Glyph, image_size: int) -> np.ndarray:
    """Draw one image; chance comes from (seed, class, index) alone.

    Returns: uint8 RGB of shape (S, S, 3), S = `image_size`.
    """
    rng = np.random.default_rng([glyph.seed, glyph.label, glyph.index])
    face = glyph.faces[rng.integers(len(glyph.faces))]
    mask = glyph_mask(glyph.character, face, image_size)
    coverage = jittered(mask, image_size, rng)[:, :, None]  # (S, S, 1)
    background = draw_background(image_size, rng)  # (S, S, 3)
    ink = draw_ink(rng)  # (3,)
    pixels = background * (1 - coverage) + ink * coverage
    blur = ImageFilter.GaussianBlur(rng.uniform(0, 1.2) * image_size / 64)
    blurred = np.asarray(as_image(pixels).filter(blur))
    noise = rng.normal(0, rng.uniform(45, 55), pixels.shape)
    return np.asarray(as_image(blurred + noise))


@lru_cache(maxsize=64)  # the images of a class follow each other and share its few fonts
def glyph_mask(character: str, face: str, image_size: int) -> Image.Image:
    """Draw a character in a font, cut to its ink with a margin of one pixel, in mode L."""
    font = ImageFont.truetype(face, image_size, layout_engine=ImageFont.Layout.BASIC)
    left, top, right, bottom = font.getbbox(character)
    mask = Image.new("L", (round(right - left) + 2, round(bottom - top) + 2))
    ImageDraw.Draw(mask).text((1 - left, 1 - top), character, font=font, fill=255)
    return mask


def jittered(mask: Image.Image, image_size: int, rng: np.random.Generator) -> np.ndarray:
    """Place a mask in the image: turned, sheared, scaled and shifted a little.

    Returns: coverage in [0, 1] of shape (S, S).
    """
    angle = np.radians(rng.uniform(-8, 8))
    shear = rng.uniform(-0.1, 0.1)
    scale = rng.uniform(0.6, 0.75) * image_size / max(mask.size)
    stretch = rng.uniform(0.94, 1.06)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    stretched = np.diag([scale * stretch, scale / stretch])
    forward = turn @ np.array([[1, shear], [0, 1]]) @ stretched  # from mask to image
    back = np.linalg.inv(forward)
    center = image_size / 2 + rng.uniform(-0.08, 0.08, 2) * image_size
    origin = np.array(mask.size) / 2 - back @ center
    coefficients = (*back[0], origin[0], *back[1], origin[1])
    size = (image_size, image_size)
    placed = mask.transform(size, Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)
    return np.asarray(placed, dtype=np.float64) / 255


def draw_background(image_size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw light paper: plain, graded or cloudy, slightly tinted.

    Returns: float of shape (S, S, 3), 0-255.
    """
    color = rng.uniform(215, 245) + rng.normal(0, 3, 3)
    kind = rng.choice(["plain", "graded", "cloudy"])
    if kind == "plain":
        change = np.zeros((image_size, image_size, 1))
    elif kind == "graded":
        direction = rng.uniform(0, 2 * np.pi)
        along = np.linspace(-0.5, 0.5, image_size)
        slope = along[None, :] * np.cos(direction) + along[:, None] * np.sin(direction)  # (S, S)
        change = slope[:, :, None] * rng.uniform(-40, 40)
    else:
        coarse = as_image(np.repeat(rng.uniform(0, 255, (6, 6, 1)), 3, axis=2))
        clouds = coarse.resize((image_size, image_size), Image.Resampling.BICUBIC)
        change = (np.asarray(clouds) - 127.5) * rng.uniform(0.05, 0.15)
    return np.clip(color + change, 0, 255)


def draw_ink(rng: np.random.Generator) -> np.ndarray:
    """Draw a dark, slightly tinted color: float of shape (3,), 0-255."""
    return rng.uniform(10, 50) + rng.normal(0, 3, 3)


def as_image(pixels: np.ndarray) -> Image.Image:
    """Make an RGB image of pixels (H, W, 3) of any type, rounded and clipped to 0-255."""
    return Image.fromarray(np.rint(pixels).clip(0, 255).astype(np.uint8))


if __name__ == "__main__":
    run_script(main)
