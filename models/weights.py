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
from models.timm_backbones import TIMM_PREFIX, import_timm
from utils.errors import UserError
from utils.torch_files import read_torch_file

GOOGLENET_FILE = Path(__file__).resolve().parent / "googlenet.h5"
GOOGLENET_SOURCE = "github.com/vadimkantorov/metriclearningbench (release `data`, googlenet.h5)"
_QUOTED = re.compile(r"""(['"])(.+)\1""")
_CLASSIFIER = re.compile(r"(fc|classifier|aux1|aux2|loss\d)\b")  # heads that no backbone here has
_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"


def check_tensors(named: dict[str, Tensor], path: str | os.PathLike) -> None:
    """Raise UserError for the first tensor of the file that is not dense, real and finite."""
    for name, value in named.items():
        if value.layout != torch.strided or value.is_quantized or value.is_complex():
            raise UserError(f"{path}: {name} is not a plain tensor; save a plain state_dict")
        if value.is_floating_point() and not value.float().isfinite().all():
            raise UserError(f"{path}: {name} holds NaN or infinite values; take another file")


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
    """Read the named tensors of a torch, HDF5 or safetensors file.

    Raises UserError if the file is missing, of another kind, or holds no finite tensors.
    """
    path = Path(path)
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no such file"
        raise UserError(f"weights {path}: {kind}; give a file, auto or none")
    with open(path, "rb") as file:
        start = file.read(8)
    if path.suffix == ".safetensors":
        arrays = _read_safetensors(path)
    elif start == _HDF5_SIGNATURE or path.suffix in {".h5", ".hdf5"}:
        arrays = read_hdf5_arrays(path)
    else:
        arrays = _named_tensors(read_torch_file(path))
    if not arrays:
        raise UserError(f"{path}: holds no named tensors; expected a state_dict of a backbone")
    check_tensors(arrays, path)
    return arrays


def _named_tensors(content: object) -> dict[str, Tensor]:
    """Return the state_dict in what torch.save wrote, {} if there is none."""
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    items = content.items() if isinstance(content, dict) else ()
    return {k: v for k, v in items if isinstance(k, str) and isinstance(v, Tensor)}


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


def _fill(backbone: nn.Module, arrays: dict[str, Tensor], name: str, source: str) -> None:
    """Put named tensors into a backbone. Raises UserError if they do not belong to it."""
    expected = backbone.state_dict()
    arrays = _backbone_names(arrays, expected)
    required = [key for key in expected if not key.endswith("num_batches_tracked")]
    missing = [key for key in required if key not in arrays]
    if missing:
        raise UserError(
            f"{source}: not the weights of {name}: {len(missing)} of {len(expected)} arrays are "
            f"missing, the first is {missing[0]}; choose the backbone that they belong to"
        )
    for key in required:
        value = arrays[key]
        if value.shape != expected[key].shape or not value.is_floating_point():
            raise UserError(
                f"{source}: not the weights of {name}: {key} holds {value.dtype} "
                f"{tuple(value.shape)}, expected floating point {tuple(expected[key].shape)}"
            )
    backbone.load_state_dict({key: arrays[key] for key in expected if key in arrays}, strict=False)


def _backbone_names(arrays: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Translate Caffe's, torchvision's and timm's names, with or without prefixes."""
    renamed = {}
    for name, value in arrays.items():
        name = name.removeprefix("module.").removeprefix("base_model.")
        if _CLASSIFIER.match(name):
            continue
        candidates = (name, from_caffe_name(name), f"network.{name}")
        renamed[next((c for c in candidates if c in expected), name)] = value
    return renamed
