"""A closed-form start of the embedding head: PCA or whitening of the pooled features of the training images."""

from __future__ import annotations

import torch
from torch import Tensor

from models.cbswr import CBSwR
from utils.errors import UserError

SMALLEST = 1e-5  # of the largest singular value; directions below it are noise


def check_directions(low_dim: int, available: int, images: int, channels: int) -> None:
    """Raise UserError where low_dim is more than the `available` directions of pooled features (images, channels)."""
    if low_dim > available:
        more = ", or pool more layers" if available == channels else ""
        raise UserError(f"--low_dim {low_dim}: the pooled features of {images} images have {available} directions of "
                        f"{channels} only; give at most {available}{more}")  # fmt: skip


@torch.no_grad()
def closed_form_head(
    pooled: Tensor, low_dim: int, kind: str, power: float = 0.5, fill: bool = False
) -> tuple[Tensor, Tensor]:
    """The linear map of pooled features (N, C) to low_dim dimensions that needs no labels: weight (D, C), bias (D,).

    "pca": the features minus their mean, along the principal directions. "whiten": the same, each direction divided by
    its singular value to the power of `power`, by default half of the way from PCA (0) to whitening (1): directions
    that all images share weigh less than their variance has them, noise less than whitening would.

    Both float32, computed in float64 from the covariance and scaled so that the rows of the result have a mean square
    length of 1; the sign of a direction is that of its largest weight. The first d rows are, but for their length, the
    head for d dimensions. Where the features have fewer than low_dim directions of their own, the rows beyond them are
    zeros with `fill`, and without it UserError is raised.
    """
    x = pooled.double().cpu()
    mean = x.mean(0)
    squares, directions = torch.linalg.eigh((x - mean).T @ (x - mean))  # ascending
    singular = squares.clamp(min=0).sqrt().flip(0)
    available = int((singular > SMALLEST * singular[0]).sum())
    if not fill:
        check_directions(low_dim, available, *x.shape)
    own = min(low_dim, available)
    weight = directions.T.flip(0)[:own]  # (D, C)
    if kind == "whiten":
        weight = weight / singular[:own, None] ** power
    weight = weight * weight.gather(1, weight.abs().argmax(1, keepdim=True)).sign()
    weight = weight / ((x - mean) @ weight.T).square().sum(1).mean().sqrt()
    weight = torch.cat([weight, weight.new_zeros(low_dim - own, weight.shape[1])])
    return weight.float(), -(weight @ mean).float()


@torch.no_grad()
def start_head(model: CBSwR, weight: Tensor, bias: Tensor) -> None:
    """Give the embedding head of `model` its closed form, see `closed_form_head`."""
    model.feat_ext[0].weight.copy_(weight)
    model.feat_ext[0].bias.copy_(bias)
