"""One training step of CBSwR: from a batch of two views to its three losses (paper section 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from losses.center_softmax import center_softmax_loss
from losses.instance_softmax import instance_softmax_loss
from losses.reconstruction import cluster_means, reconstruction_loss
from losses.rim import rim_loss
from utils.distributed import ALONE, Processes

# name -> loss of (embeddings (2m, D), centers (U, D), pseudo_labels (2m,), temperature, alpha, neg_m), a scalar
METRIC_LOSSES: dict[str, Callable[..., Tensor]] = {
    "center": center_softmax_loss,
    "instance": lambda embeddings, centers, labels, *settings: instance_softmax_loss(embeddings, *settings),
}


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
    metric_loss: str = "center",
    processes: Processes = ALONE,
) -> dict[str, Tensor]:
    """Losses of a stacked two-view batch: inputs (2m, 3, H, W), first views then second views.

    pseudo_labels: (m,) a label per image (or (2m,), the same for both views); None takes the argmax of the cluster
    head on the first view. Returns scalars "metric", "rim", "reconstruction" and "pseudo_labels" (m,).
    The centroids (mean feature map of a label's rows in both views) reach the metric loss detached and the decoder
    with their gradient. metric_loss: a name of METRIC_LOSSES. Raises ValueError for shapes that do not fit.

    processes: inputs and pseudo_labels are this process's share of a batch of m images, for which every process
    computes the same losses and "pseudo_labels" (m,). The backbone runs on the share; the heads and the decoder, little
    work beside it, run on the whole batch in every process.
    """
    rows = inputs.shape[0]
    if rows < 2 or rows % 2:
        raise ValueError(f"inputs must hold two views of each image, an even number of rows; got {rows}")
    if pseudo_labels is not None and pseudo_labels.shape not in {(rows // 2,), (rows,)}:
        raise ValueError(f"pseudo_labels must be ({rows // 2},), a label per image, got {tuple(pseudo_labels.shape)}")
    maps = model.maps(inputs)  # of each pooled layer (2m / processes, C, h, w)
    embedding = model.embed(processes.gather_views(model.pool(*maps)))  # (2m, D)
    cluster_logits = model.cluster(embedding)  # (2m, K)
    images = len(embedding) // 2
    if pseudo_labels is None:
        # those of one process: where the last bit decides, two GPUs may differ
        labels = processes.from_first_tensor(cluster_logits.detach()[:images].argmax(1)).repeat(2)
    else:
        labels = pseudo_labels if len(pseudo_labels) == rows else pseudo_labels.repeat(2)
        labels = processes.gather_views(labels)  # (2m,)
    _, cluster, counts = torch.unique(labels, return_inverse=True, return_counts=True)  # (2m,), (U,)
    own = processes.own_views(cluster)  # (2m / processes,)
    centroids = [processes.sum(cluster_means(one, own, counts)) for one in maps]  # (U, C, h, w) each
    centers = model.embed(model.pool(*(one.detach() for one in centroids))).detach()  # (U, D)
    # equal centroids give equal images: decode each once, let batch norm count it as often as it stands for a row
    decoded = model.decoder(centroids[-1], size=inputs.shape[-2:], counts=counts)  # (U, 3, H, W)
    reconstruction = decoded.index_select(0, own)  # (.., 3, H, W); decoded[own] adds gradients in random order
    target = model.reconstruction_target(inputs, recon_target)
    return {
        "metric": METRIC_LOSSES[metric_loss](embedding, centers, labels, temperature, alpha, neg_m),
        "rim": rim_loss(cluster_logits, mu),
        "reconstruction": processes.mean(reconstruction_loss(reconstruction, target)),
        "pseudo_labels": labels[:images],
    }


def total_loss(
    losses: dict[str, Tensor], metric: float = 0.9, rim: float = 0.3, reconstruction: float = 0.001
) -> Tensor:
    """The weighted sum that is minimised; a loss of weight zero is left out, finite or not."""
    weights = {"metric": metric, "rim": rim, "reconstruction": reconstruction}
    return sum((weight * losses[name] for name, weight in weights.items() if weight), torch.zeros(()).to(losses["rim"]))


class TrainingStep(nn.Module):
    """`cbswr_losses` and their weighted sum as a module, which DistributedDataParallel can wrap whole.

    weights: of the metric, the clustering and the reconstruction loss. settings: those of `cbswr_losses`.
    """

    def __init__(
        self, model: nn.Module, weights: tuple[float, float, float] = (0.9, 0.3, 0.001), **settings: Any
    ) -> None:
        super().__init__()
        self.model, self.weights, self.settings = model, weights, settings

    def forward(self, inputs: Tensor, pseudo_labels: Tensor | None = None) -> dict[str, Tensor]:
        """The result of `cbswr_losses` with their sum, "loss", the only one with a gradient."""
        losses = cbswr_losses(self.model, inputs, pseudo_labels, **self.settings)
        return {name: value.detach() for name, value in losses.items()} | {"loss": total_loss(losses, *self.weights)}
