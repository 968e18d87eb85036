"""An index that stays on the disk: built once, memory-mapped afterwards, grown with its rows.

`FILE` is faiss's own. `FILE.npz` holds the hash of the row at each place of it, the number of that
row, and the facts: of which network the rows are, the kind of the index, and a hash of all facts of
the rows, by which an index that fits is known.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from utils.embeddings import NOT_COMPARED, Embeddings
from utils.errors import UserError
from utils.files import written_whole
from utils.index import Index, check_faiss, faiss

MOST_GONE = 0.1  # share of the places whose rows are gone, from which on it is built anew


def kept_index(
    embeddings: Embeddings, file: Path, kind: str | None, **options: int
) -> tuple[Index, str]:
    """Open the index in a file and add what is new, or build it and write it there.

    Args:
        kind: of the index; None: as it is in the file, or exact, for which nothing is kept.
        options: of `Index`.

    Returns the index, and what was done, in words. Raises UserError if the file holds an index of
    another network or of another kind.
    """
    is_there = file.exists() or Path(f"{file}.npz").exists()
    facts_there, arrays, opened = _read(file) if is_there else ({}, {}, None)
    network = embeddings.facts["network_sha256"]
    if facts_there and facts_there["network"] != network:
        raise UserError(f"{file}: an index of another network; name another file")
    if facts_there and kind not in (None, facts_there["kind"]):
        raise UserError(f"{file}: an index of the kind {facts_there['kind']}; name another file")
    kind = kind or facts_there.get("kind", "exact")
    rows = embeddings.rows
    if kind == "exact":
        return Index(rows), "not needed, as exact search reads the embeddings themselves"
    facts_of_rows = {k: v for k, v in embeddings.facts.items() if k not in NOT_COMPARED}
    images = hashlib.sha256(json.dumps(facts_of_rows, sort_keys=True).encode()).hexdigest()
    facts = {"network": network, "images": images, "kind": kind}
    is_torn = opened is not None and opened.ntotal != len(arrays["keys"])  # by a kill
    if facts_there.get("images") == images and not is_torn:
        return Index(rows, kind, opened=opened, row_of=arrays["row_of"], **options), "opened"
    keys = row_keys(rows)
    old_keys = arrays.get("keys", keys[:0])
    row_of = _places(old_keys, keys)
    n_gone = int((row_of < 0).sum())
    if opened is None or is_torn or n_gone > MOST_GONE * len(row_of):
        index = Index(rows, kind, **options)
        _write(file, index, facts, keys, np.arange(len(rows)))
        return index, f"built anew, as {n_gone} rows are gone" if n_gone else "built"
    is_new = np.ones(len(rows), bool)
    is_new[row_of[row_of >= 0]] = False
    if not is_new.any():
        with written_whole(f"{file}.npz") as beside:
            _save_keys(beside, facts, old_keys, row_of)
        return Index(rows, kind, opened=opened, row_of=row_of, **options), "opened"
    opened = faiss.read_index(str(file))  # what is memory-mapped cannot grow
    Index.add(opened, rows[is_new])
    row_of = np.concatenate([row_of, np.flatnonzero(is_new)])
    index = Index(rows, kind, opened=opened, row_of=row_of, **options)
    _write(file, index, facts, np.concatenate([old_keys, keys[is_new]]), row_of)
    return index, f"opened, {is_new.sum()} rows added"


def row_keys(rows: np.ndarray) -> np.ndarray:
    """Return a hash of each row, and which of its equals it is: structured (N,)."""
    keys = np.empty(len(rows), [("hash", "u8"), ("number", "u4")])
    rows = np.asarray(rows)
    digests = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    keys["hash"] = np.frombuffer(b"".join(digests), "u8")
    order = keys["hash"].argsort(kind="stable")
    ordered = keys["hash"][order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))[: len(rows)]
    lengths = np.diff(np.append(starts, len(rows)))
    keys["number"][order] = np.arange(len(rows)) - np.repeat(starts, lengths)
    return keys


def _places(old_keys: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return for each old key the place of the same key now, -1 if there is none."""
    place_of = {key: place for place, key in enumerate(keys.tolist())}
    return np.array([place_of.get(key, -1) for key in old_keys.tolist()], np.int64)


def _read(file: Path) -> tuple[dict, dict[str, np.ndarray], Any]:
    """Return the facts, keys and row numbers of the places, and the index, memory-mapped."""
    check_faiss()
    try:
        with np.load(f"{file}.npz", allow_pickle=False) as content:
            facts = json.loads(str(content["facts"]))
            facts_there = {name: facts[name] for name in ("network", "images", "kind")}
            arrays = {name: content[name] for name in ("keys", "row_of")}
        if not file.exists():  # removed, to be built anew
            return {}, {}, None
        return facts_there, arrays, faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)
    except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, BadZipFile):
        raise UserError(
            f"{file}, {file}.npz: not an index of search.py; remove them, or name another file"
        ) from None


def _write(file: Path, index: Index, facts: dict, keys: np.ndarray, row_of: np.ndarray) -> None:
    """Write index and keys, the keys last: an index that they do not fit is built anew."""
    with written_whole(f"{file}.npz") as beside_keys, written_whole(file) as beside:
        try:
            faiss.write_index(index.faiss, str(beside))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[-200:]
            raise UserError(f"{file}: cannot be written ({reason}); make room") from None
        _save_keys(beside_keys, facts, keys, row_of)


def _save_keys(path: Path, facts: dict, keys: np.ndarray, row_of: np.ndarray) -> None:
    """Write what is kept beside an index."""
    with open(path, "wb") as out:  # np.savez would add .npz to the path
        np.savez(out, keys=keys, row_of=row_of, facts=json.dumps(facts))
