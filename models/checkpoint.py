"""From a checkpoint file to a network: the project's own files and the authors' released ones."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from models.backbones import BACKBONES, backbone_spec
from models.cbswr import CBSwR, build_model
from models.pooling import PAPER, Pooling
from models.timm_backbones import is_timm_name
from models.weights import check_tensors, read_torch_file
from utils.errors import UserError
from utils.runs import find_checkpoint


def load_checkpoint(path: str | os.PathLike, device: str | torch.device = "cpu") -> tuple[CBSwR, dict]:
    """Rebuild the network of a checkpoint: (model in evaluation mode on `device`, info).

    Backbone, K and embedding size are read from the file: {"model": state_dict, "epoch": int, ...} with the published
    names; a bare state_dict is taken too. info: `path`, `epoch` (None if unknown), `backbone`, `n_cluster`, `low_dim`,
    `config` (the options of the run; {} for the authors' files), `data` (the fingerprints of its images and labels; {}
    if unknown) and `image_size` (the side of the stored images that it was trained on, in pixels; None if unknown).
    Raises UserError naming the file when it is no such checkpoint.
    """
    content = read_torch_file(path, "cpu")
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a checkpoint: expected a dictionary, found {type(content).__name__}")
    state = content.get("model", content)
    named = isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    if not named or not state:
        raise UserError(f"{path}: not a checkpoint: it holds no state_dict under 'model'")
    state = {name.removeprefix("module."): value for name, value in state.items()}
    config = content.get("config") if isinstance(content.get("config"), dict) else {}
    epoch = content.get("epoch")
    check_tensors(state, path)
    pooling = _pooling(config, path)
    n_cluster, low_dim, backbone = _describe(state, config.get("backbone"), pooling, path)
    model = CBSwR(backbone, n_cluster, low_dim, pooling)
    model.load_state_dict(state)
    info = {
        "path": str(Path(path)),
        "epoch": epoch if isinstance(epoch, int) else None,
        "backbone": backbone,
        "n_cluster": n_cluster,
        "low_dim": low_dim,
        "config": config,
        "data": content["data"] if isinstance(content.get("data"), dict) else {},
        "image_size": _stored_size(content),
    }
    return model.to(device).eval(), info


def load_network(
    device: str | torch.device,
    checkpoint: str | None,
    backbone: str | None = None,
    weights: str | None = None,
    pooling: Pooling = PAPER,
    dim: int | None = None,
) -> tuple[CBSwR, dict]:
    """The network to embed images with, channels last on `device`, and what to say of it.

    checkpoint: a file, or a run's folder (see `find_checkpoint`), for its embedding; or else a frozen backbone and its
    weights and pooling (see `build_model`), for its pooled features. dim: see `CBSwR.shorten`. Raises UserError where
    they cannot be had.
    """
    if checkpoint is None:
        model = build_model(backbone, weights=weights, pooling=pooling)
        return model.to(device, memory_format=torch.channels_last), {
            "features": "pooled", "backbone": backbone, "weights": weights, "checkpoint": None, "epoch": None,
        }  # fmt: skip
    model, info = load_checkpoint(find_checkpoint(checkpoint), device)
    if dim is not None:
        if info["config"].get("head_init", "random") == "random":
            raise UserError(f"--dim {dim}: the numbers of this embedding have no order, its head is not in closed form "
                            "(train.py --head_init); leave it out")  # fmt: skip
        model.shorten(dim)
        info["low_dim"] = dim
    return model.to(memory_format=torch.channels_last), {
        "features": "embedding", "backbone": info["backbone"], "weights": None, "checkpoint": info["path"],
        "flip_eval": info["config"].get("flip_eval") is True,
        "epoch": info["epoch"], "n_cluster": info["n_cluster"], "low_dim": info["low_dim"],
        "image_size": info["image_size"],
    }  # fmt: skip


def _stored_size(content: dict) -> int | None:
    """The side of the training images, from the fingerprint that train.py keeps: "uint8 (N, S, S, 3) sha256 ..."."""
    try:
        found = re.match(r"uint8 \(\d+, (\d+), \1, 3\) ", content["data"]["training"]["images"])
    except (KeyError, TypeError):
        return None
    return int(found.group(1)) if found else None


def _pooling(config: dict, path: str | os.PathLike) -> Pooling:
    """What is pooled, and how, by the options of the run; the paper's for the authors' files."""
    layers, pool, stripes, start = (config.get(name) for name in ("layers", "pool", "stripes", "head_init"))
    if not all(value is None or isinstance(value, str) for value in (layers, pool, stripes, start)):
        raise UserError(f"{path}: not a checkpoint of train.py: layers, pool, stripes and head_init of its config are "
                        "texts")  # fmt: skip
    try:
        return Pooling.parse(layers, pool, start not in {None, "random"}, stripes)
    except UserError as error:
        raise UserError(f"{path}: not a checkpoint of train.py ({error})") from None


def _describe(
    state: dict[str, Tensor], named: object, pooling: Pooling, path: str | os.PathLike
) -> tuple[int, int, str]:
    """K, embedding size and backbone of a state_dict: the backbone `named` by the file if it fits, else by shapes."""
    cluster_head, embedding_head = state.get("clustering.2.weight"), state.get("feat_ext.0.weight")
    if cluster_head is None or embedding_head is None or cluster_head.dim() != 2 or embedding_head.dim() != 2:
        raise UserError(f"{path}: not a CBSwR checkpoint: no weights feat_ext.0 and clustering.2 in it")
    n_cluster, low_dim = cluster_head.shape[0], embedding_head.shape[0]
    if n_cluster < 1 or low_dim < 1:
        raise UserError(f"{path}: not a CBSwR checkpoint: K is {n_cluster} and the embedding has {low_dim} dimensions")
    found = _kinds(state)
    nearest, nearest_faults = "", None
    for backbone in [named] if is_timm_name(named) else sorted(BACKBONES, key=lambda name: name != named):
        try:
            expected = _layout(backbone, n_cluster, low_dim, pooling)
        except UserError:
            if is_timm_name(named):
                raise
            continue  # it has no such layers
        if expected == found:
            return n_cluster, low_dim, backbone
        faults = [n for n in dict.fromkeys((*expected, *found)) if expected.get(n) != found.get(n)]
        if nearest_faults is None or len(faults) < len(nearest_faults):
            nearest, nearest_faults = backbone, faults
    if nearest_faults is None:
        raise UserError(f"{path}: no known backbone has the layers {','.join(pooling.layers)}; get the file again, or "
                        "retrain")  # fmt: skip
    raise UserError(
        f"{path}: fits no known backbone; the nearest is {nearest}, with {len(nearest_faults)} names missing, "
        f"unknown or of another shape or kind, the first is {nearest_faults[0]}; get the file again, or retrain"
    )


@lru_cache(maxsize=len(BACKBONES))  # all of them take a second
def _layout(backbone: str, n_cluster: int, low_dim: int, pooling: Pooling) -> dict[str, tuple]:
    """What the state_dict of such a network holds, see `_kinds`; nothing is allocated."""
    import torchvision  # noqa: F401  # imported for the first time under the meta device, torch 2.6 fails

    if is_timm_name(backbone):
        backbone_spec(backbone)  # its faults, and its imports
    with torch.device("meta"):
        return _kinds(CBSwR(backbone, n_cluster, low_dim, pooling).state_dict())


def _kinds(state: dict[str, Tensor]) -> dict[str, tuple]:
    """Shape of each tensor, and whether it is of floating point."""
    return {name: (tuple(value.shape), value.is_floating_point()) for name, value in state.items()}
