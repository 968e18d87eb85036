"""Ceilings: losses of pytorch-metric-learning by the REAL labels."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from torch import Tensor

from methods.base import Features, Method, add_group_option
from utils.errors import UserError

PROXY_RATE = 100.0  # rate of the proxies, as a multiple of the network's, as in their paper


class Supervised(Method):
    """A loss of pytorch-metric-learning on batches with several images of each class."""

    uses_labels = True

    @staticmethod
    def add_options(group: argparse._ArgumentGroup) -> None:
        add_group_option(group, 1, "images of the class")

    def __init__(
        self, model: Any, options: argparse.Namespace, n_images: int, labels: Tensor, **kwargs
    ) -> None:
        super().__init__(model, options, n_images, labels, **kwargs)
        self.make_groups()
        self.register_buffer("labels", labels)
        try:
            from pytorch_metric_learning import losses, miners
        except ImportError:
            raise UserError(
                "this method needs a package; pip install pytorch-metric-learning"
            ) from None
        self.make_loss(losses, miners, int(labels.max()) + 1)

    def make_loss(self, losses: Any, miners: Any, n_classes: int) -> None:
        """Set `loss` and `miner` (None for all pairs) from the modules of the package."""
        raise NotImplementedError

    def begin_epoch(self, epoch: int, features: Features) -> dict:
        """Draw the images of its class that follow each image."""
        if self.neighbors is not None:
            seed = (self.options.seed, epoch)
            self.neighbors.copy_(same_class(self.labels.cpu(), self.neighbors.shape[1], seed))
        return {}

    def forward(self, views: Tensor, index: Tensor) -> dict[str, Tensor]:
        """Compute the loss of a batch."""
        embeddings, index = self.embed_batch(views, index)
        labels = self.labels[index]
        if self.miner is None:
            return {"loss": self.loss(embeddings, labels)}
        return {"loss": self.loss(embeddings, labels, self.miner(embeddings, labels))}


class ProxyAnchor(Supervised):
    """Proxy-Anchor (Kim et al., CVPR 2020) by the REAL labels."""

    lr_scale = PROXY_RATE

    def make_loss(self, losses: Any, miners: Any, n_classes: int) -> None:
        self.loss = losses.ProxyAnchorLoss(n_classes, self.model.low_dim)
        self.miner = None


class MultiSimilarity(Supervised):
    """Multi-Similarity with its miner (Wang et al., CVPR 2019) by the REAL labels."""

    def make_loss(self, losses: Any, miners: Any, n_classes: int) -> None:
        self.loss = losses.MultiSimilarityLoss()
        self.miner = miners.MultiSimilarityMiner()


def same_class(labels: Tensor, count: int, seed: tuple[int, int]) -> Tensor:
    """Draw for each image `count` images of its class, with repetition if there are fewer."""
    rng = np.random.default_rng(seed)
    drawn = np.empty((len(labels), count), np.int64)
    for label in range(int(labels.max()) + 1):
        images = rng.permutation(np.flatnonzero(labels.numpy() == label))
        turns = [np.roll(images, -turn) for turn in range(1, count + 1)]
        drawn[images] = np.stack(turns, 1)
    return torch.from_numpy(drawn)
