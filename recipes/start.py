"""The start that the training images choose: stripes or not, and the head in closed form."""

from __future__ import annotations

import argparse
from functools import partial

import numpy as np
import torch
from torch import Tensor

from datasets.arrays import Split
from datasets.views import N_PARTS, center_crops, part_crops
from models import Pooling, build_model, pooled_channels, pooled_width
from models.closed_form import head_size
from models.start import ALIGNED, FEWEST_ALIGNED, aligned_share, best_of, score_heads
from utils.distributed import Processes
from utils.features import pooled_features
from utils.progress import progress

START_IMAGES = 800  # whose parts are looked at to judge heads
MOST_TRAINED = 0.45  # power of whitening that an epoch begins with: more makes worse pseudo-labels
MORE_AT_END = 0.15  # power that trained features take beyond the start's


def fit_start(
    args: argparse.Namespace, training: Split, device: torch.device, processes: Processes
) -> tuple[Tensor | None, list[str]]:
    """Fit head_init, whiten_power, stripes and low_dim to the training images, where they are open.

    Returns the pooled features (N, C) of these images, if they were computed, and what was measured
    and changed, in sentences.
    """
    pooled = None
    remarks: list[str] = []
    if args.head_init == "auto":
        pooled, remarks = choose_start(args, training, device, processes)
    if args.head_init == "random" or args.resume or "low_dim" in args.given:
        return pooled, remarks
    pooling = Pooling.parse(args.layers, args.pool, True, args.stripes)
    width = pooled_width(args.backbone, pooling)
    low_dim = head_size(args.low_dim, len(training), width)
    if low_dim != args.low_dim:
        remarks.append(f"low_dim {args.low_dim} becomes {low_dim} for {training}")
    args.low_dim = low_dim
    return pooled, remarks


def power_of_head(args: argparse.Namespace, at_end: bool) -> float:
    """Return the whitening power of the head at the beginning or the end of an epoch."""
    power = args.whiten_power
    if at_end and args.refit_head not in ("auto", "start"):
        return args.refit_head
    if args.refit_head != "auto" or not args.n_epoch:
        return power
    return max(power, min(power + MORE_AT_END, 1.0)) if at_end else min(power, MOST_TRAINED)


def choose_start(
    args: argparse.Namespace, training: Split, device: torch.device, processes: Processes
) -> tuple[Tensor, list[str]]:
    """Choose stripes and head for the training images, see `models.start`.

    The choice is put into the options of train.py: stripes, head_init, whiten_power.

    Returns the pooled features (N, C) of the training images on the CPU, and what was measured, in
    sentences.
    """
    poolings = _candidates(args, len(training))
    torch.manual_seed(args.seed)  # random weights are those of the network that is trained
    model = build_model(args.backbone, weights=args.weights, pooling=poolings[-1])
    model = model.to(device, memory_format=torch.channels_last)
    features = partial(pooled_features, model, precision=args.precision, processes=processes)
    crops = center_crops(training, args.test_batch, args.workers, processes.share)
    crops = progress(crops, "features for the start")
    all_pooled = features(crops, flip=args.flip_eval, poolings=poolings)
    remarks = []
    number = 0
    if len(poolings) > 1:
        stripes = poolings[1].stripes_of(all_pooled[1], pooled_channels(args.backbone, poolings[1]))
        aligned = processes.by_first(lambda: aligned_share(all_pooled[0], stripes))
        remarks.append(f"{100 * aligned:.1f} % of stripes find their like at the same height")
        number = int(aligned >= ALIGNED)
    pooling = poolings[number]
    pooled = all_pooled[number]
    index = np.random.default_rng([args.seed, 0]).permutation(len(training))[:START_IMAGES]
    batch_size = -(-args.test_batch // N_PARTS)
    crops = part_crops(training, index, args.seed, batch_size, args.workers, processes.share)
    (rows,) = features(progress(crops, "parts of images"), poolings=[pooling])
    parts = rows.unflatten(0, (-1, N_PARTS))  # (n, 4, C)
    is_aligned = pooling.in_stripes
    heads = processes.by_first(
        lambda: score_heads(pooled, parts, torch.from_numpy(index), is_aligned)
    )
    best = best_of(heads, is_aligned)
    args.stripes = pooling.options()["stripes"]
    args.head_init = best.kind
    args.whiten_power = best.power
    remarks.append(f"how well heads find parts: {', '.join(map(str, heads))}")
    remarks.append(f"the start is {best.name} with stripes {args.stripes}")
    return pooled, remarks


def _candidates(args: argparse.Namespace, n_images: int) -> list[Pooling]:
    """Return the poolings that a start may have: those wide enough for a given --low_dim."""
    plain, striped = (
        Pooling.parse(args.layers, args.pool, True, stripes) for stripes in ("1", args.stripes)
    )
    poolings = [plain, striped] if striped.in_stripes else [plain]
    if "stripes" in args.given:
        poolings = [striped]
    elif n_images < FEWEST_ALIGNED:
        poolings = [plain]
    if "low_dim" not in args.given:
        return poolings
    wide = [pool for pool in poolings if pooled_width(args.backbone, pool) >= args.low_dim]
    return wide or poolings[-1:]
