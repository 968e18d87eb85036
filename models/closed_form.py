"""An embedding head in closed form, from pooled features without labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from utils.errors import UserError

HEADS = ("svd", "pca", "whiten")
FLOOR = 1e-15  # of all variances, as a share of the mean square length: that of rounding
BLOCK = 1 << 16  # features that are held in double precision
RIDGE = 0.1  # added to all variances, as a share of their mean: few images underestimate small ones


@dataclass(frozen=True)
class Spectrum:
    """The directions in which pooled features (N, C) vary.

    Attributes:
        mean: (C,) that was subtracted.
        variances: (C,) the largest first.
        directions: (C, C) a row each.
    """

    mean: Tensor
    variances: Tensor
    directions: Tensor

    @staticmethod
    def of(pooled: Tensor, centered: bool = True) -> Spectrum:
        """Compute the spectrum of features (N, C), around their mean or around zero."""
        blocks = pooled.split(BLOCK)
        mean = torch.zeros(pooled.shape[1], dtype=torch.float64)
        if centered:
            mean = sum(block.double().cpu().sum(0) for block in blocks) / len(pooled)
        centered_blocks = (block.double().cpu() - mean for block in blocks)
        squares = sum(block.T @ block for block in centered_blocks)
        variances, directions = torch.linalg.eigh(squares / len(pooled))  # ascending
        return Spectrum(mean, variances.clamp(min=0).flip(0), directions.T.flip(0))

    def head(self, low_dim: int, power: float = 0.0) -> tuple[Tensor, Tensor]:
        """Return weight (D, C) and bias (D,) that whiten to a power, see `closed_form_head`."""
        floor = FLOOR * (self.mean.square().sum() + self.variances.sum())
        variances = self.variances + floor  # not zero, though all images be the same
        deviations = (variances + RIDGE * variances.mean()).sqrt()
        scales = deviations[:low_dim] ** -power
        scales = scales / (variances[:low_dim] * scales.square()).sum().sqrt()
        weight = self.directions[:low_dim]
        signs = weight.gather(1, weight.abs().argmax(1, keepdim=True)).sign()
        weight = weight * signs * scales[:, None]
        return weight.float(), -(weight @ self.mean).float()


def head_size(low_dim: int, n_images: int, width: int) -> int:
    """Return the size D of a head on features of width C: low_dim, at most C.

    With n_images <= low_dim it is C: the directions in which no image varies have no order, so
    that none of them may be left out.
    """
    return width if n_images <= low_dim else min(low_dim, width)


@torch.no_grad()
def closed_form_head(
    pooled: Tensor, low_dim: int, kind: str, power: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Return the linear map of pooled features (N, C) to D = low_dim dimensions.

    "svd" projects on the singular directions, which keeps the angles between features (exactly, if
    D = C). "pca" subtracts the mean first and projects on the principal directions. "whiten" also
    divides each direction by its standard deviation to the power of `power`: 0 is PCA, 1 whitening.
    A direction in which no image varies has the standard deviation of the ridge, so that D may
    exceed N (see `head_size`).

    The map is scaled so that its results have a mean square length of 1; the sign of a direction
    is that of its largest weight. The first d rows are, up to scale, the head for d dimensions.

    Returns weight (D, C) and bias (D,), float32. Raises UserError if D exceeds C.
    """
    if low_dim > pooled.shape[1]:
        raise UserError(
            f"the pooled features have {pooled.shape[1]} numbers, fewer than the {low_dim} "
            "dimensions of the embedding; give fewer dimensions, or pool more layers"
        )
    spectrum = Spectrum.of(pooled, centered=kind != "svd")
    return spectrum.head(low_dim, power if kind == "whiten" else 0.0)
