"""The scores of one set of embeddings, with the protocol of the NMI beside it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from utils import clustering, metrics
from utils.errors import UserError

RECALL_AT = (1, 2, 4, 8)
RECALL_OF = {"sop": (1, 10, 100, 1000), "inshop": (1, 10, 20, 30, 40, 50)}  # the K that papers give for these data sets
NMI_RESTARTS, NMI_ITERATIONS = 10, 300  # scikit-learn's defaults, which the released code used
NMI_CLASSES = 1000  # with more of them --nmi auto of train.py leaves NMI out
EVAL_MEMORY_MB = 512


def recall_ranks(dataset: str) -> tuple[int, ...]:
    """The K of R@K of a data set."""
    return RECALL_OF.get(dataset, RECALL_AT)


def why_no_nmi(wanted: str, classes: int) -> str:
    """Why NMI is to be left out, "" if it is not; `wanted` is --nmi: on, off, or auto, which minds the time."""
    if wanted == "auto" and classes > NMI_CLASSES:
        return f"{classes} classes, more than {NMI_CLASSES}, take long (--nmi on)"
    return "--nmi off" if wanted == "off" else ""


def score(
    embeddings: Tensor,
    labels,
    seed: int = 0,
    engine: str = "auto",
    memory_mb: float = EVAL_MEMORY_MB,
    full: bool = False,
    *,
    ks: tuple[int, ...] = RECALL_AT,
    is_query: np.ndarray | None = None,
    no_nmi: str = "",
) -> dict:
    """R@K and NMI, shares in [0, 1], of embeddings (N, D) with labels (N,): {"recall@1": .., "nmi": ..}.

    `full` adds "map@r", "r_precision" (`metrics.precision_at_r`) and "ami", which take longer. `ks` are the K.
    is_query (N,) bool: these images search the others, which are the gallery, alone; None: each image searches all
    others. The clusters of NMI and AMI are of all images. `no_nmi`: leave both out, for this reason; it is returned as
    "nmi_left_out".

    "nmi_protocol" says how the clusters were found, by which `engine` of `clustering.kmeans`: the figure depends on it.
    memory_mb bounds what the search for neighbours takes beside the embeddings, in MiB; no score depends on it.
    Raises UserError where there are fewer distinct embeddings than classes, as after a collapse.
    """
    labels = torch.as_tensor(labels)
    classes = len(torch.unique(labels))
    if classes < 2:
        raise UserError("the test half holds images of one class only: any embedding would score 100")
    searched, options = (embeddings, labels), {"memory_mb": memory_mb}
    if is_query is not None:
        asks = torch.as_tensor(is_query)
        searched = embeddings[asks], labels[asks]
        options["gallery"] = (embeddings[~asks], labels[~asks])
    try:
        recall = metrics.recall_at_k(*searched, ks, **options)
        found = {f"recall@{k}": share for k, share in recall.items()}
        if full:
            found |= metrics.precision_at_r(*searched, **options)
        return found | ({"nmi_left_out": no_nmi} if no_nmi else _cluster_scores(embeddings, labels, seed, engine, full))
    except ValueError as error:
        raise UserError(f"cannot score the embeddings of {len(embeddings)} images: {error}") from None


def _cluster_scores(embeddings: Tensor, labels: Tensor, seed: int, engine: str, adjusted: bool) -> dict:
    """NMI, if asked for AMI, and the protocol."""
    classes = len(torch.unique(labels))
    if engine == "auto":
        engine = clustering.pick_engine(len(embeddings), embeddings.shape[1], classes, embeddings.device)
    found = metrics.clustering_scores(embeddings, labels, seed, NMI_RESTARTS, NMI_ITERATIONS, engine, adjusted=adjusted)
    protocol = f"{classes} clusters, {clustering.protocol(NMI_RESTARTS, NMI_ITERATIONS, engine)}, seed {seed}"
    return {**found, "nmi_protocol": protocol}
