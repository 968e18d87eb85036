"""Clustering, metric and reconstruction losses as plain functions of tensors."""

from losses.cbswr import METRIC_LOSSES, TrainingStep, cbswr_losses, total_loss
from losses.center_softmax import center_softmax_loss
from losses.classification import ClassificationStep, SupervisedStep
from losses.contextual import (
    ContextualStep,
    contextual_similarity,
    large_embedding,
    relaxed_contrastive_loss,
    self_distillation_loss,
)
from losses.instance_softmax import instance_softmax_loss
from losses.reconstruction import cluster_means, reconstruction_loss
from losses.rim import rim_loss
from losses.soft_centers import SoftCentersStep, partition_sizes, soft_center_loss

__all__ = [
    "METRIC_LOSSES",
    "ClassificationStep",
    "ContextualStep",
    "SoftCentersStep",
    "SupervisedStep",
    "TrainingStep",
    "cbswr_losses",
    "center_softmax_loss",
    "cluster_means",
    "contextual_similarity",
    "instance_softmax_loss",
    "large_embedding",
    "partition_sizes",
    "reconstruction_loss",
    "relaxed_contrastive_loss",
    "rim_loss",
    "self_distillation_loss",
    "soft_center_loss",
    "total_loss",
]
