"""A network that embeds images, and what a file of embeddings says of it."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.cbswr import CBSwR
from models.checkpoint import load_network
from models.pooling import PAPER, Pooling
from utils.errors import UserError
from utils.features import extract_features


class Embedder:
    """Turns crops into rows of unit length: a checkpoint's embedding, or pooled features.

    Attributes:
        facts: all that decides what the rows are; equal facts mean equal rows.
        location: where the weights come from.
        dimension: length D of a row.
        image_size: side of the images it was trained on, in pixels; None if unknown.
    """

    def __init__(
        self,
        device: torch.device | str,
        checkpoint: str | None = None,
        backbone: str | None = None,
        weights: str | None = None,
        *,
        pooling: Pooling = PAPER,
        dim: int | None = None,
        flip: bool | None = None,
        precision: str = "fp32",
        seed: int = 0,
    ) -> None:
        """Load a checkpoint, or else a backbone with its weights and pooling (see `load_network`).

        Args:
            flip: average the features of an image and its mirror image; None: as in training.
            seed: of a backbone's random weights.
        """
        torch.manual_seed(seed)
        self.model, about = load_network(device, checkpoint, backbone, weights, pooling, dim)
        if flip is None:
            flip = bool(about.get("flip_eval"))
        self.flip = flip
        self.precision = precision
        self.features = about["features"]
        self.dimension = about.get("low_dim", self.model.pooled_dim)
        self.image_size = about.get("image_size")
        self.location = {
            name: os.path.abspath(about[name]) if os.path.exists(about[name] or "") else about[name]
            for name in ("checkpoint", "weights")
        }
        self.location["seed"] = seed
        self.facts = {
            "backbone": about["backbone"],
            "features": self.features,
            "precision": precision,
            **self.model.pooling.options(),
            "dim": dim,
            "flip_eval": flip,
            "dimension": self.dimension,
            "network_sha256": network_hash(self.model),
        }

    @classmethod
    def from_facts(
        cls,
        facts: dict,
        device: torch.device | str,
        checkpoint: str | None = None,
        weights: str | None = None,
    ) -> Embedder:
        """Load the network again that made a file of embeddings.

        Args:
            facts: facts and location in the file; older files lack pooling, dim and flip_eval.
            checkpoint, weights: where the file lies now, if it was moved.

        Raises UserError if it is not the same network.
        """
        is_frozen = facts["features"] == "pooled"
        embedder = cls(
            device,
            None if is_frozen else checkpoint or facts["checkpoint"],
            facts["backbone"] if is_frozen else None,
            weights or facts["weights"],
            pooling=Pooling.parse(
                facts.get("layers"), facts.get("pool"), False, facts.get("stripes")
            ),
            dim=facts.get("dim"),
            flip=facts.get("flip_eval", False),
            precision=facts["precision"],
            seed=facts["seed"],
        )
        if embedder.facts["network_sha256"] != facts["network_sha256"]:
            source = embedder.location["checkpoint"] or embedder.location["weights"]
            raise UserError(
                f"{source}: is not the network that made the embeddings; give the file that did, "
                "or embed the images again"
            )
        return embedder

    def __call__(self, crops: Tensor) -> np.ndarray:
        """Embed crops, uint8 RGB (b, crop, crop, 3): float32 (b, D), rows of unit length."""
        if len(crops) == 0:
            return np.empty((0, self.dimension), np.float32)
        pooled, embedding = extract_features(self.model, [crops], self.precision, flip=self.flip)
        if self.features == "embedding":
            return embedding.numpy()
        return F.normalize(pooled, dim=1).numpy()


def network_hash(model: CBSwR) -> str:
    """Return the SHA-256 of the weights that make embeddings, of backbone and embedding head."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if name.startswith(("base_model.", "feat_ext.")):
            array = value.detach().cpu().contiguous().numpy()
            digest.update(f"{name} {array.dtype} {array.shape}\0".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()
