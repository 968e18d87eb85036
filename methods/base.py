"""What every method has: a network, a loss of a batch, and hooks that the loop calls."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.clustering import kmeans_of_any_size
from utils.distributed import ALONE, Processes
from utils.errors import UserError
from utils.features import network_autocast
from utils.index import approximate_neighbors, faiss
from utils.options import whole
from utils.retrieval import nearest_neighbors

KMEANS_ITERATIONS = 50  # of pseudo-labels, from one start: they are made anew in each epoch
EXACT_UP_TO = 100_000  # images whose neighbors are found exactly on a CPU

# () -> pooled features (N, C) and embeddings (N, D) of all training images, on the CPU
Features = Callable[[], tuple[Tensor, Tensor]]


class Method(nn.Module):
    """A way to train a network. It knows an image by its number.

    The loop calls `begin_epoch`, then `forward` and `end_step` for each batch. Whatever a resumed
    run needs is a buffer, which the checkpoint keeps by name.

    Attributes:
        model: the `models.CBSwR` that is trained.
        positives: (N,) buffer; the second view of an image is half of the time of its positive.
            None: always of the image itself.
        neighbors: (N, G - 1) buffer; batches consist of groups of an image and its neighbors.
            None: batches of single images.
        lr_scale: rate of the parameters beside the network, as a multiple of the network's.
        uses_labels: whether the method needs the real labels of the training images.
        uses_all: whether every parameter of the network has a part in the loss.
    """

    lr_scale = 1.0
    uses_labels = False
    uses_all = False
    positives: Tensor | None
    neighbors: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        options: argparse.Namespace,
        n_images: int,
        labels: Tensor | None = None,
        processes: Processes = ALONE,
    ) -> None:
        """Make the method.

        Args:
            options: those of `add_options`, and of train.py: seed, precision, dataset, batch_size,
                head_init, eval_memory_mb.
            n_images: N, the number of training images.
            labels: (N,) their real classes, numbered from 0; given if `uses_labels`.
            processes: that share a batch.
        """
        super().__init__()
        self.model = model
        self.options = options
        self.n_images = n_images
        self.processes = processes
        self.register_buffer("positives", None)
        self.register_buffer("neighbors", None)

    @staticmethod
    def add_options(group: argparse._ArgumentGroup) -> None:
        """Declare the options that this method alone reads."""

    def begin_epoch(self, epoch: int, features: Features) -> dict:
        """Prepare an epoch (from 1): pseudo-labels, positives, neighbors.

        Returns what to log.
        """
        return {}

    def forward(self, views: Tensor, index: Tensor) -> dict[str, Tensor]:
        """Compute the losses of a batch, or of this process's share of it.

        Args:
            views: (2m, 3, H, W), first views, then second views in the same order.
            index: (m,) the numbers of the images.

        Returns scalars: "loss", which is minimized, and its parts.
        """
        raise NotImplementedError

    def end_step(self) -> None:
        """Called after each step of the optimizer."""

    def head_changed(self) -> None:
        """Called after the embedding head was set in closed form."""

    def neighbors_and_positives(self) -> dict[str, np.ndarray | None]:
        """Return positives and neighbors as the batches of an epoch take them."""
        buffers = {"positives": self.positives, "neighbors": self.neighbors}
        return {k: None if value is None else value.cpu().numpy() for k, value in buffers.items()}

    def parameter_groups(self, lr: float) -> list[dict]:
        """Return the trained parameters: those of the network, and those beside it.

        A group's rate is its `scale` times the rate of the schedule.
        """
        trained = {n: p for n, p in self.named_parameters() if p.requires_grad}
        network = [p for name, p in trained.items() if name.startswith("model.")]
        beside = [p for name, p in trained.items() if not name.startswith("model.")]
        groups = [{"params": network, "lr": lr, "scale": 1.0}]
        if beside:
            groups.append({"params": beside, "lr": lr * self.lr_scale, "scale": self.lr_scale})
        return groups

    def make_groups(self) -> None:
        """Have `neighbors` for the option --group. Raises UserError unless groups fill batches."""
        group, batch_size = self.options.group, self.options.batch_size
        if batch_size % group:
            fitting = batch_size // group * group or group
            raise UserError(
                f"batch_size {batch_size}: no multiple of the group of {group}; try {fitting}"
            )
        if group > 1:
            self.neighbors = torch.zeros(self.n_images, group - 1, dtype=torch.int64)

    @property
    def device(self) -> torch.device:
        """Where the network lies."""
        return next(self.model.parameters()).device

    def autocast(self) -> torch.autocast:
        """Return the context in which the network runs."""
        return network_autocast(self.device, self.options.precision)

    def comparable(self, pooled: Tensor, embeddings: Tensor) -> Tensor:
        """Return the features (N, C) of unit length by which images are compared.

        They are the pooled features, or the embeddings of a head in closed form, which compare
        better.
        """
        space = pooled if self.options.head_init == "random" else embeddings
        return F.normalize(space, dim=1).to(self.device)

    def mine(self, space: Tensor, count: int) -> Tensor:
        """Find the `count` nearest neighbors of each image in features (N, C): (N, count).

        On a CPU those of more than EXACT_UP_TO images are found approximately, if faiss is there.
        """

        def work() -> Tensor:
            if space.is_cuda or len(space) <= EXACT_UP_TO or faiss is None:
                memory_mb = self.options.eval_memory_mb
                return nearest_neighbors(space, count, memory_mb=memory_mb)[1].cpu()
            return torch.from_numpy(approximate_neighbors(space.numpy(), count))

        return self.processes.by_first(work)

    def cluster(self, space: Tensor, n_cluster: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Cluster features (N, C) by k-means: pseudo-labels (N,) and centroids (K, C), on the CPU.

        Many images in many clusters are clustered approximately, if faiss is there.

        Raises UserError for more clusters than images.
        """

        def work() -> tuple[Tensor, Tensor]:
            seed = self.options.seed + epoch
            result = kmeans_of_any_size(
                space, n_cluster, n_init=1, max_iter=KMEANS_ITERATIONS, seed=seed
            )
            return result[0].cpu(), result[1].cpu()

        return self.processes.by_first(work)

    def embed_batch(self, views: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings (2m, D) and image numbers (2m,) of the whole batch."""
        with self.autocast():
            pooled = self.model.pool(self.model.maps(views))
        embeddings = self.model.embed(self.processes.gather_views(pooled))
        return embeddings, self.processes.gather_views(index.repeat(2))


def add_group_option(group: argparse._ArgumentGroup, default: int, others: str) -> None:
    """Add --group, for `Method.make_groups`; others: what an image is followed by, in words."""
    text = f"fill batches with images drawn at random and the G - 1 {others} of each"
    group.add_argument("--group", type=whole(1), default=default, metavar="G", help=text)
