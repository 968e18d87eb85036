"""Stanford Online Products and In-shop Clothes from raw files to scores, in small."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from raw_folders import make_inshop, make_sop
from scripts import Outcome, failed, run_in_process

from datasets.arrays import load_split
from utils import evaluation
from utils.errors import UserError

MAKE = {"sop": make_sop, "inshop": make_inshop}
KS = {"sop": (1, 10, 100, 1000), "inshop": (1, 10, 20, 30, 40, 50)}
NETWORK = ("--device", "cpu", "--backbone", "resnet_small", "--weights", "none")
pytestmark = pytest.mark.usefixtures("one_thread")


def arrays(folder: Path, dataset: str) -> Path:
    """Pre-process a small raw folder at 32 px; returns the --data_dir."""
    MAKE[dataset](folder / dataset, each=8)
    options = ("--data_dir", folder, "--image_size", 32, "--workers", 1)
    assert run_in_process(f"pre_process_{dataset}.py", *options).code == 0
    return folder


def train(data: Path, dataset: str) -> Outcome:
    sizes = ("--batch_size", 8, "--n_cluster", 4, "--low_dim", 16, "--lr", 0.05, "--n_epoch", 1)
    where = ("--data_dir", data, "--checkpoint_dir", data, "--model_name", "run")
    return run_in_process("train.py", "--dataset", dataset, *NETWORK, *sizes, *where)


def rows_of(data: Path) -> list[dict]:
    lines = (data / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def literal_recall(
    embeddings: np.ndarray, labels: np.ndarray, is_query: np.ndarray | None, k: int
) -> float:
    """Search query by query in float64; at equal distance the earlier row is nearer."""
    rows = embeddings.astype(np.float64)
    everything = range(len(rows))
    hits = []
    for query in everything if is_query is None else np.flatnonzero(is_query):
        searched = everything if is_query is None else np.flatnonzero(~is_query)
        distances = np.square(rows[query] - rows).sum(1)
        nearest = sorted(set(searched) - {query}, key=lambda row: (distances[row], row))
        hits.append(labels[query] in labels[nearest[:k]])
    return sum(hits) / len(hits)


@pytest.mark.parametrize("dataset", MAKE)
def test_from_raw_files_to_scores(dataset, tmp_path):
    data = arrays(tmp_path, dataset)
    done = train(data, dataset)
    assert done.code == 0, done
    row = rows_of(data)[0]
    names = [f"recall@{k}" for k in KS[dataset]]
    assert [name for name in row if name.startswith("recall@")] == names
    assert " ".join(f"R@{k} {100 * row[f'recall@{k}']:.2f}" for k in KS[dataset]) in done.out
    assert "R@2 " not in done.out
    options = ("--data_dir", data, "--dataset", dataset, "--device", "cpu")
    files = ("--json", tmp_path / "scores.json", "--save_embeddings", tmp_path / "e.npy")
    checkpoint = ("--checkpoint_path", data / "run" / "last.pth")
    done = run_in_process("test.py", *options, *checkpoint, *files)
    assert (done.code, done.err) == (0, "")
    scores = json.loads((tmp_path / "scores.json").read_text())
    embeddings = np.load(tmp_path / "e.npy")
    half = load_split(data, dataset, "validation")
    for k, name in zip(KS[dataset], names, strict=True):
        literal = literal_recall(embeddings, half.labels, half.is_query, k)
        assert scores[name] == literal == row[name]
    assert 0 < scores["recall@1"] < 1
    assert {"nmi", "ami", "map@r", "r_precision"} <= scores.keys()
    assert scores.get("queries") == (24 if dataset == "inshop" else None)


def test_nmi_left_out_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "MOST_NMI_CLASSES", 2)
    data = arrays(tmp_path, "inshop")
    done = train(data, "inshop")
    assert "nmi" not in rows_of(data)[0]
    reason = "3 classes, more than 2, take long"
    assert rows_of(data)[0]["nmi_left_out"] == reason
    assert reason in done.out
    assert (
        run_in_process("train.py", "--resume", data / "run", "--n_epoch", 2, "--nmi", "on").code
        == 0
    )
    assert "nmi" in rows_of(data)[1]


# ----------------------------------------------------------------------------------- the roles


WRONG_ROLES = [None, np.zeros(24), np.zeros(48, int), np.arange(48) % 3, [0, 1]]


@pytest.mark.parametrize("roles", WRONG_ROLES)
def test_roles_that_cannot_be(tmp_path, roles):
    arrays(tmp_path, "inshop")
    file = tmp_path / "inshop" / "validation_inshop_32resized_role.npy"
    file.unlink()
    if roles is not None:
        np.save(file, roles)
    with pytest.raises(UserError, match=r"role\.npy"):
        load_split(tmp_path, "inshop", "validation")


def test_a_run_is_not_resumed_with_other_roles(tmp_path):
    data = arrays(tmp_path, "inshop")
    assert train(data, "inshop").code == 0
    file = data / "inshop" / "validation_inshop_32resized_role.npy"
    roles = np.load(file)
    np.save(file, 1 - roles)
    resume = ("train.py", "--resume", data / "run", "--n_epoch", 2)
    failed(run_in_process(*resume), "the validation half is not the one that the run began with")
    np.save(file, roles)
    assert run_in_process(*resume).code == 0
