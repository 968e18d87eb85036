"""The embedded data set: what its characters are, that they are really drawn, and that a seed fixes every pixel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageFont

from pre_process import pre_process_glyphs as glyphs


def run(root: Path, *arguments: object) -> subprocess.CompletedProcess:
    script = [sys.executable, str(root / "pre_process" / "pre_process_glyphs.py"), *map(str, arguments)]
    return subprocess.run(script, capture_output=True, text=True, timeout=120)


def load(folder: Path, half: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    stem = f"{half}_glyphs_{size}resized"
    return np.load(folder / f"{stem}_img.npy"), np.load(folder / f"{stem}_label.npy")


@pytest.fixture(scope="module")
def faces_of() -> dict[str, list[str]]:
    return glyphs.find_faces(glyphs.CHARACTERS)


def test_two_hundred_classes_half_of_each_script_and_no_character_twice():
    assert len(glyphs.CHARACTERS) == len(set(glyphs.CHARACTERS)) == 200
    assert len("".join(glyphs.TRAINING_CHARACTERS.values())) == 100
    assert list(glyphs.TRAINING_CHARACTERS) == list(glyphs.VALIDATION_CHARACTERS)


def test_every_font_of_a_class_draws_its_character(faces_of):
    """A font without the character would draw its placeholder: compare with that of a place that is never used."""
    for character, faces in faces_of.items():
        assert len(faces) >= 3, character
        for face in faces:
            font = ImageFont.truetype(face, 40, layout_engine=ImageFont.Layout.BASIC)
            drawn, placeholder = (bytes(font.getmask(text)) for text in (character, "\U0010fffe"))
            assert any(drawn), (character, face)
            assert drawn != placeholder, (character, face)


def test_old_computer_modern_fonts_serve_letters_and_digits_alone(faces_of):
    """They hold other signs where Unicode has punctuation and Greek."""
    with_cm = {character for character, faces in faces_of.items() if any(Path(face).name[:2] == "cm" for face in faces)}
    assert with_cm == {character for character in glyphs.CHARACTERS if character.isascii() and character.isalnum()}


def test_no_two_classes_look_alike(faces_of):
    """In the plain face, brought to one size, also mirrored: the closest pair still differs."""

    plain = faces_of["A"][0]

    def shape(character: str, mirrored: bool) -> np.ndarray:
        mask = glyphs.glyph_mask(character, plain, 96)
        if mirrored:
            mask = mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        mask.thumbnail((28, 28))
        canvas = Image.new("L", (32, 32))
        canvas.paste(mask, ((32 - mask.width) // 2, (32 - mask.height) // 2))
        values = np.asarray(canvas.filter(ImageFilter.GaussianBlur(1)), dtype=float).reshape(-1)
        return values / np.linalg.norm(values)

    shapes = np.stack([shape(character, mirrored=False) for character in glyphs.CHARACTERS])  # (200, 1024)
    mirrored = np.stack([shape(character, mirrored=True) for character in glyphs.CHARACTERS])
    likeness = np.maximum(shapes @ shapes.T, shapes @ mirrored.T)  # cosines
    np.fill_diagonal(likeness, 0)
    first, second = np.unravel_index(likeness.argmax(), likeness.shape)
    assert likeness.max() < 0.93, glyphs.CHARACTERS[first] + glyphs.CHARACTERS[second]
    b, d = shape("b", mirrored=True), shape("d", mirrored=False)
    assert b @ d > 0.93  # a pair that was left out would have been found


def test_files_have_the_form_of_the_large_data_sets(root, tmp_path):
    done = run(root, "--data_dir", tmp_path, "--per_class", 2)
    assert (done.returncode, done.stderr) == (0, "")
    for half, first in (("training", 1), ("validation", 101)):
        images, labels = load(tmp_path / "glyphs", half, 64)
        assert (images.dtype, images.shape) == (np.uint8, (200, 64, 64, 3))
        assert labels.dtype == np.int64
        assert labels.tolist() == np.repeat(np.arange(first, first + 100), 2).tolist()
    assert len(list((tmp_path / "glyphs").iterdir())) == 4


def test_seed_fixes_every_pixel_whatever_the_workers(root, tmp_path):
    options = ["--per_class", 1, "--image_size", 32]
    for name, extra in (("one", ["--workers", 1]), ("three", ["--workers", 3]), ("other", ["--seed", 1])):
        assert run(root, "--out_dir", tmp_path / name, *options, *extra).returncode == 0
    for half in ("training", "validation"):
        one, three, other = (load(tmp_path / name, half, 32)[0] for name in ("one", "three", "other"))
        np.testing.assert_array_equal(one, three)
        assert all((a != b).any() for a, b in zip(one, other, strict=True))


def test_more_images_a_class_keep_the_first_ones(faces_of):
    few, many = glyphs.all_glyphs(1, seed=0), glyphs.all_glyphs(3, seed=0)
    assert few == [glyph for glyph in many if glyph.index == 0]


def test_character_stands_out_and_stays_inside(faces_of):
    """Against the same image without its character: a part of the middle differs strongly, the corners do not."""
    for label in range(1, 201, 7):
        character = glyphs.CHARACTERS[label - 1]
        rng = np.random.default_rng([0, label, 0])
        coverage = glyphs.jittered(glyphs.glyph_mask(character, faces_of[character][0], 64), 64, rng)
        assert 0.01 < coverage.mean() < 0.6, character
        assert coverage[[0, 0, -1, -1], [0, -1, 0, -1]].max() == 0, character
        rows, columns = np.nonzero(coverage > 0.3)
        assert max(np.ptp(rows), np.ptp(columns)) > 64 * 0.35, character


def test_ink_is_legible_on_every_background():
    brightness = np.array([0.299, 0.587, 0.114])
    for seed in range(200):
        rng = np.random.default_rng(seed)
        background = glyphs.draw_background(32, rng)
        assert background.shape == (32, 32, 3)
        mean = background.mean(axis=(0, 1))
        assert (mean - glyphs.draw_ink(rng)) @ brightness >= 80


def test_images_of_a_class_differ(faces_of):
    images = [
        glyphs.render_glyph(glyphs.Glyph("A", faces_of["A"], label=1, index=index, seed=0), 64) for index in range(5)
    ]
    assert len({image.tobytes() for image in images}) == 5


@pytest.mark.parametrize(("option", "value"), [("--per_class", "0"), ("--seed", "-1"), ("--image_size", "4")])
def test_bad_option_is_one_line(option, value, root, tmp_path):
    done = run(root, "--out_dir", tmp_path / "out", option, value)
    assert done.returncode == 2
    assert done.stderr.startswith("pre_process_glyphs.py: error: ")
    assert done.stderr.count("\n") == 1
    assert option in done.stderr
    assert not (tmp_path / "out").exists()
