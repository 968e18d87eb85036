"""The scores of one set of embeddings, with the protocol of the NMI beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from utils import clustering, metrics
from utils.errors import UserError

RECALL_AT = (1, 2, 4, 8)
NMI_RESTARTS, NMI_ITERATIONS = 10, 300  # scikit-learn's defaults, which the released code used
EVAL_MEMORY_MB = 512


def score(
    embeddings: Tensor,
    labels,
    seed: int = 0,
    engine: str = "auto",
    memory_mb: float = EVAL_MEMORY_MB,
    full: bool = False,
) -> dict:
    """R@1/2/4/8 and NMI, shares in [0, 1], of embeddings (N, D) with labels (N,): {"recall@1": .., "nmi": ..}.

    `full` adds "map@r", "r_precision" (`metrics.precision_at_r`) and "ami", which take longer.

    "nmi_protocol" says how the clusters were found, by which `engine` of `clustering.kmeans`: the figure depends on it.
    memory_mb bounds what the search for neighbours takes beside the embeddings, in MiB; no score depends on it.
    Raises UserError where there are fewer distinct embeddings than classes, as after a collapse.
    """
    classes = len(torch.unique(torch.as_tensor(labels)))
    if classes < 2:
        raise UserError("the test half holds images of one class only: any embedding would score 100")
    recall = metrics.recall_at_k(embeddings, labels, RECALL_AT, memory_mb=memory_mb)
    if engine == "auto":
        engine = clustering.pick_engine(len(embeddings), embeddings.shape[1], classes, embeddings.device)
    try:
        found = metrics.clustering_scores(embeddings, labels, seed, NMI_RESTARTS, NMI_ITERATIONS, engine, adjusted=full)
        if full:
            found |= metrics.precision_at_r(embeddings, labels, memory_mb=memory_mb)
    except ValueError as error:
        raise UserError(f"cannot score the embeddings of {len(embeddings)} images: {error}") from None
    return {
        **{f"recall@{k}": share for k, share in recall.items()},
        **found,
        "nmi_protocol": f"{classes} clusters, {clustering.protocol(NMI_RESTARTS, NMI_ITERATIONS, engine)}, seed {seed}",
    }
