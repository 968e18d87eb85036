"""Embed images from Python.

from embedder import Embedder

embedder = Embedder("new_checkpoint/CBSwR_my_set")  # or a frozen backbone: "resnet18"
rows = embedder(["a.jpg", Image.open("b.png")])  # float32 (2, D), rows of unit length
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import utils.threads  # noqa: F401

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from datasets.arrays import DEFAULT_IMAGE_SIZE
from datasets.images import UnreadableError, as_rgb, decode_image, squash, upright
from datasets.views import center_crop, crop_size
from models import BACKBONES, PAPER, CBSwR, Pooling, check_crop_size, load_network
from models.timm_backbones import TIMM_PREFIX
from utils.devices import choose_device
from utils.errors import UserError, nearest_hint
from utils.features import embeddings_of, pooled_features
from utils.runs import find_checkpoint

BATCH = 100  # images that are decoded and embedded at once
Picture = Image.Image | str | os.PathLike | bytes | np.ndarray | Tensor


class Embedder:
    """Turns images into rows of unit length: a checkpoint's embedding, or pooled features.

    Attributes:
        facts: what the network is; with equal facts and `image_size` an image gets the same row.
        location: where the weights come from.
        dimension: length D of a row.
        image_size: side in pixels of the squares that images are squashed to, whose center counts.
    """

    def __init__(
        self,
        source: str | os.PathLike,
        weights: str = "auto",
        *,
        device: str | torch.device = "auto",
        image_size: int | None = None,
        pooling: Pooling = PAPER,
        dim: int | None = None,
        flip: bool | None = None,
        precision: str = "fp32",
        seed: int = 0,
    ) -> None:
        """Load the network.

        Args:
            source: a checkpoint, the folder of a run, or the name of a backbone. A Path is never a
                name.
            weights: of a backbone: auto (ImageNet), none (random, by `seed`), or a file.
            image_size: None: that of the training, or else 256.
            pooling: of a backbone.
            dim: how many numbers of an embedding in closed form to keep; None: all.
            flip: average the features of an image and its mirror image; None: as in training.
            precision: of the network, fp32 or bf16.

        Raises UserError if it cannot be loaded (see `models.load_network`).
        """
        name = str(source)
        is_name = name in BACKBONES or name.startswith(TIMM_PREFIX)
        is_backbone = is_name and not isinstance(source, Path)
        if not is_backbone and not find_checkpoint(name).is_file():
            hint = nearest_hint(name, BACKBONES)
            raise UserError(f"{name}: no such file or run, and no backbone{hint}")
        checkpoint = None if is_backbone else name
        backbone = name if is_backbone else None
        if isinstance(device, str):
            device = choose_device(device)
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # the caller's random numbers stay as they were
            torch.manual_seed(seed)
            network = load_network(device, checkpoint, backbone, weights, pooling, dim)
        self.model, about = network
        self.flip = bool(about["flip_eval"]) if flip is None else flip
        self.precision = precision
        self.features = about["features"]
        self.dimension = about.get("low_dim", self.model.pooled_dim)
        self.image_size = image_size or about.get("image_size") or DEFAULT_IMAGE_SIZE
        check_crop_size(self.model.backbone_name, crop_size(self.image_size))
        self.location = {"checkpoint": about["checkpoint"], "weights": about["weights"]}
        for name, place in self.location.items():
            if place not in (None, "auto", "none"):
                self.location[name] = os.path.abspath(place)
        self.location["seed"] = seed
        self.facts = {
            "backbone": about["backbone"],
            "features": self.features,
            "precision": precision,
            **self.model.pooling.options(),
            "dim": dim,
            "flip_eval": self.flip,
            "dimension": self.dimension,
            "network_sha256": network_hash(self.model, self.features),
        }

    @classmethod
    def from_facts(
        cls,
        facts: dict,
        device: str | torch.device = "auto",
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
        if checkpoint and is_frozen:
            raise UserError(f"{checkpoint}: a frozen {facts['backbone']} made the embeddings")
        if weights and not is_frozen:
            raise UserError(f"{weights}: the checkpoint {facts['checkpoint']} made the embeddings")
        embedder = cls(
            facts["backbone"] if is_frozen else Path(checkpoint or facts["checkpoint"]),
            weights or facts["weights"],
            device=device,
            image_size=facts["image_size"],
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

    def __call__(self, images: Picture | Iterable[Picture]) -> np.ndarray:
        """Embed an image or several: float32 (N, D), rows of unit length.

        An image is a PIL image, the path of a file, its bytes, an array of uint8, (H, W, 3) or gray
        (H, W), or a tensor, (3, H, W) or gray (H, W), of uint8 or of numbers from 0 to 1. Colors
        are RGB.
        Raises ValueError for other numbers, and UnreadableError for a file that cannot be read.
        """
        is_single = isinstance(images, Image.Image | str | os.PathLike | bytes) or (
            isinstance(images, np.ndarray | Tensor) and images.ndim < 4
        )
        pictures = iter([images] if is_single else images)
        rows = [np.empty((0, self.dimension), np.float32)]
        while batch := list(islice(pictures, BATCH)):
            squares = np.stack([_as_square(picture, self.image_size) for picture in batch])
            rows.append(self.embed_crops(torch.from_numpy(center_crop(squares))))
        return np.concatenate(rows)

    def embed_crops(self, crops: Tensor) -> np.ndarray:
        """Embed center crops, uint8 RGB (b, crop, crop, 3): float32 (b, D), of unit length."""
        if len(crops) == 0:
            return np.empty((0, self.dimension), np.float32)
        (pooled,) = pooled_features(self.model, [crops], self.precision, flip=self.flip)
        if self.features == "embedding":
            return embeddings_of(self.model, pooled).numpy()
        return F.normalize(pooled, dim=1).numpy()


def _as_square(picture: Picture, image_size: int) -> np.ndarray:
    """Squash an image of any kind to a square, uint8 RGB."""
    original = picture
    if isinstance(picture, bytes):
        return decode_image(picture, image_size)
    if isinstance(picture, str | os.PathLike):
        try:
            return decode_image(picture, image_size)
        except UnreadableError as error:
            raise UnreadableError(f"{picture}: {error}") from None
    if isinstance(picture, Tensor):
        picture = picture.detach().cpu()
        if picture.is_floating_point():
            if not -0.01 <= picture.min() <= picture.max() <= 1.01:
                raise ValueError("the numbers of a tensor must lie in 0 to 1, not be normalized")
            picture = (255 * picture).round().clamp(0, 255).byte()
        picture = picture.movedim(0, -1) if picture.ndim == 3 else picture
        picture = picture.numpy()
    if isinstance(picture, np.ndarray):
        if picture.ndim == 3 and picture.shape[2] == 1:
            picture = picture[..., 0]
        is_color = picture.ndim == 3 and picture.shape[2] in (3, 4)
        if picture.dtype != np.uint8 or not (is_color or picture.ndim == 2):
            shape = tuple(original.shape)
            raise ValueError(
                "expected an array of uint8, (H, W, 3) or (H, W), or a tensor, (3, H, W) or "
                f"(H, W), of uint8 or of numbers from 0 to 1; got {original.dtype} {shape}"
            )
        picture = Image.fromarray(picture)
    if not isinstance(picture, Image.Image):
        kind = type(original).__name__
        raise ValueError(f"expected a PIL image, path, bytes, array or tensor, got {kind}")
    return squash(as_rgb(upright(picture.copy())), image_size)


def network_hash(model: CBSwR, features: str = "embedding") -> str:
    """Return the SHA-256 of the weights that make features: "pooled" has none of the head."""
    parts = ("base_model.",) if features == "pooled" else ("base_model.", "feat_ext.")
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if name.startswith(parts):
            array = value.detach().cpu().contiguous().numpy()
            digest.update(f"{name} {array.dtype} {array.shape}\0".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()
