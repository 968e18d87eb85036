"""The clustering loss: regularised information maximisation on the cluster head."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rim_loss(cluster_logits: Tensor, mu: float = 1.0) -> Tensor:
    """L_rim = H(Y|X) + 1 - mu * H(Y): sure about each image, balanced over the batch (paper section 3.2).

    cluster_logits: (B, K), unit length; p = softmax over K. Returns a scalar, float32 (float64 for float64 input).
    H(Y|X) = -sum p log p / (B log B), divided by the log of the BATCH size as the released code does;
    H(Y) = -sum pbar log pbar / log K with pbar the batch mean of p. A term whose log is zero (B = 1 or K = 1) is zero.
    Raises ValueError for a wrong shape.
    """
    if cluster_logits.dim() != 2 or 0 in cluster_logits.shape:
        raise ValueError(f"cluster_logits must be (B, K) and not empty, got {tuple(cluster_logits.shape)}")
    batch, n_cluster = cluster_logits.shape
    with torch.autocast(cluster_logits.device.type, enabled=False):
        logits = cluster_logits if cluster_logits.dtype == torch.float64 else cluster_logits.float()
        log_p = torch.log_softmax(logits, 1)  # (B, K)
        conditional = -(log_p.exp() * log_p).sum() / (batch * (math.log(batch) or 1.0))
        log_mean = torch.logsumexp(log_p, 0) - math.log(batch)  # (K,), log of the batch mean of p
        marginal = -(log_mean.exp() * log_mean).sum() / (math.log(n_cluster) or 1.0)
        return conditional + 1 - mu * marginal
