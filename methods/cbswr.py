"""CBSwR (Nguyen et al., BMVC 2020), and the rows of its ablation table."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor

from losses import cbswr_losses, total_loss
from methods.base import Features, Method
from utils.errors import UserError
from utils.options import name_of, real, whole


class CBSwRMethod(Method):
    """Clustering, metric and reconstruction loss with the pseudo-labels of the cluster head."""

    @staticmethod
    def add_options(group: argparse._ArgumentGroup) -> None:
        add = group.add_argument
        add("--n_cluster", type=whole(2), default=32, help="K, number of clusters")
        add("--ml", type=real(0), default=0.9, help="weight of the metric loss")
        add("--rim", type=real(0), default=0.3, help="weight of the clustering loss")
        add("--recon", type=real(0), default=0.001, help="weight of the reconstruction loss")
        add("--t", type=real(1e-6), default=0.1, help="temperature")
        add("--alpha", type=real(0), default=1.0, help="weight of the push in the metric loss")
        text = "weight of the balance in the clustering loss"
        add("--mu", type=real(0), default=1.0, help=text)
        text = "factor on every sum over other clusters in the metric loss"
        add("--neg_m", type=whole(1, 10**6), default=1, help=text)
        text = "what the metric loss runs over: centers of clusters, or images (Ye et al. 2019)"
        add("--softmax_over", type=name_of(("centers", "images")), default="centers", help=text)
        text = "rim: of the cluster head; kmeans: of a clustering of all images in each epoch"
        add("--pseudo_labels", type=name_of(("rim", "kmeans")), default="rim", help=text)
        text = (
            "second view: of the image itself, or half of the time of its nearest neighbor, mined "
            "in each epoch (auto: nn on cub200, self elsewhere)"
        )
        add("--positives", type=name_of(("auto", "self", "nn")), default="auto", help=text)
        text = "input: the mean-subtracted image / 255, as released; image: the image in [0, 1]"
        add("--recon_target", type=name_of(("input", "image")), default="input", help=text)

    def __init__(self, model: Any, options: argparse.Namespace, n_images: int, **kwargs) -> None:
        super().__init__(model, options, n_images, **kwargs)
        self.weights = (options.ml, options.rim, options.recon)
        self.uses_all = all(self.weights)
        if not any(self.weights):
            raise UserError("ml, rim and recon are all 0: there is nothing to train")
        if options.n_cluster > n_images:
            raise UserError(f"n_cluster {options.n_cluster}: there are {n_images} training images")
        if options.softmax_over == "images" and options.batch_size < 2:
            raise UserError("a softmax over the images of a batch needs a batch_size of at least 2")
        if options.positives == "nn" or (options.positives, options.dataset) == ("auto", "cub200"):
            self.positives = torch.arange(n_images)
        self.register_buffer("pseudo_labels", None)
        if options.pseudo_labels == "kmeans":
            self.pseudo_labels = torch.full((n_images,), -1)

    def begin_epoch(self, epoch: int, features: Features) -> dict:
        """Mine the nearest neighbor of each image, and cluster all images, where asked for."""
        if self.positives is None and self.pseudo_labels is None:
            return {}
        space = self.comparable(*features())
        if self.positives is not None:
            self.positives.copy_(self.mine(space, 1)[:, 0])
        if self.pseudo_labels is None:
            return {}
        labels, _ = self.cluster(space, self.options.n_cluster, epoch)
        logged = {
            "cluster_sizes": torch.bincount(labels, minlength=self.options.n_cluster).tolist()
        }
        if self.pseudo_labels[0] >= 0:
            previous = self.pseudo_labels.cpu()
            logged["nmi_to_previous_clusters"] = normalized_mutual_info_score(previous, labels)
        self.pseudo_labels.copy_(labels)
        return logged

    def forward(self, views: Tensor, index: Tensor) -> dict[str, Tensor]:
        """Compute the three losses of a batch and their weighted sum."""
        options = self.options
        with self.autocast():
            losses = cbswr_losses(
                self.model,
                views,
                None if self.pseudo_labels is None else self.pseudo_labels[index],
                temperature=options.t,
                alpha=options.alpha,
                mu=options.mu,
                neg_m=options.neg_m,
                recon_target=options.recon_target,
                softmax_over=options.softmax_over,
                reconstruct=options.recon > 0,
                processes=self.processes,
            )
        losses.pop("pseudo_labels")
        return {"loss": total_loss(losses, *self.weights)} | losses
