"""Losses as plain functions of tensors."""

from losses.cbswr import cbswr_losses, total_loss
from losses.center_softmax import center_softmax_loss
from losses.contextual import (
    contextual_similarity,
    relaxed_contrastive_loss,
    self_distillation_loss,
)
from losses.instance_softmax import instance_softmax_loss
from losses.reconstruction import cluster_means, reconstruction_loss
from losses.rim import rim_loss
from losses.soft_centers import soft_center_loss

__all__ = [
    "cbswr_losses",
    "center_softmax_loss",
    "cluster_means",
    "contextual_similarity",
    "instance_softmax_loss",
    "reconstruction_loss",
    "relaxed_contrastive_loss",
    "rim_loss",
    "self_distillation_loss",
    "soft_center_loss",
    "total_loss",
]
