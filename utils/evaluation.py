"""The scores of a test half: which K, whether NMI is computed, and by which protocol."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from torch import Tensor

from utils import clustering, metrics
from utils.errors import UserError

RECALL_AT = (1, 2, 4, 8)
RECALL_AT_OF = {
    "sop": (1, 10, 100, 1000),
    "inshop": (1, 10, 20, 30, 40, 50),
}  # as papers report them
NMI_STARTS = 10  # of k-means, as the released code ran it
NMI_ITERATIONS = 300
MOST_NMI_CLASSES = 1000  # "auto" leaves NMI out above


def why_no_nmi(choice: str, n_classes: int) -> str:
    """Say why NMI is left out, or "". choice: on, off, or auto, which leaves it out if it takes
    long.
    """
    if choice == "off":
        return "not asked for"
    if choice == "auto" and n_classes > MOST_NMI_CLASSES:
        return f"{n_classes} classes, more than {MOST_NMI_CLASSES}, take long"
    return ""


def check_classes(labels: np.ndarray, is_query: np.ndarray | None = None) -> int:
    """Return how many queries have no other image of their class to find.

    labels, is_query: (N,) of the test half, see `score`. Raises UserError if there is nothing to
    score: one class, with which any embedding would score 100, or no query with an image to find.
    """
    if len(np.unique(labels)) < 2:
        raise UserError("the test half holds images of one class only; there is nothing to score")
    queries = labels if is_query is None else labels[is_query]
    searched = Counter((labels if is_query is None else labels[~is_query]).tolist())
    itself = int(is_query is None)  # an image does not find itself
    n_alone = sum(searched[label] == itself for label in queries.tolist())
    if n_alone == len(queries):
        raise UserError("no image has another one of its class to find; there is nothing to score")
    return n_alone


def alone_remark(n_alone: int) -> str:
    """Say how queries without an image to find count."""
    return (
        f"{n_alone} test images have no other one of their class to find: R@K counts them as "
        "misses, MAP@R and R-precision leave them out"
    )


def score(
    embeddings: Tensor,
    labels: np.ndarray,
    dataset: str = "",
    *,
    is_query: np.ndarray | None = None,
    seed: int = 0,
    engine: str = "auto",
    no_nmi: str = "",
    full: bool = False,
    memory_mb: float = 512,
) -> dict:
    """Compute R@K and NMI of embeddings (N, D) with labels (N,), as shares in [0, 1].

    Args:
        dataset: decides the K.
        is_query: (N,) bool; these images search the rest alone. None: each image searches all
        others.
        seed, engine: of the k-means behind NMI, which clusters all images.
        no_nmi: why NMI is left out; "" computes it.
        full: also MAP@R and R-precision.

    Returns {"recall@1": .., "nmi": .., "ami": .., "nmi_protocol": how k-means was run} or, without
    NMI, "nmi_left_out": why. Raises UserError as `check_classes`.
    """
    check_classes(labels, is_query)
    n_classes = len(np.unique(labels))
    searching = (embeddings, labels)
    gallery = None
    if is_query is not None:
        searching = (embeddings[torch.from_numpy(is_query)], labels[is_query])
        gallery = (embeddings[torch.from_numpy(~is_query)], labels[~is_query])
    ks = RECALL_AT_OF.get(dataset, RECALL_AT)
    options = {"gallery": gallery, "memory_mb": memory_mb}
    try:
        recall = metrics.recall_at_k(*searching, ks, **options)
        scores = {f"recall@{k}": share for k, share in recall.items()}
        if full:
            scores |= metrics.precision_at_r(*searching, **options)
    except ValueError as error:
        raise UserError(
            f"cannot score the embeddings of {len(embeddings)} images: {error}"
        ) from None
    if no_nmi:
        return scores | {"nmi_left_out": no_nmi}
    engine = clustering.pick_engine(engine)
    scores |= metrics.clustering_scores(
        embeddings, labels, seed, NMI_STARTS, NMI_ITERATIONS, engine
    )
    starts = f"best of {NMI_STARTS} k-means++ starts"
    scores["nmi_protocol"] = (
        f"{n_classes} clusters, {engine}, {starts} of <={NMI_ITERATIONS} iterations, seed {seed}"
    )
    return scores


def recall_titles(scores: dict) -> dict[str, str]:
    """Return the R@K among scores, the smallest K first: {"R@1": "recall@1", ...}."""
    prefix = "recall@"
    ks = sorted(int(name.removeprefix(prefix)) for name in scores if name.startswith(prefix))
    return {f"R@{k}": f"{prefix}{k}" for k in ks}


def nmi_remark(scores: dict) -> str:
    """Say how the NMI among scores was computed, or why it was left out."""
    if "nmi_left_out" in scores:
        return f"left out: {scores['nmi_left_out']}"
    return f"by {scores['nmi_protocol']}"
