"""What a network makes of images: neighbours, clusters, reconstructions of centroids, a map. Numbers and rows only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models import CBSwR
from utils.clustering import kmeans
from utils.errors import UserError
from utils.evaluation import NMI_ITERATIONS, NMI_RESTARTS
from utils.search import first_hit_ranks, nearest_neighbors

DEEPEST = 1000  # ranks are counted up to here
NEAR_CENTROID = 10  # images shown of a cluster
CENTROIDS = 8  # reconstructed
BESIDE_CENTROID = 5  # images beside a reconstruction
PERPLEXITY = 30


@dataclass(frozen=True)
class Answer:
    """The neighbours of a query image: their rows, nearest first, and Euclidean distances."""

    query: int
    hits: list[int]
    distances: list[float]
    rank: int | None = None  # of the first image of the query's class, from 1


@dataclass(frozen=True)
class Cluster:
    """Images (rows) of a cluster, nearest to its centroid first; how many it has; its most frequent label's share."""

    rows: list[int]
    size: int
    label: int | None
    purity: float | None


@dataclass(frozen=True)
class Clusters:
    """Some of the clusters of a k-means clustering, the sizes of all, and the purity of the whole."""

    shown: list[Cluster]
    sizes: list[int]
    purity: float | None


@dataclass(frozen=True)
class Reconstruction:
    """A centroid feature map decoded to an image uint8 RGB (H, W, 3), and the images (rows) nearest to the centroid."""

    image: np.ndarray
    rows: list[int]
    size: int


def random_queries(embeddings: Tensor, count: int, neighbours: int, seed: int, memory_mb: float) -> list[Answer]:
    """The neighbours of `count` images of embeddings (N, D), drawn by `seed`."""
    drawn = np.random.default_rng(seed).permutation(len(embeddings))[:count]
    return answers(embeddings, torch.from_numpy(drawn), neighbours, memory_mb)


def worst_queries(embeddings: Tensor, labels: Tensor, count: int, neighbours: int, memory_mb: float) -> list[Answer]:
    """The queries of embeddings (N, D), labels (N,), whose first image of the same class comes last.

    Images that are alone in their class, which nothing can find, and those that are found first are none of them.
    """
    limit = min(len(embeddings), DEEPEST)
    ranks = first_hit_ranks(embeddings, labels, limit, memory_mb=memory_mb)
    _, numbered, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    ranks = torch.where(sizes[numbered] > 1, ranks, 0)
    worst = torch.argsort(ranks, descending=True, stable=True)[:count]
    worst = worst[ranks[worst] > 0]
    return answers(embeddings, worst, neighbours, memory_mb, ranks[worst] + 1)


def answers(
    embeddings: Tensor, queries: Tensor, neighbours: int, memory_mb: float, ranks: Tensor | None = None
) -> list[Answer]:
    """The nearest other rows of embeddings (N, D) to those of the rows `queries` (Q,); Q may be 0."""
    if len(queries) == 0:
        return []
    k = min(neighbours + 1, len(embeddings))  # one more: a query finds itself
    squares, found = nearest_neighbors(embeddings, k, queries=embeddings[queries], memory_mb=memory_mb)
    listed = []
    for number, query in enumerate(queries.tolist()):
        pairs = zip(found[number].tolist(), squares[number].sqrt().tolist(), strict=True)
        rows, distances = zip(*[pair for pair in pairs if pair[0] != query][:neighbours], strict=True)
        listed.append(Answer(query, list(rows), list(distances), None if ranks is None else int(ranks[number])))
    return listed


def clusters(embeddings: Tensor, labels: Tensor | None, k: int, shown: int, seed: int) -> Clusters:
    """k-means clusters of embeddings (N, D), by the protocol of the NMI.

    Of labelled ones `shown` from the purest to the least pure, else from the largest to the smallest, at even steps.
    Raises UserError where there are fewer distinct embeddings than k.
    """
    k = min(k, len(embeddings))
    try:
        assignments, centroids, _ = kmeans(embeddings, k, n_init=NMI_RESTARTS, max_iter=NMI_ITERATIONS, seed=seed)
    except ValueError as error:
        raise UserError(f"cannot cluster the embeddings of {len(embeddings)} images: {error}") from None
    distances = (embeddings - centroids[assignments]).square().sum(1)
    found = []
    for number in range(k):
        rows = (assignments == number).nonzero().flatten()
        label = purity = None
        if labels is not None:
            present, counts = torch.unique(labels[rows], return_counts=True)
            label, purity = int(present[counts.argmax()]), int(counts.max()) / len(rows)
        near = rows[distances[rows].argsort(stable=True)[:NEAR_CENTROID]]
        found.append(Cluster(near.tolist(), len(rows), label, purity))
    found.sort(key=lambda cluster: (-cluster.size if labels is None else -cluster.purity, -cluster.size))
    steps = np.unique(np.linspace(0, k - 1, min(shown, k)).round().astype(int))
    pure = None if labels is None else sum(c.purity * c.size for c in found) / len(embeddings)
    return Clusters([found[step] for step in steps], [cluster.size for cluster in found], pure)


@torch.inference_mode()
def reconstructions(
    model: CBSwR, batches: Iterable[Tensor], pseudo_labels: str, target: str, seed: int
) -> list[Reconstruction]:
    """The decoder's output for the mean feature maps of the largest clusters of some images; rows are their numbers.

    batches: uint8 RGB centre crops (b, H, W, 3). pseudo_labels and target: the run's options of these names; clusters
    are those of the cluster head, or of k-means on the pooled features.
    """
    device = next(model.parameters()).device
    maps, embeddings, labels = [], [], []
    for batch in batches:
        embedding, logits, feature_map = model(model.normalization(batch.to(device, non_blocking=True)))
        maps.append(feature_map.half().cpu())
        embeddings.append(embedding.float().cpu())
        labels.append(logits.argmax(1).cpu())
        size = tuple(batch.shape[1:3])
    maps, embeddings, labels = torch.cat(maps), torch.cat(embeddings), torch.cat(labels)
    if pseudo_labels == "kmeans":
        pooled = torch.nn.functional.normalize(maps.float().mean((2, 3)), dim=1)
        try:
            labels, _, _ = kmeans(pooled, min(model.n_cluster, len(pooled)), seed=seed)
        except ValueError as error:
            raise UserError(f"cannot cluster the training images: {error}") from None
    present, sizes = torch.unique(labels, return_counts=True)
    largest = present[sizes.argsort(descending=True, stable=True)[:CENTROIDS]].tolist()
    members = [(labels == label).nonzero().flatten() for label in largest]
    centroids = torch.stack([maps[rows].float().mean(0) for rows in members])
    images = model.reconstructed_pixels(model.decoder(centroids.to(device), size), target).cpu().numpy()
    found = []
    for image, rows in zip(images, members, strict=True):
        near = (embeddings[rows] @ embeddings[rows].mean(0)).argsort(descending=True, stable=True)[:BESIDE_CENTROID]
        found.append(Reconstruction(image, rows[near].tolist(), len(rows)))
    return found


def map_of(embeddings: Tensor, points: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """t-SNE of at most `points` of embeddings (N, D), drawn by `seed`: their rows (n,), and places (n, 2).

    Raises UserError where all embeddings are the same.
    """
    from sklearn.manifold import TSNE

    rows = np.sort(np.random.default_rng(seed).permutation(len(embeddings))[:points])
    matrix = embeddings[rows].numpy()
    if len(rows) < 3 or np.ptp(matrix, axis=0).max() < 1e-6:
        raise UserError(f"the embeddings of {len(rows)} images are too few or all the same: there is nothing to map")
    perplexity = min(PERPLEXITY, (len(rows) - 1) / 3)
    return rows, TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(matrix)
