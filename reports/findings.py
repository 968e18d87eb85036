"""What a network makes of images: ranks, clusters, reconstructions, a map. Numbers only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.manifold import TSNE
from torch import Tensor
from torch.nn import functional as F

from models import CBSwR
from utils.clustering import kmeans
from utils.progress import progress

NEAR_CENTROID = 10  # images shown of a cluster
MOST_MEMBERS = 60  # that a cluster opens
CENTROIDS = 8  # reconstructed
BESIDE_CENTROID = 5  # images beside a reconstruction
PERPLEXITY = 30


@dataclass(frozen=True)
class Cluster:
    """Some images of a cluster, nearest to its centroid first: those shown, and more."""

    rows: list[int]
    more: list[int]
    size: int
    example: int  # an image of the class that is most frequent in the cluster
    purity: float  # share of the cluster that is of this class


@dataclass(frozen=True)
class Clusters:
    """Some clusters of a clustering, the sizes of all, and the purity of the whole."""

    shown: list[Cluster]
    sizes: list[int]
    purity: float


@dataclass(frozen=True)
class Reconstruction:
    """The decoded centroid of a cluster, and the images nearest to it; all uint8 RGB."""

    image: np.ndarray  # (H, W, 3)
    nearest: np.ndarray  # (n, H, W, 3)
    size: int


def first_hit_ranks(
    embeddings: Tensor, labels: Tensor, queries: Tensor, gallery: Tensor, memory_mb: float
) -> Tensor:
    """Return the rank, from 1, of the nearest other image of the same class; 0 if there is none.

    Args:
        embeddings: (N, D); labels: (N,).
        queries: (Q,) the rows that search, whose ranks (Q,) are returned.
        gallery: (N,) bool, the rows that are searched.
        memory_mb: that a block of distances takes, in MiB.
    """
    block_size = max(1, int(memory_mb * 2**20 / (16 * len(embeddings))))
    ranks = []
    for rows in queries.split(block_size):
        distances = torch.cdist(embeddings[rows], embeddings)  # (B, N)
        distances[torch.arange(len(rows)), rows] = torch.inf
        distances[:, ~gallery] = torch.inf
        is_other = labels[rows, None] != labels
        nearest = distances.masked_fill(is_other, torch.inf).amin(1, keepdim=True)
        places = 1 + (distances < nearest).sum(1)
        ranks.append(places.masked_fill(nearest[:, 0] == torch.inf, 0))
    return torch.cat(ranks)


def clusters(embeddings: Tensor, labels: Tensor, k: int, n_shown: int, seed: int) -> Clusters:
    """Cluster embeddings (N, D) by k-means, as for the NMI.

    The clusters shown lead at even steps from the purest to the least pure and, where they are
    equally pure, from the largest to the smallest.
    """
    assignments, centroids, _ = kmeans(embeddings, min(k, len(embeddings)), seed=seed)
    distances = (embeddings - centroids[assignments]).norm(dim=1)
    listed = []
    for number in assignments.unique():
        rows = (assignments == number).nonzero().flatten()
        present, counts = labels[rows].unique(return_counts=True)
        example = rows[labels[rows] == present[counts.argmax()]][0]
        near = rows[distances[rows].argsort(stable=True)[:MOST_MEMBERS]].tolist()
        first, more = near[:NEAR_CENTROID], near[NEAR_CENTROID:]
        share = int(counts.max()) / len(rows)
        listed.append(Cluster(first, more, len(rows), int(example), share))
    listed.sort(key=lambda cluster: (-cluster.purity, -cluster.size))
    purity = sum(cluster.purity * cluster.size for cluster in listed) / len(embeddings)
    shown = [listed[step] for step in even_steps(len(listed), n_shown)]
    return Clusters(shown, [cluster.size for cluster in listed], purity)


def even_steps(count: int, n_steps: int) -> list[int]:
    """Return at most `n_steps` different places from 0 to count - 1 at even steps."""
    steps = np.linspace(0, count - 1, min(n_steps, count))
    return np.unique(steps.round().astype(int)).tolist()


@torch.inference_mode()
def reconstructions(
    model: CBSwR, crops: Tensor, batch_size: int, by_kmeans: bool, target: str, seed: int
) -> list[Reconstruction]:
    """Decode the mean feature maps of the largest clusters of uint8 RGB crops (N, H, W, 3).

    Args:
        by_kmeans: cluster the pooled features; otherwise the cluster head decides.
        target: what the decoder was trained for (see `CBSwR.reconstructed_pixels`).
    """
    device = next(model.parameters()).device
    outputs = []
    for batch in progress(crops.split(batch_size), "reconstructions"):
        embedding, cluster_logits, feature_map = model(model.normalization(batch.to(device)))
        outputs.append((feature_map.half().cpu(), embedding.cpu(), cluster_logits.argmax(1).cpu()))
    feature_maps, embeddings, labels = map(torch.cat, zip(*outputs, strict=True))
    if by_kmeans:
        pooled = F.normalize(feature_maps.float().mean((2, 3)), dim=1)
        labels, _, _ = kmeans(pooled, min(model.n_cluster, len(pooled)), seed=seed)
    decoded = []
    for rows in _largest(labels):
        centroid = feature_maps[rows].float().mean(0, keepdim=True).to(device)
        image = model.decoder(centroid, tuple(crops.shape[1:3]))
        similarities = embeddings[rows] @ embeddings[rows].mean(0)
        near = rows[similarities.argsort(descending=True, stable=True)[:BESIDE_CENTROID]]
        pixels = model.reconstructed_pixels(image, target)[0].cpu().numpy()
        decoded.append(Reconstruction(pixels, crops[near].numpy(), len(rows)))
    return decoded


def _largest(labels: Tensor) -> list[Tensor]:
    """Return the rows of each of the largest clusters, the largest first."""
    present, sizes = labels.unique(return_counts=True)
    largest = present[sizes.argsort(descending=True, stable=True)[:CENTROIDS]]
    return [(labels == label).nonzero().flatten() for label in largest]


def map_places(embeddings: Tensor, rows: np.ndarray) -> tuple[list[int], np.ndarray] | None:
    """Map some rows of embeddings (N, D) by t-SNE.

    Returns the rows (n,), ascending, and their places (n, 2), or None if the rows are too few or
    all the same.
    """
    rows = np.sort(rows)
    points = embeddings[rows].numpy()
    if len(rows) < 3 or np.ptp(points, axis=0).max() < 1e-6:
        return None
    perplexity = min(PERPLEXITY, (len(rows) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=0)
    return rows.tolist(), tsne.fit_transform(points)


def apart(places: np.ndarray, distance: float) -> list[int]:
    """Return numbers of places (n, 2), as many as come in their order, no two nearer than that.

    Nearness is that of squares: the larger of the two differences.
    """
    chosen: list[int] = []
    for number, place in enumerate(places):
        if not chosen or np.abs(places[chosen] - place).max(1).min() >= distance:
            chosen.append(number)
    return chosen
