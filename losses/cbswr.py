"""The three losses of CBSwR for a batch of two views (paper, section 3)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from losses.center_softmax import center_softmax_loss
from losses.instance_softmax import instance_softmax_loss
from losses.reconstruction import cluster_means, reconstruction_loss
from losses.rim import rim_loss
from utils.distributed import ALONE, Processes


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
    softmax_over: str = "centers",
    reconstruct: bool = True,
    processes: Processes = ALONE,
) -> dict[str, Tensor]:
    """Compute the losses of a batch of m images in two views.

    The centroid of a label, the mean feature map of its rows in both views, reaches the metric loss
    detached and the decoder with its gradient.

    Args:
        model: a `models.CBSwR`.
        inputs: (2m, 3, H, W), first views, then second views in the same order.
        pseudo_labels: (m,) a label for each image, or (2m,); None takes the argmax of the cluster
            head on the first view.
        temperature, alpha, neg_m: of the metric loss.
        mu: of the clustering loss.
        recon_target: see `CBSwR.reconstruction_target`.
        softmax_over: "centers" of the batch's clusters, or "images" (the instance softmax).
        reconstruct: False leaves the decoder alone; its loss is 0 then.
        processes: each process brings its share of the batch, and all compute the losses of the
            whole batch. The backbone runs on the share; heads and decoder on the whole batch.

    Returns scalars "metric", "rim", "reconstruction", and "pseudo_labels" (m,). Raises ValueError
    for shapes that do not fit.
    """
    n_rows = inputs.shape[0]
    if n_rows < 2 or n_rows % 2:
        raise ValueError(f"inputs must hold two views of each image, got {n_rows} rows")
    if pseudo_labels is not None and pseudo_labels.shape not in {(n_rows // 2,), (n_rows,)}:
        raise ValueError(
            f"pseudo_labels must be ({n_rows // 2},), got {tuple(pseudo_labels.shape)}"
        )
    maps = model.maps(inputs)  # of each pooled layer (2m / processes, C, h, w)
    embedding = model.embed(processes.gather_views(model.pool(maps)))  # (2m, D)
    cluster_logits = model.cluster(embedding)  # (2m, K)
    labels = _labels_of_rows(pseudo_labels, cluster_logits, processes)  # (2m,)
    _, cluster, counts = labels.unique(return_inverse=True, return_counts=True)  # (2m,), (U,)
    local_cluster = processes.local_views(cluster)  # (2m / processes,)
    centroids = [
        processes.sum(cluster_means(feature_map, local_cluster, counts)) for feature_map in maps
    ]  # (U, C, h, w) each

    if softmax_over == "images":
        metric = instance_softmax_loss(embedding, temperature, alpha, neg_m)
    else:
        detached = [centroid.detach() for centroid in centroids]
        centers = model.embed(model.pool(detached)).detach()  # (U, D)
        metric = center_softmax_loss(embedding, centers, labels, temperature, alpha, neg_m)

    reconstruction = metric.new_zeros(())
    if reconstruct:
        # equal centroids give equal images: decode each once, and count it in batch norm as often
        decoded = model.decoder(centroids[-1], size=inputs.shape[-2:], counts=counts)
        decoded = decoded.index_select(0, local_cluster)  # (2m / processes, 3, H, W)
        target = model.reconstruction_target(inputs, recon_target)
        reconstruction = processes.mean(reconstruction_loss(decoded, target))
    return {
        "metric": metric,
        "rim": rim_loss(cluster_logits, mu),
        "reconstruction": reconstruction,
        "pseudo_labels": labels[: len(labels) // 2],
    }


def _labels_of_rows(
    pseudo_labels: Tensor | None, cluster_logits: Tensor, processes: Processes
) -> Tensor:
    """Return the label of each row (2m,) of the whole batch: given, or by the cluster head."""
    n_rows = len(cluster_logits)
    if pseudo_labels is None:
        argmax = cluster_logits.detach()[: n_rows // 2].argmax(1)
        # where the last bit decides, two GPUs may differ
        return processes.labels_from_first(argmax).repeat(2)
    is_of_images = 2 * len(pseudo_labels) * processes.world_size == n_rows
    return processes.gather_views(pseudo_labels.repeat(2) if is_of_images else pseudo_labels)


def total_loss(
    losses: dict[str, Tensor],
    metric: float = 0.9,
    rim: float = 0.3,
    reconstruction: float = 0.001,
) -> Tensor:
    """Return the weighted sum of the losses; a loss of weight zero is left out, finite or not."""
    weights = {"metric": metric, "rim": rim, "reconstruction": reconstruction}
    weighted = [weight * losses[name] for name, weight in weights.items() if weight]
    return sum(weighted, losses["rim"].new_zeros(()))
