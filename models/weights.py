"""Reading pretrained backbone weights: torch files, HDF5 (plain or written by hickle), torchvision's downloads.

Nothing in these files is ever executed: torch files load with `weights_only`, of HDF5 only numeric arrays are read.
"""

from __future__ import annotations

import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from models.backbones import BACKBONES, BackboneSpec
from models.googlenet import from_caffe_name
from utils.errors import UserError

GOOGLENET_FILE = Path(__file__).resolve().parent / "googlenet.h5"
GOOGLENET_SOURCE = "github.com/vadimkantorov/metriclearningbench (release `data`, file googlenet.h5)"
_QUOTED = re.compile(r"""(['"])(.+)\1""")
_CLASSIFIER = re.compile(r"(fc|aux1|aux2|loss\d)\b")  # of a network trained to classify; no backbone has them
_MOST_FLOATS = 2**28  # 1 GiB in float32, six times the largest backbone: more is no file of weights
_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"


def read_torch_file(path: str | os.PathLike, device: str | torch.device = "cpu") -> object:
    """Load a file written by `torch.save` without executing anything in it.

    Raises UserError naming the file: missing, truncated, not a torch file, compressed, or holding more than plain data.
    """
    path = Path(path)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {what}; give the path of a file written by torch.save")
    with open(path, "rb") as file:
        start = file.read(2)
    if start != b"PK" and start[:1] != b"\x80":  # a zip archive, or a pickle as torch wrote it before 1.6
        raise UserError(f"{path}: not a file written by torch.save; give a checkpoint or a state_dict")
    if start == b"PK":
        _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on how it was pickled
            return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = (
            "it holds Python objects beyond tensors and plain values, which could run code"
            if ("weights_only" in str(error).lower() or "Unsupported" in str(error))
            else "it is not a file written by torch.save, or it is damaged"
        )
        raise UserError(f"{path}: refused: {reason}; save a plain state_dict and try again") from None
    except Exception as error:  # a damaged file fails anywhere in torch's readers, with no common class of error
        raise UserError(f"{path}: damaged or truncated ({type(error).__name__}); fetch or make it again") from None


def _check_archive(path: Path) -> None:
    """Raise UserError unless a zip archive is a whole one of torch.save, stored as it is and no larger than the file.

    torch would unpack a compressed one, and a few kilobytes can unpack to any size; nor does it compare checksums.
    """
    again = "fetch or make it again"
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = {entry.filename.rpartition("/")[2] for entry in entries}
            if "data.pkl" not in names or "constants.pkl" in names:  # the latter: code for torch.jit
                kind = "a TorchScript program" if "constants.pkl" in names else "a zip archive of something else"
                raise UserError(f"{path}: {kind}, not a file written by torch.save; give a checkpoint or a state_dict")
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if not stored or sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise UserError(f"{path}: refused: it unpacks to more than it holds, as no file of torch.save; {again}")
            wrong = archive.testzip()
    except UserError:
        raise
    except Exception as error:  # zipfile raises almost anything for damaged archives
        raise UserError(f"{path}: damaged or truncated ({type(error).__name__}); {again}") from None
    if wrong is not None:
        raise UserError(f"{path}: damaged: its part {wrong} does not match its checksum; {again}")


def check_tensors(named: dict[str, Tensor], path: str | os.PathLike) -> None:
    """Raise UserError naming the first tensor from the file `path` that cannot be a network's weights.

    One that is sparse, quantised or complex, that claims more bytes than the whole file has, or is not finite.
    """
    size = os.path.getsize(path)
    for name, value in named.items():
        if value.layout != torch.strided or value.is_quantized or value.is_complex() or value.device.type == "meta":
            raise UserError(f"{path}: {name} is not a plain tensor of real numbers; save a plain state_dict")
        if value.numel() * value.element_size() > size:
            raise UserError(
                f"{path}: {name} claims the shape {tuple(value.shape)}, more than the file holds; get another"
            )
        if value.is_floating_point() and not value.float().isfinite().all():
            raise UserError(f"{path}: {name} holds NaN or infinite values: its training diverged; take another file")


def read_hdf5_arrays(path: str | os.PathLike) -> dict[str, Tensor]:
    """Every floating-point array of an HDF5 file by name, for files of hickle 3, hickle 4/5 and plain HDF5.

    hickle keeps `a.b` at `/data_0/'a.b'/data_0` or `/data/"a.b"`; in a plain file the path `/a/b` or `/a.b` names it.
    Pickled parts (hickle stores Python objects as bytes) are never looked at. Raises UserError for anything else.
    """
    import h5py  # only users of .h5 files wait for it

    path = Path(path)
    arrays: dict[str, Tensor] = {}

    def visit(where: str, item: object) -> None:
        own = isinstance(item, h5py.Dataset) and not (item.external or item.is_virtual)  # else kept in another file
        if not own or item.shape is None or item.dtype.kind != "f":
            return
        floats = item.size + sum(value.numel() for value in arrays.values())
        if floats > _MOST_FLOATS:
            raise UserError(
                f"{path}: {where} claims the shape {item.shape}, more than any weights take; get another file"
            )
        arrays[_hdf5_name(where)] = torch.from_numpy(item[()].astype("float32", copy=False).reshape(item.shape))

    try:
        with h5py.File(path, "r") as file:
            file.visititems(visit)
    except UserError:
        raise
    except Exception as error:  # h5py raises almost anything for damaged files
        raise UserError(f"{path}: not a readable HDF5 file ({error}); fetch it again") from None
    if not arrays:
        raise UserError(f"{path}: holds no floating-point arrays; expected the weights of a backbone")
    return arrays


def _hdf5_name(where: str) -> str:
    quoted = [m.group(2) for part in where.split("/") if (m := _QUOTED.fullmatch(part))]
    return quoted[-1] if quoted else where.replace("/", ".")


def _download(spec: BackboneSpec, backbone: str) -> dict[str, Tensor]:
    import torchvision

    weights = getattr(torchvision.models, spec.torchvision_weights).IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except Exception as error:  # urllib, ssl, socket and hash faults share no base class; all of them end here
        raise UserError(
            f"{weights.url}: cannot download the ImageNet weights of {backbone} ({error}); fetch that file by hand and "
            f"give --weights FILE, or choose --weights none (random start)"
        ) from None


def _backbone_names(arrays: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring every naming in use to the backbone's own: Caffe's, torchvision's, with or without known prefixes."""
    named = {}
    for name, value in arrays.items():
        name = name.removeprefix("module.").removeprefix("base_model.")
        if not _CLASSIFIER.match(name):
            translated = from_caffe_name(name)
            named[translated if translated in own else name] = value
    return named


def load_backbone_weights(backbone: nn.Module, name: str, weights: str | os.PathLike) -> None:
    """Fill `backbone` in place.

    `weights`: "auto" (models/googlenet.h5 for googlenet, torchvision's ImageNet weights or timm's for the others) or a
    path. Raises UserError for a missing or unreadable file, a failed download, or weights of another network.
    """
    if name not in BACKBONES:
        from models.timm_backbones import load_timm_weights

        load_timm_weights(backbone, weights)
        return
    spec = BACKBONES[name]
    if weights == "auto" and name in {"googlenet", "googlenet_caffe"}:
        weights = GOOGLENET_FILE
        if not weights.is_file():
            raise UserError(
                f"{weights}: no such file; the paper's backbone starts from these ImageNet weights: run python "
                f"pre_process/download.py googlenet, or take them from {GOOGLENET_SOURCE} and put them there, or "
                f"give --weights FILE, choose another --backbone "
                f"(resnet18, googlenet_bn, ... fetch their own), or --weights none for a random start"
            )
    if weights == "auto" and spec.torchvision_weights is None:
        raise UserError(f"--weights auto: no pretrained weights exist for {name}; use --weights none")
    if weights == "auto":
        source, arrays = f"torchvision {spec.torchvision_weights}.IMAGENET1K_V1", _download(spec, name)
    else:
        source, arrays = str(weights), read_weights_file(weights)
    fill(backbone, arrays, name, source)


def read_weights_file(path: str | os.PathLike) -> dict[str, Tensor]:
    """The named tensors of a torch, HDF5 or safetensors file, checked; UserError where it is none."""
    arrays = _read_named_tensors(Path(path))
    check_tensors(arrays, path)
    return arrays


def _read_named_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise UserError(f"--weights {path}: {what}; give a torch, HDF5 or safetensors file, or auto or none")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    with open(path, "rb") as file:
        is_hdf5 = file.read(8) == _HDF5_SIGNATURE
    if is_hdf5 or path.suffix in {".h5", ".hdf5"}:
        return read_hdf5_arrays(path)
    content = read_torch_file(path)
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    named = content.items() if isinstance(content, dict) else ()
    arrays = {k: v for k, v in named if isinstance(k, str) and isinstance(v, Tensor)}
    if not arrays:
        raise UserError(f"{path}: holds no named tensors; expected a state_dict of a backbone")
    return arrays


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"--weights {path}: needs the package safetensors; pip install safetensors") from None
    try:
        return load_file(path)
    except Exception as error:  # of the reader's own kind
        raise UserError(f"{path}: not a readable safetensors file ({error}); fetch it again") from None


def fill(backbone: nn.Module, arrays: dict[str, Tensor], name: str, source: str) -> None:
    """Put named tensors into a network in place; UserError where they are not its own."""
    own = backbone.state_dict()
    arrays = _backbone_names(arrays, own)
    missing = [key for key in own if key not in arrays and not key.endswith("num_batches_tracked")]
    if missing:
        raise UserError(
            f"{source}: not the weights of {name}: {len(missing)} of {len(own)} arrays are missing, the first is "
            f"{missing[0]}; choose the --backbone they belong to"
        )
    for key, value in own.items():
        if key in arrays and arrays[key].shape != value.shape:
            raise UserError(
                f"{source}: not the weights of {name}: {key} has shape {tuple(arrays[key].shape)}, "
                f"expected {tuple(value.shape)}; choose the --backbone they belong to"
            )
        if key in arrays and arrays[key].is_floating_point() != value.is_floating_point():
            raise UserError(
                f"{source}: not the weights of {name}: {key} holds {arrays[key].dtype}, expected {value.dtype}; "
                f"save the weights in floating point"
            )
    # halves widen to the network's dtype on copying
    backbone.load_state_dict({key: arrays[key] for key in own if key in arrays}, strict=False)
