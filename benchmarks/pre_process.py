"""Pre-processing by two workers beside one, and beside a plain loop over PIL, on JPEG files of CUB's usual size."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import paired
from PIL import Image

SIZE = 256


def make_raw(folder: Path, count: int) -> Path:
    """CUB's layout with `count` smooth random JPEGs, half of them of a training class."""
    (folder / "images" / "some").mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [f"some/{i:05d}.jpg" for i in range(count)]
    for name in names:
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / "images" / name, quality=90)
    (folder / "images.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(names, 1)))
    labels = (f"{i} {1 if i % 2 else 101}\n" for i in range(1, count + 1))
    (folder / "image_class_labels.txt").write_text("".join(labels))
    return folder


def script_command(raw: Path, workers: int) -> list[str]:
    """The command line of the project's script."""
    script = paired.ROOT / "pre_process" / "pre_process_cub200.py"
    return [sys.executable, str(script), "--data_dir", str(raw), "--workers", str(workers)]


def script(raw: Path, workers: int) -> None:
    """The project's script, in a process of its own."""
    subprocess.run(script_command(raw, workers), check=True, stdout=subprocess.DEVNULL)


def plain_loop(raw: Path) -> None:
    """What a short script does: decode, squash, stack, save."""
    rows = []
    for line in (raw / "images.txt").read_text().splitlines():
        with Image.open(raw / "images" / line.split()[1]) as image:
            rows.append(np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)))
    np.save(raw / "plain.npy", np.stack(rows))


def main() -> None:
    parser = paired.arguments("pre_process", __doc__)
    options = parser.parse_args()
    count = 20 if options.tiny else 2000
    with tempfile.TemporaryDirectory() as folder:
        raw = make_raw(Path(folder) / "cub200", count)
        ways = {
            "two workers": partial(script, raw, 2),
            "one worker": partial(script, raw, 1),
            "plain loop over PIL": partial(plain_loop, raw),
        }
        timed = paired.in_turn(ways, options.repeats)
    for figures in timed.values():
        figures["images_per_second"] = count / figures["median_s"]
    paired.write({"data": f"{count} random JPEGs of 500 x 375", "ways": timed}, options)


if __name__ == "__main__":
    main()
