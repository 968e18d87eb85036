"""Reading weights of backbones: torch files, HDF5 (plain or by hickle), safetensors, downloads."""

from __future__ import annotations

import os
import re
from pathlib import Path

import h5py
import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from models.backbones import BACKBONES
from models.googlenet import from_caffe_name
from models.tensor_names import check_tensors, flat_tensors, say_prefix, some_names, without_prefix
from models.timm_backbones import TIMM_PREFIX, import_timm
from utils.errors import UserError
from utils.torch_files import read_torch_file

GOOGLENET_FILE = Path(__file__).resolve().parent / "googlenet.h5"
GOOGLENET_SOURCE = "github.com/vadimkantorov/metriclearningbench (release `data`, googlenet.h5)"
_QUOTED = re.compile(r"""(['"])(.+)\1""")
_COUNTER = "num_batches_tracked"
_HEAD = re.compile(  # of classifiers and of self-supervised training, which no backbone here has
    r"(fc|classifier|head|heads|aux1|aux2|loss\d|feat_ext|clustering|decoder|"
    r"project\w*|predict\w*)\b"
)
_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"


def read_hdf5_arrays(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read every floating-point array of an HDF5 file of hickle 3, hickle 4/5 or plain HDF5.

    hickle keeps `a.b` at `/data_0/'a.b'/data_0` or `/data/"a.b"`; in a plain file the path `/a/b`
    or `/a.b` names it. Raises UserError if the file cannot be read or holds no such array.
    """
    arrays: dict[str, Tensor] = {}

    def visit(where: str, item: object) -> None:
        if isinstance(item, h5py.Dataset) and item.shape is not None and item.dtype.kind == "f":
            quoted = [m.group(2) for part in where.split("/") if (m := _QUOTED.fullmatch(part))]
            name = quoted[-1] if quoted else where.replace("/", ".")
            arrays[name] = torch.from_numpy(np.asarray(item[()], dtype=np.float32))

    try:
        with h5py.File(path, "r") as file:
            file.visititems(visit)
    except Exception as error:  # h5py raises almost anything for a damaged file
        raise UserError(f"{path}: not a readable HDF5 file ({error}); fetch it again") from None
    if not arrays:
        raise UserError(f"{path}: holds no floating-point arrays; expected weights of a backbone")
    return arrays


def read_weights_file(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read all tensors of a torch, HDF5 or safetensors file, which its first bytes tell apart.

    Raises UserError if the file is missing, of another kind, or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no such file"
        raise UserError(f"weights {path}: {kind}; give a file, auto or none")
    with open(path, "rb") as file:
        start = file.read(9)
    if start.startswith(_HDF5_SIGNATURE):
        return read_hdf5_arrays(path)
    if start.endswith(b"{"):  # 8 bytes hold the length of the header that begins here
        return _read_safetensors(path)
    tensors = flat_tensors(read_torch_file(path))
    if not tensors:
        raise UserError(f"{path}: holds no named tensors; expected a state_dict of a backbone")
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{path}: needs a package; pip install safetensors") from None
    try:
        return load_file(path)
    except Exception as error:  # of the reader's own kind
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def load_backbone_weights(backbone: nn.Module, name: str, weights: str | os.PathLike) -> None:
    """Fill a backbone in place.

    Args:
        backbone: the module that the spec of `name` makes.
        weights: the path of a file, or "auto": models/googlenet.h5 for the paper's backbone, the
            ImageNet weights of torchvision or timm for the rest.

    Raises UserError if a file is missing or unreadable, a download fails, or the weights do not
    belong to the backbone.
    """
    source = str(weights)
    if weights != "auto":
        arrays = read_weights_file(weights)
    elif name in {"googlenet", "googlenet_fallback_lrn"}:
        source = str(GOOGLENET_FILE)
        arrays = _read_googlenet_file()
    else:
        arrays = _download(name)
    _fill(backbone, arrays, name, source)


def _read_googlenet_file() -> dict[str, Tensor]:
    if not GOOGLENET_FILE.is_file():
        raise UserError(
            f"{GOOGLENET_FILE}: no such file; the paper's backbone starts from these ImageNet "
            "weights. Run python pre_process/download.py googlenet, or take them from "
            f"{GOOGLENET_SOURCE} and put them there. Or give other weights, another backbone "
            "(resnet18, googlenet_bn, ... fetch their own), or the weights none for a random "
            "start"
        )
    return read_weights_file(GOOGLENET_FILE)


def _download(name: str) -> dict[str, Tensor]:
    """Return the ImageNet weights of a backbone from torchvision or timm."""
    advice = "fetch a file by hand and give its path as weights, or none for a random start"
    if name in BACKBONES and BACKBONES[name].torchvision_weights is None:
        raise UserError(f"there are no pretrained weights for {name}; give the weights none")
    try:
        if name.startswith(TIMM_PREFIX):
            timm_name = name.removeprefix(TIMM_PREFIX)
            network = import_timm().create_model(timm_name, pretrained=True, num_classes=0)
            return {f"network.{key}": value for key, value in network.state_dict().items()}
        weights = getattr(torchvision.models, BACKBONES[name].torchvision_weights)
        return weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
    except UserError:
        raise
    except Exception as error:  # of urllib, ssl, the hub: nothing in common
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"cannot download the weights of {name} ({reason}); {advice}") from None


def _fill(backbone: nn.Module, tensors: dict[str, Tensor], name: str, source: str) -> None:
    """Put named tensors into a backbone. Raises UserError if they do not belong to it."""
    expected = backbone.state_dict()
    n_required = sum(not key.endswith(_COUNTER) for key in expected)
    faults = {}
    for prefix, named in without_prefix(tensors, min(n_required // 2, len(tensors))).items():
        named = _spelled(named, expected)
        faults[prefix] = _faults(named, expected)
        if not faults[prefix]:
            say_prefix(prefix, source)
            check_tensors(named, source)
            backbone.load_state_dict(named, strict=False)
            return
    nearest = min(faults.values(), key=len)
    raise UserError(
        f"{source}: not the weights of {name}: {nearest[0]} ({len(nearest)} names do not fit); the "
        f"file holds {some_names(tensors)}, expected were {some_names(expected)}"
    )


def _spelled(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Translate the names of Caffe, timm and CBSwR checkpoints; heads are left out."""
    spelled = {}
    for name, value in tensors.items():
        name = name.removeprefix("base_model.")
        spellings = (name, from_caffe_name(name), f"network.{name}")
        fitting = [spelling for spelling in spellings if spelling in expected]
        if fitting or not _HEAD.match(name):
            spelled[fitting[0] if fitting else name] = value
    return spelled


def _faults(named: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Say of each name that does not fit what is wrong with it."""
    faults = []
    for name, value in expected.items():
        if name.endswith(_COUNTER):
            continue
        if name not in named:
            faults.append(f"{name} is missing")
        elif named[name].shape != value.shape:
            shapes = f"{tuple(named[name].shape)}, not {tuple(value.shape)}"
            faults.append(f"{name} has the shape {shapes}")
    return faults + [f"{name} is not in this network" for name in named.keys() - expected.keys()]
