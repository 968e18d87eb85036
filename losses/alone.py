"""What training steps share whose metric loss is all there is."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from utils.distributed import Processes


def embed_views(model: Any, inputs: Tensor, labels: Tensor, processes: Processes) -> tuple[Tensor, Tensor]:
    """Embeddings (2m, D) of the whole batch, and a label for each (2m,)."""
    pooled = processes.gather_views(model.pool(*model.maps(inputs)))
    return model.embed(pooled), processes.gather_views(labels.repeat(2))


def metric_alone(metric: Tensor, weight: float) -> dict[str, Tensor]:
    """ "loss", the only one with a gradient, "metric", and zeros for the losses of the paper that are not there."""
    nothing = metric.new_zeros(())
    return {"metric": metric.detach(), "rim": nothing, "reconstruction": nothing, "loss": weight * metric}
