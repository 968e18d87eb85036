"""What a training reads of a data set: images to train on, held-out classes, images to test on."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch

from datasets.arrays import Split, load_split
from datasets.views import images_on
from utils.evaluation import alone_remark, check_classes


@dataclass(frozen=True)
class Halves:
    """The two halves of a data set as a training takes them.

    Attributes:
        training: the images that are trained on.
        test: the test half.
        held_out: classes of the training half that are scored to choose the best epoch; None: none.
        fingerprints: of both whole halves, see `Split.fingerprint`.
        n_alone: test images that have no other one of their class to find.
    """

    training: Split
    test: Split
    held_out: Split | None
    fingerprints: dict[str, dict[str, str]]
    n_alone: int

    def describe(self) -> list[str]:
        """Return what there is, in sentences."""
        px = self.training.image_size
        remarks = [f"{self.training} to train on, {self.test} to test on, {px} px"]
        if self.n_alone:
            remarks.append(alone_remark(self.n_alone))
        return remarks

    def on(self, device: torch.device, data_on: str) -> Halves:
        """Return the halves with their images on a GPU, if they are to lie there (`images_on`)."""
        halves = [self.training.images, self.test.images]
        training, test = images_on(device, halves, data_on)
        return replace(
            self,
            training=replace(self.training, images=training),
            test=replace(self.test, images=test),
            held_out=replace(self.held_out, images=training) if self.held_out else None,
        )


def load_halves(
    data_dir: str | os.PathLike,
    dataset: str,
    image_size: int | None = None,
    n_held_out: int = 0,
    n_images: int | None = None,
    seed: int = 0,
) -> Halves:
    """Open both halves of a data set, and take what is trained on from the training half.

    Args:
        data_dir, image_size: as of `load_split`.
        n_held_out: how many of the last classes are held out.
        n_images: train on so many images, drawn by `seed`; None: on all.

    Raises UserError if a half is missing or damaged, if too few classes or images are left, and if
    there are labels but nothing to score.
    """
    training = load_split(data_dir, dataset, "training", image_size)
    test = load_split(data_dir, dataset, "validation", training.image_size)
    n_alone = check_classes(test.labels, test.is_query) if test.labeled else 0
    fingerprints = {"training": training.fingerprint(), "validation": test.fingerprint()}
    held_out = None
    if n_held_out:
        training, held_out = training.hold_out(n_held_out)
        check_classes(held_out.labels)
    if n_images:
        training = training.sample(n_images, seed)
    return Halves(training, test, held_out, fingerprints, n_alone)
