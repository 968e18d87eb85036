"""The metric loss: a softmax over the centres of the clusters in the batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def center_softmax_loss(
    embeddings: Tensor,
    centers: Tensor,
    pseudo_labels: Tensor,
    temperature: float = 0.1,
    alpha: float = 1.0,
    neg_m: int = 1,
) -> Tensor:
    """Centre-based softmax loss: near to the other view, far from the centres of other clusters (paper section 3.3).

    embeddings: (2m, D) of unit length, first views then second views in the same order. centers: (U, D) of unit length,
    row j for the j-th smallest label present. pseudo_labels: (2m,) integers. With s = dot product / temperature:
    pos_i = s(x_i, x_i') - log(neg_m * sum over j != own(i) of exp s(x_i, c_j)), x_i' the other view, detached;
    neg_i = neg_m * sum over j != own(i) of log(1 - q_ij), q_i the softmax over the centres in which every sum over
    other clusters counts neg_m times. Returns -mean(pos + alpha * neg), a scalar, float32 (float64 for float64 input);
    gradients flow through `embeddings` alone. One cluster only: no other centre to push from, both sums over others
    are left out and the pull to the other view remains.
    Raises ValueError for shapes that do not fit and neg_m below 1.
    """
    rows, present = embeddings.shape[0], torch.unique(pseudo_labels)
    if embeddings.dim() != 2 or rows % 2 or pseudo_labels.shape != (rows,):
        raise ValueError(
            f"embeddings must be (2m, D) with pseudo_labels (2m,), got {tuple(embeddings.shape)} and "
            f"{tuple(pseudo_labels.shape)}"
        )
    if neg_m < 1:
        raise ValueError(f"neg_m must be at least 1, got {neg_m}")
    if centers.shape != (len(present), embeddings.shape[1]):
        raise ValueError(
            f"centers must be ({len(present)}, {embeddings.shape[1]}), a row for each label present; "
            f"got {tuple(centers.shape)}"
        )
    with torch.autocast(embeddings.device.type, enabled=False):
        x, c = (t if embeddings.dtype == torch.float64 else t.float() for t in (embeddings, centers.detach()))
        pos = (x * x.detach().roll(rows // 2, 0)).sum(1) / temperature  # (2m,), the other view is m rows away
        if len(present) == 1:
            return -pos.mean()
        own = torch.searchsorted(present, pseudo_labels).unsqueeze(1)  # (2m, 1), column of the own centre
        s = x @ c.t() / temperature  # (2m, U)
        weighted, _, neg = push(s, own, neg_m)
        log_sum_others = torch.logsumexp(weighted.scatter(1, own, -torch.inf), 1)  # (2m,)
        return -(pos - log_sum_others + alpha * neg).mean()


def push(s: Tensor, own: Tensor, neg_m: int) -> tuple[Tensor, Tensor, Tensor]:
    """The part of a softmax loss that pushes a row from all columns but its own one.

    s: (B, U), of -inf where a column does not count; own: (B, 1), the own column; at least one other counts. With q the
    softmax over the columns in which every other column counts neg_m times, returns the logs of the terms of its
    denominator (B, U), the log of their sum (B, 1) and neg_m * sum over the others of log(1 - q) (B,).
    """
    weighted = (s + math.log(neg_m)).scatter(1, own, s.gather(1, own))
    log_sum_all = torch.logsumexp(weighted, 1, keepdim=True)
    log_q = (s - log_sum_all).scatter(1, own, -torch.inf)
    neg = torch.zeros_like(log_sum_all).squeeze(1)
    if neg_m == 1:
        # only the largest q can come near 1, where log(1 - q) cancels: take it as a sum over the rest instead
        top = s.argmax(1, keepdim=True)
        rest = torch.logsumexp(weighted.scatter(1, top, -torch.inf), 1)
        neg = torch.where((top == own).squeeze(1), 0.0, rest - log_sum_all.squeeze(1))
        log_q = log_q.scatter(1, top, -torch.inf)
    return weighted, log_sum_all, neg_m * (neg + torch.log1p(-log_q.exp()).sum(1))
