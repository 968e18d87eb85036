"""The clustering loss: regularized information maximization on the cluster head."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from utils.tensors import as_float


def rim_loss(cluster_logits: Tensor, mu: float = 1.0) -> Tensor:
    """Reward assignments that are certain for each image and balanced over the batch.

    With p = softmax of the logits: L = H(Y|X) + 1 - mu * H(Y) (paper section 3.2).
    H(Y|X) = -sum p log p / (B log B), divided by the log of the BATCH size as in the released code;
    H(Y) = -sum pbar log pbar / log K, pbar the batch mean of p. A term whose divisor is zero
    (B = 1 or K = 1) is not divided.

    Args:
        cluster_logits: (B, K) of unit length.

    Returns a scalar, float32 (float64 for float64 input). Raises ValueError for another shape.
    """
    if cluster_logits.dim() != 2 or 0 in cluster_logits.shape:
        raise ValueError(f"cluster_logits must be (B, K), got {tuple(cluster_logits.shape)}")
    batch, n_cluster = cluster_logits.shape
    with torch.autocast(cluster_logits.device.type, enabled=False):
        log_p = torch.log_softmax(as_float(cluster_logits), 1)  # (B, K)
        conditional = -(log_p.exp() * log_p).sum() / (batch * (math.log(batch) or 1.0))
        log_mean = torch.logsumexp(log_p, 0) - math.log(batch)  # (K,)
        marginal = -(log_mean.exp() * log_mean).sum() / (math.log(n_cluster) or 1.0)
        return conditional + 1 - mu * marginal
