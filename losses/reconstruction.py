"""The reconstruction loss, and the centroids that are reconstructed."""

from __future__ import annotations

import torch
from torch import Tensor


def cluster_means(rows: Tensor, cluster: Tensor, counts: Tensor) -> Tensor:
    """Mean of the rows of each cluster: rows (B, ...), cluster (B,) in 0..U-1, counts (U,) -> (U, ...).

    Summed in float32 (float64 for float64 rows), differentiable in `rows`. Where the rows are a share of those that
    `counts` counts, the results of all shares add up to the means.
    """
    wide = rows if rows.dtype == torch.float64 else rows.float()
    weight = torch.zeros(len(counts), len(rows), dtype=wide.dtype, device=rows.device)
    weight[cluster, torch.arange(len(rows), device=rows.device)] = 1 / counts.to(wide.dtype)[cluster]
    with torch.autocast(rows.device.type, enabled=False):
        return (weight @ wide.flatten(1)).view(len(counts), *rows.shape[1:])


def reconstruction_loss(reconstruction: Tensor, inputs: Tensor) -> Tensor:
    """Mean squared error between reconstructions and targets, both (B, 3, H, W), a scalar (paper section 3.4).

    Computed in float32 (float64 for float64 input). Raises ValueError when the shapes differ.
    """
    if reconstruction.shape != inputs.shape:
        raise ValueError(f"shapes differ: {tuple(reconstruction.shape)} and {tuple(inputs.shape)}")
    with torch.autocast(inputs.device.type, enabled=False):
        wide = torch.promote_types(torch.promote_types(reconstruction.dtype, inputs.dtype), torch.float32)
        return torch.nn.functional.mse_loss(reconstruction.to(wide), inputs.to(wide))
