"""A whole training of the paper and of `--recipe best`: seconds, and the share of the peak.

    python benchmarks/full_run.py --dataset car196

The paper's 30 epochs with GoogLeNet, and the recipe with ResNet-18, scored after every epoch, with
random weights, which take as long as trained ones. Each is run as a user would run it; one more
epoch in this process tells how the time divides into stages (benchmarks/stages.py).
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, if run as a script

import train
from benchmarks import paired, stages
from datasets.views import crop_size
from models import build_model
from utils.errors import run_script
from utils.features import network_autocast
from utils.options import path_name, whole
from utils.runs import read_metrics

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKBONES = {"paper": "googlenet", "best": "resnet18"}  # of each recipe
TINY_BACKBONE = "resnet_small"
SIDE = 8192  # of the matrices that tell what the machine reaches
TINY_SIDE = 256


def reached_peak(precision: str, side: int, repeats: int) -> float:
    """Return the FLOP/s of a product of large matrices, as the network would compute it."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=DEVICE, dtype=dtype) for _ in range(2))
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True  # as convolutions have it
    times = [paired.seconds(lambda: a @ b) for _ in range(1 + repeats)]
    torch.backends.cuda.matmul.allow_tf32 = allowed
    return 2 * side**3 / min(times[1:])


def network_flop(words: Sequence[str], image_size: int) -> float:
    """Return the floating-point operations with which a view goes forward and back."""
    args = train.parse_args(list(words))
    model = build_model(args.backbone, weights="none").to(DEVICE)
    model.train_parts(args.train_stages, args.train_batch_norm)
    crop = crop_size(image_size)
    counter = FlopCounterMode(display=False)
    with counter, network_autocast(DEVICE, args.precision):
        maps = model.maps(torch.randn(1, 3, crop, crop, device=DEVICE))
        sum(part.float().sum() for part in maps).backward()
    return counter.get_total_flops()


def measure(words: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run train.py as a user does: seconds of the whole, of its parts, and views a second."""
    script = stages.ROOT / "train.py"
    run = ["--checkpoint_dir", str(folder), "--model_name", "run", "--overwrite"]
    started = time.perf_counter()
    subprocess.run([sys.executable, str(script), *words, *run], check=True)
    whole_s = time.perf_counter() - started
    rows = read_metrics(folder / "run")
    names = ("features", "train", "evaluate")
    parts = {name: round(sum(row["seconds"][name] for row in rows), 2) for name in names}
    return {
        "seconds": round(whole_s, 1),
        "parts": parts,
        "epochs": len(rows),
        "views_per_second": round(rows[-1]["views_per_second"], 1),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each training in each precision, and write the result."""
    parser = paired.make_parser("full_run", "Seconds of whole trainings, by stage.")
    add = parser.add_argument
    add("--dataset", default="car196", help="pre-processed")
    add("--data_dir", type=path_name, default="data", help="the folder that holds it")
    add("--image_size", type=whole(8), default=256, help="which pre-processed size")
    add("--n_epoch", type=whole(1), default=30, help="of the paper's method alone")
    add("--recipes", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    add("--precisions", nargs="+", choices=("bf16", "fp32"), default=["bf16", "fp32"])
    add("--test_batch", type=whole(1), default=500, help="of train.py")
    options = parser.parse(argv)
    data = [f"--dataset={options.dataset}", f"--data_dir={options.data_dir}", "--weights=none"]
    data += [f"--image_size={options.image_size}", f"--test_batch={options.test_batch}"]
    result: dict[str, Any] = {"data": f"{options.dataset}, {options.image_size} px"}
    for recipe in options.recipes:
        backbone = TINY_BACKBONE if options.tiny else BACKBONES[recipe]
        for precision in options.precisions:
            words = [*data, f"--recipe={recipe}", f"--backbone={backbone}"]
            words.append(f"--precision={precision}")
            if recipe == "paper":
                words.append(f"--n_epoch={options.n_epoch}")
            with TemporaryDirectory() as folder:
                measured = measure(words, Path(folder))
                alone = ["--checkpoint_dir", folder, "--model_name=stages", "--n_epoch=1"]
                measured["stages_of_an_epoch"] = stages.measure("train.py", [*words, *alone])
            peak = reached_peak(precision, TINY_SIDE if options.tiny else SIDE, options.repeats)
            flop = network_flop(words, options.image_size)
            measured["gflop_of_a_view"] = round(flop / 1e9, 2)
            measured["peak_tflops"] = round(peak / 1e12, 3)
            measured["share_of_peak"] = round(flop * measured["views_per_second"] / peak, 3)
            result[f"recipe {recipe}, {backbone}, {precision}"] = measured
    paired.write(result, options)


if __name__ == "__main__":
    run_script(main)
