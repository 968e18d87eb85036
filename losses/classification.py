"""Steps that classify: by pseudo-labels (DeepCluster), and by real labels, as a ceiling of what labels would give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses.alone import embed_views, metric_alone
from utils.distributed import ALONE, Processes
from utils.errors import UserError

PROXY_RATE = 100  # the rate of the proxies by that of the network, as their paper has it


class ClassificationStep(nn.Module):
    """Softmax cross-entropy of the cluster head by a label for each image (Caron et al., ECCV 2018, "DeepCluster")."""

    def __init__(self, model: Any, weight: float = 1.0, processes: Processes = ALONE) -> None:
        super().__init__()
        self.model, self.weight, self.processes = model, weight, processes

    def begin_epoch(self) -> None:
        """Forget the classes of the clusters before: new ones have nothing to do with them."""
        for part in self.model.clustering:
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Two views of images (2m, 3, H, W), labels (m,) from 0 to K - 1: "loss", with a gradient, and its parts."""
        embeddings, labels = embed_views(self.model, inputs, labels, self.processes)
        with torch.autocast(embeddings.device.type, enabled=False):
            return metric_alone(F.cross_entropy(self.model.clustering(embeddings), labels), self.weight)


class SupervisedStep(nn.Module):
    """A metric loss of pytorch-metric-learning by the real labels: Proxy-Anchor, or Multi-Similarity with its miner."""

    own_rate = PROXY_RATE

    def __init__(self, model: Any, name: str, classes: int, weight: float = 1.0, processes: Processes = ALONE) -> None:
        """name: proxy_anchor or multi_similarity. Raises UserError where the package is not installed."""
        super().__init__()
        try:
            from pytorch_metric_learning import losses, miners
        except ImportError:
            raise UserError(f"--metric_loss {name}: needs a package that is not installed; pip install "
                            "pytorch-metric-learning") from None  # fmt: skip
        self.model, self.weight, self.processes = model, weight, processes
        proxies = name == "proxy_anchor"
        self.loss = losses.ProxyAnchorLoss(classes, model.low_dim) if proxies else losses.MultiSimilarityLoss()
        self.miner = None if proxies else miners.MultiSimilarityMiner()

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Two views of images (2m, 3, H, W), labels (m,): "loss", with a gradient, and its parts."""
        embeddings, labels = embed_views(self.model, inputs, labels, self.processes)
        with torch.autocast(embeddings.device.type, enabled=False):
            pairs = (self.miner(embeddings, labels),) if self.miner else ()
            return metric_alone(self.loss(embeddings, labels, *pairs), self.weight)
