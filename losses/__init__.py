"""Clustering, metric and reconstruction losses as plain functions of tensors."""

from losses.cbswr import TrainingStep, cbswr_losses, total_loss
from losses.center_softmax import center_softmax_loss
from losses.reconstruction import cluster_means, reconstruction_loss
from losses.rim import rim_loss

__all__ = [
    "TrainingStep",
    "cbswr_losses",
    "center_softmax_loss",
    "cluster_means",
    "reconstruction_loss",
    "rim_loss",
    "total_loss",
]
