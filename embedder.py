"""Embed images from Python.

from embedder import Embedder

embedder = Embedder("new_checkpoint/CBSwR_my_set")  # or a frozen backbone: "resnet18"
rows = embedder(["a.jpg", Image.open("b.png")])  # float32 (2, D), rows of unit length
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from datasets.arrays import DEFAULT_IMAGE_SIZE
from datasets.images import as_rgb, decode_image, squash
from datasets.views import center_crop, crop_size
from models import BACKBONES, PAPER, CBSwR, Pooling, check_crop_size, load_network
from models.timm_backbones import TIMM_PREFIX
from utils.devices import choose_device
from utils.errors import UserError
from utils.features import extract_features

Picture = Image.Image | str | os.PathLike | np.ndarray | Tensor


class Embedder:
    """Turns images into rows of unit length: a checkpoint's embedding, or pooled features.

    Attributes:
        facts: all that decides what the rows are; equal facts mean equal rows.
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
            source: a checkpoint, the folder of a run, or the name of a backbone.
            weights: of a backbone: auto (ImageNet), none (random, by `seed`), or a file.
            image_size: None: that of the training, or else 256.
            pooling: of a backbone.
            dim: how many numbers of an embedding in closed form to keep; None: all.
            flip: average the features of an image and its mirror image; None: as in training.
            precision: of the network, fp32 or bf16.

        Raises UserError if it cannot be loaded (see `models.load_network`).
        """
        torch.manual_seed(seed)
        source = str(source)
        checkpoint, backbone = source, None
        if source in BACKBONES or source.startswith(TIMM_PREFIX):
            checkpoint, backbone = None, source
        self.model, about = load_network(
            choose_device(str(device)), checkpoint, backbone, weights, pooling, dim
        )
        self.flip = bool(about["flip_eval"]) if flip is None else flip
        self.precision = precision
        self.features = about["features"]
        self.dimension = about.get("low_dim", self.model.pooled_dim)
        self.image_size = image_size or about.get("image_size") or DEFAULT_IMAGE_SIZE
        check_crop_size(self.model.backbone_name, crop_size(self.image_size))
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
            "flip_eval": self.flip,
            "dimension": self.dimension,
            "network_sha256": network_hash(self.model),
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
        embedder = cls(
            facts["backbone"] if is_frozen else checkpoint or facts["checkpoint"],
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

        An image is a PIL image, the path of a file, an array (H, W, 3) of uint8, or a tensor
        (3, H, W) of uint8 or of numbers from 0 to 1; all of them RGB.
        """
        is_single = isinstance(images, Image.Image | str | os.PathLike) or (
            isinstance(images, np.ndarray | Tensor) and images.ndim == 3
        )
        pictures = [images] if is_single else images
        squares = [_as_square(picture, self.image_size) for picture in pictures]
        shape = (-1, self.image_size, self.image_size, 3)
        crops = center_crop(np.array(squares, np.uint8).reshape(shape))
        return self.embed_crops(torch.from_numpy(crops))

    def embed_crops(self, crops: Tensor) -> np.ndarray:
        """Embed center crops, uint8 RGB (b, crop, crop, 3): float32 (b, D), of unit length."""
        if len(crops) == 0:
            return np.empty((0, self.dimension), np.float32)
        pooled, embedding = extract_features(self.model, [crops], self.precision, flip=self.flip)
        if self.features == "embedding":
            return embedding.numpy()
        return F.normalize(pooled, dim=1).numpy()


def _as_square(picture: Picture, image_size: int) -> np.ndarray:
    """Squash an image of any kind to a square, uint8 RGB."""
    if isinstance(picture, str | os.PathLike):
        return decode_image(Path(picture), image_size)
    if isinstance(picture, Tensor):
        if picture.is_floating_point():
            picture = (255 * picture).round().clamp(0, 255).byte()
        picture = picture.permute(1, 2, 0).cpu().numpy()
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    return squash(as_rgb(picture), image_size)


def network_hash(model: CBSwR) -> str:
    """Return the SHA-256 of the weights that make embeddings, of backbone and embedding head."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if name.startswith(("base_model.", "feat_ext.")):
            array = value.detach().cpu().contiguous().numpy()
            digest.update(f"{name} {array.dtype} {array.shape}\0".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()
