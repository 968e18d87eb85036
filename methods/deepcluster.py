"""DeepCluster: the cluster head classifies by k-means labels (Caron et al., ECCV 2018)."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods.base import Features, Method
from utils.options import whole


class DeepCluster(Method):
    """Softmax cross-entropy of the cluster head with the labels of a clustering of all images."""

    @staticmethod
    def add_options(group: argparse._ArgumentGroup) -> None:
        group.add_argument("--n_cluster", type=whole(2), default=32, help="K, number of clusters")

    def __init__(self, model: Any, options: argparse.Namespace, n_images: int, **kwargs) -> None:
        super().__init__(model, options, n_images, **kwargs)
        self.register_buffer("pseudo_labels", torch.zeros(n_images, dtype=torch.int64))

    def begin_epoch(self, epoch: int, features: Features) -> dict:
        """Cluster all images, and begin the cluster head anew: new clusters are new classes."""
        n_cluster = self.options.n_cluster
        labels, _ = self.cluster(self.comparable(*features()), n_cluster, epoch)
        self.pseudo_labels.copy_(labels)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.options.seed + epoch)
            for part in self.model.clustering:
                if hasattr(part, "reset_parameters"):
                    part.reset_parameters()
        return {"cluster_sizes": torch.bincount(labels, minlength=n_cluster).tolist()}

    def restarted(self) -> Iterable[nn.Parameter]:
        """Return the parameters of the cluster head."""
        return self.model.clustering.parameters()

    def forward(self, views: Tensor, index: Tensor) -> dict[str, Tensor]:
        """Compute the cross-entropy of a batch."""
        embeddings, index = self.embed_batch(views, index)
        logits = self.model.clustering(embeddings)  # (2m, K), not normalized
        return {"loss": F.cross_entropy(logits, self.pseudo_labels[index])}
