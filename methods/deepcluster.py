"""DeepCluster-v2: a softmax over the centroids of a clustering of all images.

Caron et al., "Unsupervised learning of visual features by contrasting cluster assignments",
NeurIPS 2020. In the first DeepCluster (ECCV 2018) each clustering began a classifier anew; here
its centroids are the classifier.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from methods.base import Features, Method
from utils.options import real, whole


class DeepCluster(Method):
    """Cross-entropy of each view with the cluster of its image, over all centroids."""

    @staticmethod
    def add_options(group: argparse._ArgumentGroup) -> None:
        group.add_argument("--n_cluster", type=whole(2), default=32, help="K, number of clusters")
        group.add_argument("--t", type=real(1e-6), default=0.1, help="temperature")

    def __init__(self, model: Any, options: argparse.Namespace, n_images: int, **kwargs) -> None:
        super().__init__(model, options, n_images, **kwargs)
        self.register_buffer("pseudo_labels", torch.zeros(n_images, dtype=torch.int64))
        self.register_buffer("centers", torch.zeros(options.n_cluster, model.low_dim))

    def begin_epoch(self, epoch: int, features: Features) -> dict:
        """Cluster the embeddings of all images."""
        n_cluster = self.options.n_cluster
        labels, centers = self.cluster(features()[1].to(self.device), n_cluster, epoch)
        self.pseudo_labels.copy_(labels)
        self.centers.copy_(F.normalize(centers, dim=1))
        return {"cluster_sizes": torch.bincount(labels, minlength=n_cluster).tolist()}

    def forward(self, views: Tensor, index: Tensor) -> dict[str, Tensor]:
        """Compute the cross-entropy of a batch."""
        embeddings, index = self.embed_batch(views, index)
        logits = embeddings @ self.centers.T / self.options.t  # (2m, K)
        return {"loss": F.cross_entropy(logits, self.pseudo_labels[index])}
