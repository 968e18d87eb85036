"""Decoding an image, in any mode and of any damage, and finding the images of a folder."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin, features
from raw_folders import save_photo

from datasets import images
from datasets.images import UnreadableError, allow_pixels, decode_image, find_images, open_rgb
from utils.errors import UserError


def random_pixels(*shape: int, high: int = 256) -> np.ndarray:
    return np.random.default_rng(3).integers(0, high, shape, dtype=np.uint8)


def decoded(image: Image.Image, path: Path, **options: object) -> np.ndarray:
    """Save an 8x8 image and decode it at size 8: its very pixels, as nothing is resized."""
    image.save(path, **options)
    return decode_image(path, 8)


def reference(path: Path, size: int) -> np.ndarray:
    """Apply the literal rule: all of the image, RGB, squashed with Lanczos."""
    squashed = Image.open(path).convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
    return np.array(squashed)


def test_the_whole_image_is_squashed(tmp_path):
    """The draft mode of the JPEG decoder is faster, and other pixels; archives are not read so."""
    path = save_photo(tmp_path / "large.jpg", seed=0, size=(1200, 900))
    with Image.open(path) as image:
        image.draft("RGB", (150, 150))
        drafted = np.array(image.resize((32, 32), Image.Resampling.LANCZOS))
    pixels = decode_image(path, 32, as_stored=True)
    assert (drafted != pixels).any()  # so the next line can tell
    np.testing.assert_array_equal(pixels, reference(path, 32))
    assert open_rgb(path, least_side=64).size == (150, 113)
    photo = decode_image(path, 32)
    assert 0 < np.abs(photo.astype(int) - pixels).mean() < 1


GRAYS = {  # how each kind of image stores 0-255
    "8 bit": lambda values: values.astype(np.uint8),
    "1 bit": lambda values: values > 99,
    "16 bit": lambda values: values.astype(np.uint16) * 256 + 200,  # the high byte counts
    "10 bit": lambda values: values.astype(np.uint16) * 4 + 1,
    "12 bit": lambda values: values.astype(np.uint16) * 16 + 7,
    "14 bit": lambda values: values.astype(np.uint16) * 64 + 9,
    "32 bit": lambda values: values.astype(np.int32) * 2**23 + 99,
    "signed 12 bit": lambda values: values.astype(np.int32) * 16 - 999,
}


@pytest.mark.parametrize("kind", GRAYS)
def test_gray_becomes_three_equal_channels(tmp_path, kind):
    values = random_pixels(8, 8)
    values[0, 0] = 0  # of signed values the least is black
    pixels = decoded(Image.fromarray(GRAYS[kind](values)), tmp_path / "a.tif")
    if kind == "1 bit":
        values = np.where(values > 99, 255, 0)
    np.testing.assert_array_equal(pixels, np.stack([values] * 3, axis=-1))


def test_gray_of_archives_keeps_its_high_byte(tmp_path):
    values = random_pixels(8, 8).astype(np.uint16) * 16
    Image.fromarray(values).save(tmp_path / "a.png")
    pixels = decode_image(tmp_path / "a.png", 8, as_stored=True)
    np.testing.assert_array_equal(pixels[..., 0], values >> 8)


@pytest.mark.parametrize("transparency", [None, 2, bytes([0, 255, 90, 0])])
def test_a_palette_becomes_its_colors_and_white_where_transparent(tmp_path, transparency):
    palette = random_pixels(4, 3)
    entries = random_pixels(8, 8, high=4)
    image = Image.new("P", (8, 8))
    image.putdata(entries.reshape(-1).tolist())
    image.putpalette(palette.reshape(-1).tolist())
    options = {} if transparency is None else {"transparency": transparency}
    pixels = decoded(image, tmp_path / "a.png", **options)
    stored = decode_image(tmp_path / "a.png", 8, as_stored=True)
    np.testing.assert_array_equal(stored, palette[entries])
    alpha = np.array(list(transparency) if isinstance(transparency, bytes) else [255] * 4)
    if transparency == 2:
        alpha[2] = 0
    share = alpha[entries][..., None] / 255
    np.testing.assert_allclose(pixels, share * palette[entries] + (1 - share) * 255, atol=1)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_white_in_photos_and_dropped_in_archives(tmp_path, mode):
    ink = Image.new(mode, (16, 16), 0)  # black, and transparent everywhere
    ink.paste(Image.new(mode, (8, 16), (0,) * (len(mode) - 1) + (255,)), (0, 0))
    ink.save(tmp_path / "line_art.png")
    pixels = decode_image(tmp_path / "line_art.png", 16)
    assert (pixels[:, :7] == 0).all() and (pixels[:, 9:] == 255).all()
    assert (decode_image(tmp_path / "line_art.png", 16, as_stored=True) == 0).all()


def test_cmyk(tmp_path):
    cmyk = random_pixels(8, 8, 4)
    pixels = decoded(Image.fromarray(cmyk, "CMYK"), tmp_path / "a.tif")
    ink = 1 - cmyk.astype(float) / 255
    np.testing.assert_allclose(pixels, 255 * ink[:, :, :3] * ink[:, :, 3:], atol=1.5)


def test_exif_turns_an_image_unless_it_is_wanted_as_stored(tmp_path):
    photo = Image.fromarray(random_pixels(16, 24, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me by 90 degrees"
    photo.save(tmp_path / "plain.jpg")
    photo.save(tmp_path / "turned.jpg", exif=exif)
    stored = decode_image(tmp_path / "turned.jpg", 16, as_stored=True)
    np.testing.assert_array_equal(stored, reference(tmp_path / "plain.jpg", 16))
    upright = open_rgb(tmp_path / "turned.jpg")
    turned = Image.open(tmp_path / "plain.jpg").transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(np.asarray(upright), np.asarray(turned))


@pytest.mark.parametrize(
    "content", [b"", b"Exif\0\0", b"II*\0\xff\xff\xff\x7f", b"MM\0*" * 99, b"\0" * 60]
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_odd_exif_data_do_not_matter(tmp_path, kind, content):
    photo = Image.fromarray(random_pixels(16, 24, 3))
    photo.save(tmp_path / "plain", format=kind, lossless=True)
    photo.save(tmp_path / "odd", format=kind, lossless=True, exif=b"Exif\0\0" + content)
    np.testing.assert_array_equal(
        decode_image(tmp_path / "odd", 16), decode_image(tmp_path / "plain", 16)
    )


def test_a_png_with_damaged_metadata_keeps_its_pixels(tmp_path):
    pixels = random_pixels(8, 8, 3)
    text = PngImagePlugin.PngInfo()
    text.add_text("remark", "x" * (2 * PngImagePlugin.MAX_TEXT_CHUNK), zip=True)
    np.testing.assert_array_equal(
        decoded(Image.fromarray(pixels), tmp_path / "a.png", pnginfo=text), pixels
    )
    content = (tmp_path / "a.png").read_bytes()
    for kind in (b"zTXt", b"IHDR", b"IDAT"):
        place = content.index(kind) - 4
        place += 8 + struct.unpack_from(">I", content, place)[0]
        wrong = content[:place] + b"oops" + content[place + 4 :]
        (tmp_path / "a.png").write_bytes(wrong)
        np.testing.assert_array_equal(decode_image(tmp_path / "a.png", 8), pixels)
    (tmp_path / "a.png").write_bytes(content[: content.index(b"IDAT") + 100])
    with pytest.raises(UnreadableError, match="truncated"):
        decode_image(tmp_path / "a.png", 8)


def test_first_frame_of_a_moving_image(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    pixels = decoded(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (pixels == (255, 0, 0)).all()


# ---------------------------------------------------------------------- what cannot be decoded


def png_claiming(width: int, height: int) -> bytes:
    """Make a small PNG that says it is of another size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunks + chunk(b"IEND", b"")


def saved(kind: str, folder: Path, mode: str = "RGB", keep: float = 1.0) -> bytes:
    """Return the first share of the bytes of a picture of some kind."""
    path = folder / "saved"
    Image.effect_noise((48, 40), 90).convert(mode).save(path, format=kind)
    content = path.read_bytes()
    return content[: int(keep * len(content))]


UNREADABLE = {
    "empty": (lambda _: b"", "is not an image"),
    "a page": (lambda _: b"<html>" * 99, "is not an image"),
    "a PNG of too many pixels": (lambda _: png_claiming(30_000, 30_000), "exceeds"),
    "fewer pixels than claimed": (lambda _: png_claiming(400, 400), "cannot be read"),
    "a cut JPEG": (lambda f: saved("JPEG", f, keep=0.6), "truncated"),
    "PostScript, which is a program": (lambda f: saved("EPS", f), "is not an image"),
    "numbers without a range": (lambda f: saved("TIFF", f, "F"), "no fixed range"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable(kind, tmp_path):
    content, reason = UNREADABLE[kind]
    (tmp_path / "a.jpg").write_bytes(content(tmp_path))
    with pytest.raises(UnreadableError, match=reason):
        decode_image(tmp_path / "a.jpg", 8)


def test_how_many_pixels_are_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    save_photo(tmp_path / "a.jpg", 1, size=(50, 40))
    allow_pixels(1999)
    with pytest.raises(UnreadableError, match="2000 pixels, more than max_pixels 1999"):
        decode_image(tmp_path / "a.jpg", 8)
    allow_pixels(2000)
    decode_image(tmp_path / "a.jpg", 8)


# ------------------------------------------------------------------------- images of a folder


def test_which_files_are_images(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(images, "_has_heif", lambda: False)
    photos = [tmp_path / "b.TIFF", tmp_path / "cat" / "deep" / "a.jpg", tmp_path / "link.png"]
    save_photo(photos[0], 1)
    save_photo(photos[1], 2)
    photos[2].symlink_to(save_photo(tmp_path / ".elsewhere.png", 4))
    (tmp_path / "twice.png").symlink_to(photos[0])
    for name in (".hidden.png", ".cache/x.png", "notes.txt", "no_suffix"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "cat" / "loop").symlink_to(tmp_path)
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "movie.mp4").write_bytes(b"\0\0\0 ftypisom")
    (tmp_path / "phone.HEIC").write_bytes(b"\0\0\0 ftypheic")
    photos.append(save_photo(tmp_path / "hidden.jpg", 3).rename(tmp_path / "picture"))
    assert find_images(tmp_path) == sorted(photos)
    for words in ("1 links to nothing", "1 .mp4", "1 .txt", "1 .HEIC (pip install pillow-heif"):
        assert words in caplog.text
    assert "1 links to images that are here themselves are left out" in caplog.text


def test_content_decides_over_a_suffix(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(images, "_has_heif", lambda: False)
    photo = save_photo(tmp_path / "a.jpg", 1).rename(tmp_path / "a.heic")
    (tmp_path / "b").write_bytes(b"\0\0\0 ftypheic")
    assert find_images(tmp_path) == [photo]
    assert "1 files without a suffix (pip install pillow-heif" in caplog.text
    with pytest.raises(UnreadableError, match="HEIC; pip install pillow-heif"):
        decode_image(tmp_path / "b", 8)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow cannot read AVIF")
def test_avif(tmp_path):
    photo = Image.new("RGB", (24, 16), (200, 30, 90))
    photo.save(tmp_path / "a.avif")
    assert find_images(tmp_path) == [tmp_path / "a.avif"]
    assert np.abs(decode_image(tmp_path / "a.avif", 8).astype(int) - (200, 30, 90)).max() < 4


def test_heic_of_a_phone_held_upright(tmp_path):
    """The format turns its images itself; the orientation tag must not turn them again."""
    pillow_heif = pytest.importorskip("pillow_heif", reason="needs pillow-heif")
    pixels = np.zeros((64, 32, 3), np.uint8)
    pixels[:32] = (200, 30, 90)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    photo = Image.fromarray(pixels)
    photo.save(tmp_path / "a.jpg", exif=exif, quality=95)
    pillow_heif.from_pillow(photo).save(tmp_path / "a.heic", exif=exif.tobytes(), quality=95)
    assert find_images(tmp_path) == [tmp_path / "a.heic", tmp_path / "a.jpg"]
    heic, jpeg = (decode_image(tmp_path / name, 16).astype(int) for name in ("a.heic", "a.jpg"))
    assert np.abs(heic - jpeg).mean() < 4 < np.abs(heic - heic[:, ::-1]).mean()


def test_a_folder_without_images(tmp_path):
    with pytest.raises(UserError, match="no images in it"):
        find_images(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        find_images(tmp_path / "nowhere")
