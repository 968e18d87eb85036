"""Deep clustering with soft targets: centroids of several k-means partitions of all images."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from losses import soft_center_loss
from methods.base import Features, Method
from utils.options import real, whole, whole_list


class SoftCenters(Method):
    """Pull each view towards the soft assignment that its image had when the epoch began.

    An assignment is a softmax over the centroids of clusters of all training images.
    """

    @staticmethod
    def add_options(group: argparse._ArgumentGroup) -> None:
        add = group.add_argument
        add("--t", type=real(1e-6), default=0.05, help="temperature of the softmax over centroids")
        text = "temperature of the soft assignments"
        add("--target_t", type=real(1e-6), default=0.05, help=text)
        text = "images a cluster, on average, a number for each partition"
        sizes = whole_list(1, 10**6)
        add("--cluster_sizes", type=sizes, default=[6, 12, 24, 48], metavar="N,N,...", help=text)
        text = "neighbors of an image whose assignments are averaged with its own"
        add("--target_neighbors", type=whole(0, 1000), default=4, metavar="N", help=text)

    def __init__(self, model: Any, options: argparse.Namespace, n_images: int, **kwargs) -> None:
        super().__init__(model, options, n_images, **kwargs)
        self.n_clusters = partition_sizes(n_images, options.cluster_sizes)
        n_members = 1 + min(options.target_neighbors, n_images - 1)
        self.register_buffer("memory", torch.zeros(n_images, model.low_dim))
        self.register_buffer("members", torch.zeros(n_images, n_members, dtype=torch.int64))
        self.register_buffer("centers", torch.zeros(sum(self.n_clusters), model.low_dim))

    def begin_epoch(self, epoch: int, features: Features) -> dict:
        """Remember all embeddings, the neighbors of each image, and the centroids of partitions."""
        embeddings = features()[1].to(self.device)
        members = torch.arange(self.n_images)[:, None]  # (N, 1), the image itself
        n_neighbors = self.members.shape[1] - 1
        if n_neighbors:
            members = torch.cat([members, self.mine(embeddings, n_neighbors)], 1)
        centers = [self.cluster(embeddings, k, epoch)[1] for k in self.n_clusters]
        self.memory.copy_(embeddings)
        self.members.copy_(members)
        self.centers.copy_(F.normalize(torch.cat(centers), dim=1))
        return {"partitions": self.n_clusters}

    def forward(self, views: Tensor, index: Tensor) -> dict[str, Tensor]:
        """Compute the cross-entropy of a batch with the soft assignments of its images."""
        embeddings, index = self.embed_batch(views, index)
        members = self.memory[self.members[index]]  # (2m, n, D)
        partitions = self.centers.split(self.n_clusters)
        loss = soft_center_loss(
            embeddings, members, partitions, self.options.t, self.options.target_t
        )
        return {"loss": loss}


def partition_sizes(n_images: int, cluster_sizes: list[int]) -> list[int]:
    """Return how many clusters each partition has: at least 2, no number twice, ascending."""
    return sorted({max(2, n_images // size) for size in cluster_sizes})
