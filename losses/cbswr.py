"""One training step of CBSwR: from a batch of two views to its three losses (paper section 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from losses.center_softmax import center_softmax_loss
from losses.reconstruction import cluster_means, reconstruction_loss
from losses.rim import rim_loss


def cbswr_losses(
    model: Any,
    inputs: Tensor,
    pseudo_labels: Tensor | None = None,
    *,
    temperature: float = 0.1,
    alpha: float = 1.0,
    mu: float = 1.0,
    neg_m: int = 1,
    recon_target: str = "input",
) -> dict[str, Tensor]:
    """Losses of a stacked two-view batch: inputs (2m, 3, H, W), first views then second views.

    pseudo_labels: (m,) a label per image (or (2m,), the same for both views); None takes the argmax of the cluster
    head on the first view. Returns scalars "metric", "rim", "reconstruction" and "pseudo_labels" (m,).
    The centroids (mean feature map of a label's rows in both views) reach the metric loss detached and the decoder
    with their gradient. Raises ValueError for shapes that do not fit.
    """
    rows = inputs.shape[0]
    images = rows // 2
    if rows < 2 or rows % 2:
        raise ValueError(f"inputs must hold two views of each image, an even number of rows; got {rows}")
    embedding, cluster_logits, feature_map = model(inputs)
    if pseudo_labels is None:
        pseudo_labels = cluster_logits.detach()[:images].argmax(1)
    elif pseudo_labels.shape not in {(images,), (rows,)}:
        raise ValueError(f"pseudo_labels must be ({images},), a label per image, got {tuple(pseudo_labels.shape)}")
    labels = pseudo_labels if len(pseudo_labels) == rows else pseudo_labels.repeat(2)  # (2m,)
    _, cluster, counts = torch.unique(labels, return_inverse=True, return_counts=True)  # (2m,), (U,)
    centroids = cluster_means(feature_map, cluster, counts)  # (U, C, h, w)
    centers = model.embed(model.pool(centroids.detach())).detach()  # (U, D)
    # equal centroids give equal images: decode each once, let batch norm count it as often as it stands for a row
    decoded = model.decoder(centroids, size=inputs.shape[-2:], counts=counts)  # (U, 3, H, W)
    reconstruction = decoded.index_select(0, cluster)  # (2m, 3, H, W); decoded[cluster] adds gradients in random order
    target = model.reconstruction_target(inputs, recon_target)
    return {
        "metric": center_softmax_loss(embedding, centers, labels, temperature, alpha, neg_m),
        "rim": rim_loss(cluster_logits, mu),
        "reconstruction": reconstruction_loss(reconstruction, target),
        "pseudo_labels": labels[:images],
    }


def total_loss(
    losses: dict[str, Tensor], metric: float = 0.9, rim: float = 0.3, reconstruction: float = 0.001
) -> Tensor:
    """The weighted sum that is minimised; a loss of weight zero is left out, finite or not."""
    weights = {"metric": metric, "rim": rim, "reconstruction": reconstruction}
    return sum((weight * losses[name] for name, weight in weights.items() if weight), torch.zeros(()).to(losses["rim"]))
