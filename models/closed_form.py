"""A closed-form start of the embedding head: PCA or whitening of the pooled features of the training images."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from models.cbswr import CBSwR
from utils.errors import UserError

SMALLEST = 1e-5  # of the largest singular value; directions below it are noise
# of "views", chosen on held-out training classes of Cars196 and of a subset of CUB-200-2011 at 112 px
VIEWS, SHRINKAGE, VIEWS_POWER = 4, 0.1, 0.75


def check_directions(low_dim: int, available: int, images: int, channels: int) -> None:
    """Raise UserError where low_dim is more than the `available` directions of pooled features (images, channels)."""
    if low_dim > available:
        raise UserError(f"--low_dim {low_dim}: the pooled features of {images} images have {available} directions of "
                        f"{channels} only; give at most {available}, pool more layers, or use --head_init "
                        "random")  # fmt: skip


def within_covariance(views: Iterable[Tensor]) -> Tensor:
    """How the features of an image differ between its views: the mean covariance (C, C) within images, float64.

    views: pooled features (N, C) of the same images in two or more random views, one after the other.
    """
    total = squares = count = 0
    for one in views:
        x = one.double().cpu()
        total, squares, count = total + x, squares + x.T @ x, count + 1
    return (squares - total.T @ total / count) / (len(total) * (count - 1))


@torch.no_grad()
def closed_form_head(pooled: Tensor, low_dim: int, kind: str, within: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The linear map of pooled features (N, C) to low_dim dimensions that needs no labels: weight (D, C), bias (D,).

    "pca": the features minus their mean, along the principal directions. "whiten": the same, each direction divided by
    the square root of its singular value, half of the way to whitening: directions that all images share weigh less
    than their variance has them, noise less than whitening would. "views": before that, directions in which the views
    of an image differ are made small, by `within` (see `within_covariance`), shrunk towards its mean by SHRINKAGE, to
    the power of -VIEWS_POWER / 2: linear discriminant analysis with every image a class of its own.

    Both float32, computed in float64 from covariances and scaled so that the rows of the result have a mean square
    length of 1; the sign of a direction is that of its largest weight. Raises UserError where the features have fewer
    than low_dim directions of their own.
    """
    x = pooled.double().cpu()
    mean = x.mean(0)
    scatter = (x - mean).T @ (x - mean)
    first = torch.eye(x.shape[1], dtype=torch.float64)
    if kind == "views":
        variances, directions = torch.linalg.eigh(within)
        variances = (1 - SHRINKAGE) * variances.clamp(min=0) + SHRINKAGE * variances.mean()
        first = directions / variances ** (VIEWS_POWER / 2)
    squares, directions = torch.linalg.eigh(first.T @ scatter @ first)  # ascending
    singular = squares.clamp(min=0).sqrt().flip(0)
    check_directions(low_dim, int((singular > SMALLEST * singular[0]).sum()), *x.shape)
    weight = directions.T.flip(0)[:low_dim]  # (D, C)
    if kind != "pca":
        weight = weight / singular[:low_dim, None].sqrt()
    weight = weight @ first.T
    weight = weight * weight.gather(1, weight.abs().argmax(1, keepdim=True)).sign()
    weight = weight / ((x - mean) @ weight.T).square().sum(1).mean().sqrt()
    return weight.float(), -(weight @ mean).float()


@torch.no_grad()
def start_head(model: CBSwR, weight: Tensor, bias: Tensor) -> None:
    """Give the embedding head of `model` its closed form, see `closed_form_head`."""
    model.feat_ext[0].weight.copy_(weight)
    model.feat_ext[0].bias.copy_(bias)
