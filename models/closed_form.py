"""An embedding head in closed form: PCA or whitening of pooled features, without labels."""

from __future__ import annotations

import torch
from torch import Tensor

from utils.errors import UserError

NOISE = 1e-5  # singular values below this share of the largest one are noise
HEADS = ("pca", "whiten")


@torch.no_grad()
def closed_form_head(
    pooled: Tensor, low_dim: int, kind: str, power: float = 0.5, fill: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the linear map of pooled features (N, C) to D = low_dim dimensions.

    The map subtracts the mean and projects on the principal directions. "whiten" also divides each
    direction by its singular value to the power of `power`: 0 is PCA, 1 whitening. It is scaled so
    that its results have a mean square length of 1; the sign of a direction is that of its largest
    weight. The first d rows are, up to scale, the head for d dimensions.

    Args:
        fill: fill rows with zeros if the features have fewer than D directions.

    Returns weight (D, C) and bias (D,), float32. Raises UserError if the features have fewer than
    D directions, without `fill`.
    """
    x = pooled.double().cpu()
    mean = x.mean(0)
    squares, directions = torch.linalg.eigh((x - mean).T @ (x - mean))  # ascending
    singular = squares.clamp(min=0).sqrt().flip(0)
    n_directions = int((singular > NOISE * singular[0]).sum())
    if n_directions < low_dim and not fill:
        raise UserError(
            f"the pooled features of {len(x)} images have {n_directions} directions, fewer than "
            f"the {low_dim} dimensions of the embedding; give fewer dimensions, or pool more "
            "layers"
        )
    rank = min(low_dim, n_directions)
    weight = directions.T.flip(0)[:rank]  # (rank, C)
    if kind == "whiten":
        weight = weight / singular[:rank, None] ** power
    weight = weight * weight.gather(1, weight.abs().argmax(1, keepdim=True)).sign()
    weight = weight / ((x - mean) @ weight.T).square().sum(1).mean().sqrt()
    weight = torch.cat([weight, weight.new_zeros(low_dim - rank, weight.shape[1])])
    return weight.float(), -(weight @ mean).float()
