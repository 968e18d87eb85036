"""The metric loss of the paper: a softmax over the centers of the clusters in the batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from utils.tensors import as_float


def center_softmax_loss(
    embeddings: Tensor,
    centers: Tensor,
    pseudo_labels: Tensor,
    temperature: float = 0.1,
    alpha: float = 1.0,
    neg_m: int = 1,
) -> Tensor:
    """Pull an embedding to its other view and push it from the centers of other clusters.

    With s = dot product / temperature, x_i' the other view of x_i (detached) and c_j the centers
    (detached), paper section 3.3:
    pos_i = s(x_i, x_i') - log(neg_m * sum over j != y_i of exp s(x_i, c_j)),
    neg_i = neg_m * sum over j != y_i of log(1 - q_ij), where y_i is the cluster of x_i and q_i the
    softmax over the centers in which every other center counts neg_m times. The loss is
    -mean(pos + alpha * neg). With one cluster there is no other center: the pull alone remains.

    Args:
        embeddings: (2m, D) of unit length, first views, then second views in the same order.
        centers: (U, D) of unit length; row j belongs to the j-th smallest label present.
        pseudo_labels: (2m,) integers.

    Returns a scalar, float32 (float64 for float64 input). Raises ValueError for shapes that do not
    fit, and for neg_m below 1.
    """
    n_rows = embeddings.shape[0]
    present = torch.unique(pseudo_labels)
    if embeddings.dim() != 2 or n_rows % 2 or pseudo_labels.shape != (n_rows,):
        raise ValueError(
            "embeddings must be (2m, D) with pseudo_labels (2m,), got "
            f"{tuple(embeddings.shape)} and {tuple(pseudo_labels.shape)}"
        )
    if centers.shape != (len(present), embeddings.shape[1]):
        raise ValueError(
            f"centers must be ({len(present)}, {embeddings.shape[1]}), a row for each label "
            f"present; got {tuple(centers.shape)}"
        )
    if neg_m < 1:
        raise ValueError(f"neg_m must be at least 1, got {neg_m}")
    with torch.autocast(embeddings.device.type, enabled=False):
        x = as_float(embeddings)
        c = as_float(centers.detach())
        pos = (x * x.detach().roll(n_rows // 2, 0)).sum(1) / temperature  # (2m,)
        if len(present) == 1:
            return -pos.mean()
        target = torch.searchsorted(present, pseudo_labels).unsqueeze(1)  # (2m, 1)
        s = x @ c.t() / temperature  # (2m, U)
        weighted, _, neg = push(s, target, neg_m)
        log_sum_others = torch.logsumexp(weighted.scatter(1, target, -torch.inf), 1)  # (2m,)
        return -(pos - log_sum_others + alpha * neg).mean()


def push(s: Tensor, target: Tensor, neg_m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the part of a softmax loss that pushes rows from all columns but their target.

    Let q be the softmax over the columns in which every column but the target counts neg_m times.

    Args:
        s: (B, U) scores, -inf where a column does not count.
        target: (B, 1), the column that each row belongs to.

    Returns the logs of the terms in the denominator of q (B, U), the log of their sum (B, 1), and
    neg_m * sum over the other columns of log(1 - q) (B,).
    """
    weighted = (s + math.log(neg_m)).scatter(1, target, s.gather(1, target))
    log_sum_all = torch.logsumexp(weighted, 1, keepdim=True)
    log_q = (s - log_sum_all).scatter(1, target, -torch.inf)
    neg = torch.zeros_like(log_sum_all).squeeze(1)
    if neg_m == 1:
        # log(1 - q) cancels where q is near 1, which only the largest q can be: sum the rest
        # instead
        top = s.argmax(1, keepdim=True)
        rest = torch.logsumexp(weighted.scatter(1, top, -torch.inf), 1)
        neg = torch.where((top == target).squeeze(1), 0.0, rest - log_sum_all.squeeze(1))
        log_q = log_q.scatter(1, top, -torch.inf)
    return weighted, log_sum_all, neg_m * (neg + torch.log1p(-log_q.exp()).sum(1))
