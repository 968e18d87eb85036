"""Softmax over the centroids of several k-means partitions of the whole training set, towards soft assignments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses.alone import embed_views, metric_alone
from models.pooling import as_float
from utils import clustering, search
from utils.distributed import ALONE, Processes


def soft_center_loss(
    embeddings: Tensor, members: Tensor, centers: Sequence[Tensor], temperature: float, target_temperature: float
) -> Tensor:
    """Cross-entropy of the assignment of embeddings to centroids and that of what is known of their images.

    embeddings: (B, D) of unit length; members: (B, n, D), for each row the remembered embeddings, of unit length, of
    its image and of that image's neighbours; centers: for each partition its centroids (K, D), of unit length, at least
    one partition. With q = the mean over the n of softmax(member . centers / target_temperature), p =
    softmax(embedding . centers / temperature): the mean over rows and partitions of -sum_k q_k log p_k, a scalar,
    float32 (float64 for float64 input). Raises ValueError for shapes that do not fit.
    """
    if embeddings.dim() != 2 or members.dim() != 3 or members[:, 0].shape != embeddings.shape or not centers:
        raise ValueError("embeddings must be (B, D) with members (B, n, D) and centers [(K, D), ...], got "
                         f"{tuple(embeddings.shape)}, {tuple(members.shape)} and {len(centers)}")  # fmt: skip
    with torch.autocast(embeddings.device.type, enabled=False):
        x = as_float(embeddings)
        losses = []
        for one in centers:
            target = F.softmax(members @ one.T / target_temperature, dim=2).mean(1)  # (B, K)
            losses.append(-(target * F.log_softmax(x @ one.T / temperature, dim=1)).sum(1).mean())
        return torch.stack(losses).mean()


def partition_sizes(count: int, cluster_sizes: Sequence[int]) -> list[int]:
    """How many clusters: for N images and every mean number of images a cluster, at least 2, none twice."""
    return sorted({max(2, count // size) for size in cluster_sizes})


class SoftCentersStep(nn.Module):
    """`soft_center_loss` of a batch, by what the network made of all training images at the start of the epoch."""

    def __init__(
        self, model: Any, count: int, cluster_sizes: Sequence[int], *, temperature: float = 0.1,
        target_temperature: float = 0.05, neighbors: int = 4, weight: float = 1.0, processes: Processes = ALONE,
    ) -> None:  # fmt: skip
        """count: N, of the training images; neighbors: how many of each image share in its soft assignment."""
        super().__init__()
        self.model, self.weight, self.processes = model, weight, processes
        self.temperature, self.target_temperature = temperature, target_temperature
        self.partitions = partition_sizes(count, cluster_sizes)
        self.register_buffer("memory", torch.zeros(count, model.low_dim))
        self.register_buffer("members", torch.zeros(count, 1 + min(neighbors, count - 1), dtype=torch.int64))
        self.register_buffer("centers", torch.zeros(sum(self.partitions), model.low_dim))

    def find(self, space: Tensor, seed: int, engine: str, max_iter: int, memory_mb: float) -> tuple[Tensor, ...]:
        """For `begin_epoch` from embeddings (N, D) of unit length: memory, members and centers.

        Raises ValueError where there are fewer distinct embeddings than clusters, ImportError as `clustering.kmeans`.
        """
        members = torch.arange(len(space), device=space.device)[:, None]
        others = self.members.shape[1] - 1
        if others:
            members = torch.cat([members, search.nearest_neighbors(space, others, memory_mb=memory_mb)[1]], 1)
        found = [clustering.kmeans(space, k, max_iter=max_iter, seed=seed, engine=engine)[1] for k in self.partitions]
        return space, members, F.normalize(torch.cat(found), dim=1)

    def begin_epoch(self, memory: Tensor, members: Tensor, centers: Tensor) -> None:
        """Remember what `find` gave."""
        for own, new in ((self.memory, memory), (self.members, members), (self.centers, centers)):
            own.copy_(new)

    def forward(self, inputs: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Two views of images (2m, 3, H, W), their numbers (m,): "loss", with a gradient, and its parts."""
        embeddings, images = embed_views(self.model, inputs, images, self.processes)
        members = self.memory[self.members[images]].to(embeddings.dtype)  # (2m, n, D)
        centers = self.centers.to(embeddings.dtype).split(self.partitions)
        loss = soft_center_loss(embeddings, members, centers, self.temperature, self.target_temperature)
        return metric_alone(loss, self.weight)
