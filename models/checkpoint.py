"""From a checkpoint file to a network: the project's own files and the authors' released ones."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from models.backbones import BACKBONES
from models.cbswr import CBSwR, build_model
from models.pooling import PAPER, Pooling
from models.tensor_names import check_tensors, flat_tensors, say_prefix, some_names, without_prefix
from models.timm_backbones import TIMM_PREFIX
from utils.errors import UserError
from utils.runs import find_checkpoint
from utils.torch_files import read_torch_file

EMBEDDING_HEAD = "feat_ext.0.weight"
CLUSTER_HEAD = "clustering.2.weight"
HEADS = {EMBEDDING_HEAD, CLUSTER_HEAD}

# Before runs had a `method`, googlenet meant torch's fallback LRN.
RENAMED_BACKBONES = {"googlenet": "googlenet_fallback_lrn", "googlenet_caffe": "googlenet"}


def load_checkpoint(
    path: str | os.PathLike, device: str | torch.device = "cpu", backbone: str | None = None
) -> tuple[CBSwR, dict]:
    """Rebuild the network of a checkpoint.

    The file holds {"model": state_dict, "epoch": int, ...} with the published names; a bare
    state_dict is taken too. K and the embedding size are read from it.

    Args:
        backbone: for a file that does not say its backbone; None finds one by names and shapes.

    Returns:
        The model in evaluation mode on `device`, and info: path, epoch (None if unknown), step
        (0 unless the file was written within an epoch), backbone,
        n_cluster, low_dim, config (the options of the run; {} for the authors' files), data (the
        fingerprints of its data; {} if unknown), image_size (side of the training images in
        pixels; None if unknown), flip_eval (whether the run averaged mirror images).

    Raises UserError that names the file if it is no such checkpoint.
    """
    content = read_torch_file(path)
    facts = content if isinstance(content, dict) else {}
    config = _current_config(_object(facts, "config"))
    state = _find_state(facts, path)
    pooling = _pooling(config, path)
    n_cluster, low_dim = _sizes(state)
    trained = config.get("backbone")
    if trained and backbone and trained != backbone:
        raise UserError(f"{path}: was trained with the backbone {trained}, not {backbone}")
    backbone = trained or backbone or _find_backbone(state, pooling, path)
    model = CBSwR(backbone, n_cluster, low_dim, pooling)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: does not fit the backbone {backbone} ({reason})") from None
    epoch = facts.get("epoch")
    info = {
        "path": str(Path(path)),
        "epoch": epoch if isinstance(epoch, int) else None,
        "step": _object(facts, "state").get("step", 0),
        "backbone": backbone,
        "n_cluster": n_cluster,
        "low_dim": low_dim,
        "config": config,
        "data": _object(facts, "data"),
        "image_size": _stored_size(_object(facts, "data")),
        "flip_eval": config.get("flip_eval") is True,
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
    """Make the network that embeds images, channels last on `device`.

    Args:
        checkpoint: a file or the folder of a run (see `find_checkpoint`), for its embedding. None:
            a frozen `backbone` with its `weights` and `pooling`, for its pooled features.
        dim: how many numbers of the embedding to keep (see `CBSwR.shorten`).

    Returns the network and what to say of it: features ("embedding" or "pooled"), backbone,
    weights, checkpoint, epoch, flip_eval and, of a checkpoint, n_cluster, low_dim, image_size.
    Raises UserError if it cannot be made.
    """
    if checkpoint is None:
        if dim is not None:
            raise UserError(
                f"{backbone}: its pooled features are not in order; leave out dim {dim}"
            )
        model = build_model(backbone, weights=weights, pooling=pooling)
        about = {"features": "pooled", "backbone": backbone, "weights": weights}
        about |= {"checkpoint": None, "epoch": None, "flip_eval": False}
        return model.to(device, memory_format=torch.channels_last).eval(), about
    model, info = load_checkpoint(find_checkpoint(checkpoint), device, backbone)
    if dim is not None:
        if not _has_closed_form(info):
            raise UserError(
                f"{checkpoint}: the numbers of its embedding are not in order, as its head is not "
                f"in closed form; it cannot be cut to {dim}"
            )
        model.shorten(dim)
        info["low_dim"] = dim
    about = {"features": "embedding", "weights": None, "checkpoint": info["path"]}
    for name in ("backbone", "epoch", "flip_eval", "n_cluster", "low_dim", "image_size"):
        about[name] = info[name]
    return model.to(memory_format=torch.channels_last), about


def _has_closed_form(info: dict) -> bool:
    """Whether the head is as `models.closed_form` made it, by what is known of its training."""
    config = info["config"]
    is_refitted = config.get("refit_head", False) not in (False, "off")
    is_fitted = info["step"] == 0 and (is_refitted or info["epoch"] == 0)
    return config.get("head_init", "random") != "random" and is_fitted


def _object(facts: dict, name: str) -> dict:
    """Return what a checkpoint of train.py holds under a name, {} for files of others."""
    value = facts.get(name)
    return value if isinstance(value, dict) else {}


def _current_config(config: dict) -> dict:
    """Return the options of a run, those of earlier versions translated."""
    if "method" in config or "backbone" not in config:
        return config
    backbone = config["backbone"]
    return config | {"backbone": RENAMED_BACKBONES.get(backbone, backbone)}


def _stored_size(data: dict) -> int | None:
    """Return the side of the training images, from a fingerprint "uint8 (N, S, S, 3) ..."."""
    try:
        match = re.match(r"uint8 \(\d+, (\d+), \1, 3\) ", data["training"]["images"])
    except (KeyError, TypeError):
        return None
    return int(match.group(1)) if match else None


def _pooling(config: dict, path: str | os.PathLike) -> Pooling:
    """Return the pooling of a run, the paper's for a file without options."""
    layers, pool, stripes = (config.get(name) for name in ("layers", "pool", "stripes"))
    is_closed_form = config.get("head_init", "random") != "random"
    try:
        return Pooling.parse(layers, pool, is_closed_form, stripes)
    except (UserError, AttributeError) as error:
        raise UserError(f"{path}: not a checkpoint of train.py ({error})") from None


def _find_state(facts: dict, path: str | os.PathLike) -> dict[str, Tensor]:
    """Return the state_dict of the network, under the published names."""
    is_of_train = "config" in facts and isinstance(facts.get("model"), dict)
    tensors = flat_tensors(facts["model"] if is_of_train else facts)
    for prefix, state in without_prefix(tensors, len(HEADS)).items():
        if state.keys() >= HEADS:
            say_prefix(prefix, path)
            check_tensors(state, path)
            return state
    raise UserError(
        f"{path}: not a CBSwR checkpoint: it holds {some_names(tensors) or 'no named tensors'}, "
        f"and no {' and '.join(sorted(HEADS))}; for weights of a backbone name the backbone "
        "instead, and give this file as its weights"
    )


def _sizes(state: dict[str, Tensor]) -> tuple[int, int]:
    """Return K and the embedding size of a state_dict."""
    return len(state[CLUSTER_HEAD]), len(state[EMBEDDING_HEAD])


def _find_backbone(state: dict[str, Tensor], pooling: Pooling, path: str | os.PathLike) -> str:
    """Return the first backbone whose names and shapes are those of a state_dict."""
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    differences = {}
    for backbone in BACKBONES:
        try:
            expected = _shapes(backbone, *_sizes(state), pooling)
        except UserError:  # it has no such layers
            continue
        names = dict.fromkeys((*expected, *shapes))
        differences[backbone] = [n for n in names if expected.get(n) != shapes.get(n)]
        if not differences[backbone]:
            return backbone
    nearest = min(differences, key=lambda name: len(differences[name]), default=None)
    if nearest is None:
        raise UserError(f"{path}: no backbone has its layers; {TIMM_PREFIX}NAME must be given")
    raise UserError(
        f"{path}: fits no known backbone; the nearest is {nearest}, with "
        f"{len(differences[nearest])} "
        f"names missing, unknown or of another shape, the first is {differences[nearest][0]}"
    )


@lru_cache(maxsize=len(BACKBONES))
def _shapes(backbone: str, n_cluster: int, low_dim: int, pooling: Pooling) -> dict[str, tuple]:
    """Return the names and shapes of such a network; nothing is allocated."""
    with torch.device("meta"):
        state = CBSwR(backbone, n_cluster, low_dim, pooling).state_dict()
    return {name: tuple(value.shape) for name, value in state.items()}
