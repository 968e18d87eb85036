"""The embedded data set: its characters are really drawn, and a seed fixes every pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageFont
from scripts import Outcome, failed, run_in_process

from pre_process import pre_process_glyphs as glyphs

HALVES = ("training", "validation")


def run(*arguments: object) -> Outcome:
    return run_in_process("pre_process_glyphs.py", *arguments)


def load(folder: Path, half: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    stem = folder / f"{half}_glyphs_{size}resized"
    return np.load(f"{stem}_img.npy"), np.load(f"{stem}_label.npy")


@pytest.fixture(scope="module")
def faces_of() -> dict[str, list[str]]:
    return glyphs.find_faces(glyphs.CHARACTERS)


def test_two_hundred_classes_half_of_each_script_and_no_character_twice():
    assert len(glyphs.CHARACTERS) == len(set(glyphs.CHARACTERS)) == 200
    assert len("".join(glyphs.TRAINING_CHARACTERS.values())) == 100
    assert list(glyphs.TRAINING_CHARACTERS) == list(glyphs.VALIDATION_CHARACTERS)


def test_every_font_of_a_class_draws_its_character(faces_of):
    """A font without the character would draw what it draws for a code that is never used."""
    for character, faces in faces_of.items():
        assert len(faces) >= 3, character
        for face in faces:
            font = ImageFont.truetype(face, 40, layout_engine=ImageFont.Layout.BASIC)
            drawn = bytes(font.getmask(character))
            assert any(drawn), (character, face)
            assert drawn != bytes(font.getmask("\U0010fffe")), (character, face)


def test_old_computer_modern_fonts_serve_letters_and_digits_alone(faces_of):
    """They hold other signs in the places of punctuation and Greek."""
    served = {
        character
        for character, faces in faces_of.items()
        if any(Path(face).name.startswith("cm") for face in faces)
    }
    ascii_ones = {c for c in glyphs.CHARACTERS if c.isascii() and c.isalnum()}
    assert served == ascii_ones


def shape(character: str, face: str, mirrored: bool) -> np.ndarray:
    """Draw a character at one size, blurred a little, as a vector of unit length."""
    mask = glyphs.glyph_mask(character, face, 96)
    if mirrored:
        mask = mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    mask.thumbnail((28, 28))
    canvas = Image.new("L", (32, 32))
    canvas.paste(mask, ((32 - mask.width) // 2, (32 - mask.height) // 2))
    values = np.asarray(canvas.filter(ImageFilter.GaussianBlur(1)), dtype=float).reshape(-1)
    return values / np.linalg.norm(values)


def test_no_two_classes_look_alike(faces_of):
    """In the plain face, at one size, also mirrored, the closest pair still differs."""
    plain = faces_of["A"][0]
    shapes = np.stack([shape(c, plain, mirrored=False) for c in glyphs.CHARACTERS])  # (200, 1024)
    mirrored = np.stack([shape(c, plain, mirrored=True) for c in glyphs.CHARACTERS])
    likeness = np.maximum(shapes @ shapes.T, shapes @ mirrored.T)  # cosines
    np.fill_diagonal(likeness, 0)
    assert likeness.max() < 0.93
    left_out = shape("b", plain, mirrored=True) @ shape("d", plain, mirrored=False)
    assert left_out > 0.93  # so the line above can tell


MEANS = {  # of every 25th image, two a class
    "training": [185.56, 199.09, 214.82, 182.1, 201.58, 194.39, 194.75, 204.89],
    "validation": [181.96, 194.49, 192.85, 205.2, 186.68, 142.76, 215.1, 210.06],
}


def test_the_images_stay(tmp_path):
    """The scores of the demo rest on them."""
    done = run("--data_dir", tmp_path, "--per_class", 2, "--workers", 2)
    assert (done.code, done.err) == (0, "")
    for half, first in zip(HALVES, (1, 101), strict=True):
        images, labels = load(tmp_path / "glyphs", half, 64)
        assert images.dtype == np.uint8
        assert images.shape == (200, 64, 64, 3)
        assert labels.dtype == np.int64
        assert labels.tolist() == np.repeat(np.arange(first, first + 100), 2).tolist()
        means = images[::25].mean(axis=(1, 2, 3))
        np.testing.assert_allclose(means, MEANS[half], atol=0.05)
    assert len(list((tmp_path / "glyphs").iterdir())) == 4


def test_a_seed_fixes_every_pixel_whatever_the_workers(tmp_path):
    options = ("--per_class", 1, "--image_size", 32)
    runs = {"one": ("--workers", 1), "two": ("--workers", 2), "other": ("--seed", 1)}
    for name, extra in runs.items():
        assert run("--out_dir", tmp_path / name, *options, *extra).code == 0
    for half in HALVES:
        one_worker, two_workers, other_seed = (load(tmp_path / name, half, 32)[0] for name in runs)
        np.testing.assert_array_equal(one_worker, two_workers)
        assert (one_worker != other_seed).any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize(("option", "value"), [("--per_class", "0"), ("--seed", "-1")])
def test_bad_option(option, value):
    failed(run(option, value), option, value)
