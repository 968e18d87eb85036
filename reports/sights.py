"""What the network of a run makes of its images: everything that the page and the figures show."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.arrays import Split
from datasets.folder import listed_paths
from datasets.views import center_crop, center_crops, crop_size
from models import check_crop_size
from reports import findings
from reports.runs import Run
from reports.sheets import ROW_OF_ARRAY
from utils.errors import UserError
from utils.evaluation import MOST_NMI_CLASSES
from utils.features import embeddings_of, pooled_features
from utils.progress import progress
from utils.retrieval import nearest_neighbors

FEWEST_IN_CLUSTER = 6  # images, on average, where no classes say how many clusters there are
TRAINING_IMAGES = 1024  # whose centroids are decoded: their feature maps are held in memory


@dataclass
class Sights:
    """What a run's network makes of the test images; the numbers of images are rows of `test`."""

    test: Split
    names: list[str]
    classes: list[str]  # "" without labels
    distances: Tensor  # (N, k), to the nearest other images
    nearest: Tensor  # (N, k), the rows of these
    drawn: list[int]  # random queries
    worst: list[tuple[int, int]]  # queries that find their class last, and at which rank
    clusters: findings.Clusters
    map: tuple[list[int], np.ndarray] | None  # rows (n,) and places (n, 2)
    reconstructions: list[findings.Reconstruction]

    def title(self, row: int) -> str:
        """Return the class of an image in words, or its name if there are no labels."""
        name = self.classes[row]
        if name.isdigit():
            return f"class {name}"
        return name or self.names[row]

    def neighbors(self, row: int) -> list[tuple[int, float]]:
        """Return the nearest other images and their distances."""
        return list(zip(self.nearest[row].tolist(), self.distances[row].tolist(), strict=True))

    def is_same(self, row: int, other: int) -> bool | None:
        """Whether two images are of the same class; None without labels."""
        return bool(self.test.labels[row] == self.test.labels[other]) if self.test.labeled else None


def look(run: Run, options: Namespace, map_points: int) -> Sights | None:
    """Embed the test half and find what is to be shown.

    Args:
        options: those of report.py.

    Returns None, and says why in `run.missing`, if network or data are missing or do not fit.
    """
    if run.model is None or run.test is None:
        return None
    test = run.test
    try:
        check_crop_size(run.model.backbone_name, crop_size(test.image_size))
        crops = center_crops(test, options.test_batch, options.workers)
        crops = progress(crops, f"{run.name}: test features")
        (pooled,) = pooled_features(run.model, crops, flip=run.info["flip_eval"])
        embeddings = embeddings_of(run.model, pooled)
        listed = listed_paths(test)
    except UserError as error:
        run.missing["network"] = f"The images could not be embedded. {error}."
        return None
    paths = [path for path, _ in listed]
    labels = torch.from_numpy(test.labels)
    queries, squares, nearest = search(embeddings, test, options)
    n_clusters = min(len(test.classes), MOST_NMI_CLASSES)
    if not test.labeled:
        n_clusters = min(run.model.n_cluster, max(2, len(test) // FEWEST_IN_CLUSTER))
    return Sights(
        test=test,
        names=[
            f"image {row}" if ROW_OF_ARRAY.fullmatch(path) else Path(path).name
            for row, path in enumerate(paths)
        ],
        classes=[name for _, name in listed],
        distances=squares.sqrt(),
        nearest=nearest,
        drawn=queries[_draw(len(queries), options.queries, options.seed)].tolist(),
        worst=_worst(embeddings, test, queries, options),
        clusters=findings.clusters(embeddings, labels, n_clusters, options.clusters, options.seed),
        map=findings.map_places(embeddings, _draw(len(test), map_points, options.seed)),
        reconstructions=_reconstruct(run, options),
    )


def search(embeddings: Tensor, test: Split, options: Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows that are queries (Q,), and of all images squared distances (N, k) and rows
    (N, k) of the nearest other ones. Queries of a gallery search that alone.
    """
    memory_mb = options.eval_memory_mb
    n_searched = len(test) - 1 if test.roles is None else int((~test.is_query).sum())
    k = min(options.neighbors, n_searched)
    squares, nearest = nearest_neighbors(embeddings, k, memory_mb=memory_mb)
    if test.roles is None:
        return torch.arange(len(test)), squares, nearest
    is_query = torch.from_numpy(test.is_query)
    asking, asked = embeddings[is_query], embeddings[~is_query]
    of_queries = nearest_neighbors(asked, k, queries=asking, memory_mb=memory_mb)
    squares[is_query] = of_queries[0]
    nearest[is_query] = (~is_query).nonzero().flatten()[of_queries[1]]
    return is_query.nonzero().flatten(), squares, nearest


def _draw(count: int, most: int, seed: int) -> np.ndarray:
    """Draw at most `most` of `count` rows."""
    return np.random.default_rng(seed).permutation(count)[:most]


def _worst(
    embeddings: Tensor, test: Split, queries: Tensor, options: Namespace
) -> list[tuple[int, int]]:
    """Return the queries whose class comes last, and its rank; none that finds its class first."""
    labels = torch.from_numpy(test.labels)
    is_searched = torch.ones(len(test), dtype=torch.bool)
    if test.roles is not None:
        is_searched[queries] = False
    ranks = findings.first_hit_ranks(
        embeddings, labels, queries, is_searched, options.eval_memory_mb
    )
    worst = ranks.argsort(descending=True, stable=True)[: options.queries]
    pairs = zip(queries[worst].tolist(), ranks[worst].tolist(), strict=True)
    return [(row, rank) for row, rank in pairs if rank > 1]


def _reconstruct(run: Run, options: Namespace) -> list[findings.Reconstruction]:
    """Decode centroids of some training images; none if images or a trained decoder are missing."""
    is_trained = run.config.get("method", "cbswr") == "cbswr" and run.config.get("recon") != 0
    if run.training is None or not is_trained:
        return []
    rows = np.sort(_draw(len(run.training), TRAINING_IMAGES, options.seed))
    crops = torch.from_numpy(center_crop(run.training.images[rows]))
    by_kmeans = run.config.get("pseudo_labels") == "kmeans"
    target = run.config.get("recon_target", "input")
    return findings.reconstructions(
        run.model, crops, options.test_batch, by_kmeans, target, options.seed
    )
