"""The metric loss of the instance softmax baseline: every image of the batch is its own class."""

from __future__ import annotations

import torch
from torch import Tensor

from losses.center_softmax import push
from utils.tensors import as_float


def instance_softmax_loss(
    embeddings: Tensor, temperature: float = 0.1, alpha: float = 1.0, neg_m: int = 1
) -> Tensor:
    """Pull an embedding to its other view and push it from both views of all other images.

    p_i is the softmax of x_i x_j / temperature, x_j detached, over the 2m - 1 rows j != i, in which
    rows of other images count neg_m times. The loss is -mean over i of log p_i(other view) +
    alpha * neg_m * sum over the rows of other images of log(1 - p_ij), as the code released with
    Ye et al., CVPR 2019, computes it (there alpha is 1).

    Args:
        embeddings: (2m, D) of unit length, m > 1, first views, then second views in that order.

    Returns a scalar, float32 (float64 for float64 input). Raises ValueError for shapes that do not
    fit, and for neg_m below 1.
    """
    n_rows = embeddings.shape[0]
    if embeddings.dim() != 2 or n_rows % 2 or n_rows < 4:
        raise ValueError(f"embeddings must be (2m, D), m > 1, got {tuple(embeddings.shape)}")
    if neg_m < 1:
        raise ValueError(f"neg_m must be at least 1, got {neg_m}")
    with torch.autocast(embeddings.device.type, enabled=False):
        x = as_float(embeddings)
        itself = torch.eye(n_rows, dtype=torch.bool, device=x.device)
        s = (x @ x.detach().t() / temperature).masked_fill(itself, -torch.inf)  # (2m, 2m)
        other_view = torch.arange(n_rows, device=x.device).roll(n_rows // 2).unsqueeze(1)  # (2m, 1)
        _, log_sum_all, neg = push(s, other_view, neg_m)
        return -(s.gather(1, other_view).squeeze(1) - log_sum_all.squeeze(1) + alpha * neg).mean()
