"""A softmax over the centroids of partitions of the whole training set, with soft targets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from utils.tensors import as_float


def soft_center_loss(
    embeddings: Tensor,
    members: Tensor,
    partitions: Sequence[Tensor],
    temperature: float,
    target_temperature: float,
) -> Tensor:
    """Compute the cross-entropy of embeddings' softmax over centroids with soft assignments.

    For a partition with centroids c: q = mean over the n members of
    softmax(member . c / target_temperature), p = softmax(embedding . c / temperature). The loss is
    the mean, over rows and partitions, of the cross-entropy -sum_k q_k log p_k.

    Args:
        embeddings: (B, D) of unit length.
        members: (B, n, D) of unit length, for each row the remembered embeddings of its image and
            of neighbors of that image.
        partitions: centroids (K, D) of unit length of each partition, at least one.

    Returns a scalar, float32 (float64 for float64 input). Raises ValueError for shapes that do not
    fit.
    """
    fits = members.dim() == 3 and members[:, 0].shape == embeddings.shape
    if embeddings.dim() != 2 or not fits or not partitions:
        raise ValueError(
            "embeddings must be (B, D) with members (B, n, D) and at least one partition, got "
            f"{tuple(embeddings.shape)}, {tuple(members.shape)} and {len(partitions)}"
        )
    with torch.autocast(embeddings.device.type, enabled=False):
        x = as_float(embeddings)
        losses = []
        for centers in partitions:
            q = F.softmax(members @ centers.T / target_temperature, dim=2).mean(1)  # (B, K)
            log_p = F.log_softmax(x @ centers.T / temperature, dim=1)  # (B, K)
            losses.append(-(q * log_p).sum(1).mean())
        return torch.stack(losses).mean()
