"""The reconstruction loss, and the centroids that are reconstructed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from utils.tensors import as_float


def cluster_means(rows: Tensor, cluster: Tensor, counts: Tensor) -> Tensor:
    """Average the rows of each cluster, differentiable in `rows`.

    Where the rows are a part of those that `counts` counts, the results of all parts add up to the
    means.

    Args:
        rows: (B, ...).
        cluster: (B,), numbers from 0 to U - 1.
        counts: (U,), the sizes of the clusters.

    Returns (U, ...) in float32 (float64 for float64 rows).
    """
    wide = as_float(rows)
    weight = F.one_hot(cluster, len(counts)).T.to(wide) / counts[:, None]  # (U, B)
    with torch.autocast(rows.device.type, enabled=False):
        return (weight @ wide.flatten(1)).view(len(counts), *rows.shape[1:])


def reconstruction_loss(reconstruction: Tensor, inputs: Tensor) -> Tensor:
    """Return the mean squared error of reconstructions (paper section 3.4).

    Args:
        reconstruction, inputs: (B, 3, H, W).

    Returns a scalar, float32 (float64 for float64 input). Raises ValueError if the shapes differ.
    """
    if reconstruction.shape != inputs.shape:
        raise ValueError(f"shapes differ: {tuple(reconstruction.shape)} and {tuple(inputs.shape)}")
    with torch.autocast(inputs.device.type, enabled=False):
        return F.mse_loss(as_float(reconstruction), as_float(inputs))
