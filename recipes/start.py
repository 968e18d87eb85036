"""The start that the training images choose: stripes or not, and the head in closed form."""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor

from datasets.arrays import Split
from datasets.views import N_PARTS, center_crops, part_crops
from models import CBSwR, Pooling, build_model, pooled_channels, pooled_width
from models.start import (
    ALIGNED,
    FEWEST_ALIGNED,
    Head,
    aligned_share,
    best_of,
    score_heads,
)
from utils.distributed import Processes
from utils.features import pooled_features
from utils.progress import progress

START_IMAGES = 800  # whose parts are looked at to judge heads


class StartChooser:
    """Measures the training images, see `models.start`, to choose for them."""

    def __init__(
        self,
        args: argparse.Namespace,
        training: Split,
        device: torch.device,
        processes: Processes,
    ) -> None:
        """Keep what is chosen for: the options of train.py, and the training images."""
        self.args = args
        self.training = training
        self.device = device
        self.processes = processes

    def choose(self) -> tuple[Tensor, list[str]]:
        """Choose stripes and head, and put them into the options.

        Returns the pooled features (N, C) of the training images on the CPU, and what was measured,
        in sentences.
        """
        args = self.args
        poolings = self.candidates()
        torch.manual_seed(args.seed)  # random weights are those of the network that is trained
        model = build_model(args.backbone, weights=args.weights, pooling=poolings[-1])
        model = model.to(self.device, memory_format=torch.channels_last)
        share = self.processes.share
        crops = center_crops(self.training, args.test_batch, args.workers, share)
        batches = progress(crops, "features for the start")
        pooled = pooled_features(
            model, batches, args.precision, self.processes, args.flip_eval, poolings
        )
        number = 0
        remarks = []
        if len(poolings) > 1:
            channels = pooled_channels(args.backbone, poolings[1])
            stripes = poolings[1].stripes_of(pooled[1], channels)
            aligned = self.processes.by_first(lambda: aligned_share(pooled[0], stripes))
            number = int(aligned >= ALIGNED)
            remarks.append(f"{100 * aligned:.1f} % of stripes find their like at the same height")
        best, remark = self.best_head(model, poolings[number], pooled[number])
        args.stripes = poolings[number].options()["stripes"]
        args.head_init = best.kind
        args.whiten_power = best.power
        remarks += [remark, f"the start is {best.name} with stripes {args.stripes}"]
        return pooled[number], remarks

    def candidates(self) -> list[Pooling]:
        """Return the poolings that a start may have: those wide enough for a given --low_dim."""
        args = self.args
        plain, striped = (
            Pooling.parse(args.layers, args.pool, True, text) for text in ("1", args.stripes)
        )
        poolings = [plain, striped] if striped.in_stripes else [plain]
        if "stripes" in args.given:
            poolings = [striped]
        elif len(self.training) < FEWEST_ALIGNED:
            poolings = [plain]
        if "low_dim" not in args.given:
            return poolings
        wide = [pool for pool in poolings if pooled_width(args.backbone, pool) >= args.low_dim]
        return wide or poolings[-1:]

    def best_head(self, model: CBSwR, pooling: Pooling, pooled: Tensor) -> tuple[Head, str]:
        """Choose the closed-form head by parts of some training images.

        Args:
            pooled: features (N, C) of all training images by this network and pooling.

        Returns the head, and how well each head finds parts, as a sentence.
        """
        args = self.args
        index = np.random.default_rng([args.seed, 0]).permutation(len(self.training))
        index = index[:START_IMAGES]
        batch_size = -(-args.test_batch // N_PARTS)
        share = self.processes.share
        crops = part_crops(self.training, index, args.seed, batch_size, args.workers, share)
        batches = progress(crops, "parts of images")
        (rows,) = pooled_features(
            model, batches, args.precision, self.processes, poolings=[pooling]
        )
        parts = rows.unflatten(0, (-1, N_PARTS))
        numbers = torch.from_numpy(index)
        heads = self.processes.by_first(
            lambda: score_heads(pooled, parts, numbers, pooling.in_stripes)
        )
        measured = f"how well heads find parts: {', '.join(map(str, heads))}"
        return best_of(heads, pooling.in_stripes), measured
