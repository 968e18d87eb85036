"""test.py: what it takes, prints and writes; its scores are those of the embeddings it saves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import Outcome, failed, run_in_process
from synthetic import shapes, write_dataset, write_dataset_by_chance, write_split
from torch.nn import functional as F
from training import before_call, trained

from datasets.arrays import load_split
from models import CBSwR, build_model, load_checkpoint
from utils.metrics import precision_at_r

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset_by_chance(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("new_checkpoint")
    trained(data, folder, n_epoch=2, n_cluster=5)
    return folder / "run"


@pytest.fixture(scope="module")
def recipe_run(data, tmp_path_factory) -> Path:
    """A run whose head is in closed form, and whose features are averaged with the mirror image."""
    return trained(data, tmp_path_factory.mktemp("best"), recipe="best", n_epoch=0).run


@pytest.fixture
def execute(data) -> Callable:
    def execute(*argv: object, data_dir: Path = data, dataset: str = "tiny") -> Outcome:
        at = ("--data_dir", data_dir, "--dataset", dataset, "--device", "cpu")
        return run_in_process("test.py", *at, *argv)

    return execute


@pytest.fixture
def scored(execute, tmp_path) -> Callable:
    def scored(*argv: object, **data: object) -> tuple[dict, np.ndarray, str]:
        """Return the scores, the embeddings and what is printed."""
        targets = (tmp_path / "scores.json", tmp_path / "e.npy")
        result = execute(*argv, "--json", targets[0], "--save_embeddings", targets[1], **data)
        assert (result.code, result.err) == (0, "")
        return json.loads(targets[0].read_text()), np.load(targets[1]), result.out

    return scored


def literal_recall(embeddings: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Compute the share of images with one of their class among the k nearest other images."""
    distances = np.linalg.norm(embeddings[:, None] - embeddings[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    nearest = np.argsort(distances, axis=1)[:, :k]
    return float((labels[nearest] == labels[:, None]).any(1).mean())


def center_crops(data: Path) -> torch.Tensor:
    """Cut the crops of the test half by hand."""
    return torch.from_numpy(load_split(data, "tiny", "validation").images[:, 2:30, 2:30].copy())


# ---------------------------------------------------------------- scores


def test_scores_are_those_of_the_saved_embeddings(scored, run, data):
    scores, embeddings, out = scored("--checkpoint_path", run / "last.pth")
    labels = load_split(data, "tiny", "validation").labels
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    for k in (1, 2, 4, 8):
        assert scores[f"recall@{k}"] == pytest.approx(literal_recall(embeddings, labels, k))
        assert f"R@{k} {100 * scores[f'recall@{k}']:.2f}" in out
    assert 0.05 < scores["recall@1"] < scores["recall@4"] < 0.99
    expected = precision_at_r(embeddings, labels)
    assert {name: scores[name] for name in expected} == pytest.approx(expected)
    assert f"NMI {100 * scores['nmi']:.2f}" in out
    assert scores["nmi_protocol"] in out
    facts = {"features": "embedding", "epoch": 2, "n_cluster": 5, "low_dim": 16, "images": 24}
    facts |= {"checkpoint": str(run / "last.pth"), "classes": 4, "image_size": 32, "weights": None}
    facts |= {"pooling": "avg", "flip_eval": False, "precision": "fp32", "device": "cpu"}
    assert facts.items() <= scores.items()


def test_scores_are_those_that_training_printed(scored, run, recipe_run):
    for folder in (run, recipe_run):
        row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        scores, _, _ = scored("--checkpoint_path", folder / "last.pth")
        for name in ("recall@1", "recall@2", "recall@4", "recall@8", "nmi", "nmi_protocol"):
            assert scores[name] == row[name]


def test_the_size_is_that_of_the_training(run, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    write_dataset(tmp_path / "data", size=64)
    argv = ["--dataset=tiny", f"--data_dir={tmp_path / 'data'}", "--device=cpu"]
    argv += [f"--checkpoint_path={run / 'last.pth'}"]
    assert "tiny, 32 px: 24 test images" in run_in_process("test.py", *argv).out
    assert "tiny, 64 px: 24 test images" in run_in_process("test.py", *argv, "--image_size=64").out
    words = [*argv, f"--out={tmp_path / 'e.npy'}"]
    assert " at 32 px" in run_in_process("embed.py", *words).out


def test_embeddings_are_those_of_the_center_crops_in_order(scored, run, data):
    argv = ("--checkpoint_path", run / "last.pth", "--test_batch", 7)
    with before_call(CBSwR, "view_maps", 0, None) as calls:
        _, embeddings, _ = scored(*argv)
    assert len(calls) == 4  # 7, 7, 7 and 3 images
    model, _ = load_checkpoint(run / "last.pth")
    with torch.no_grad():
        expected = model(model.normalization(center_crops(data)))[0]
    np.testing.assert_allclose(embeddings, expected.numpy(), atol=1e-5)


def test_a_frozen_backbone(scored, run, data):
    argv = ("--backbone", "resnet_small", "--weights", run / "last.pth")
    scores, pooled, out = scored(*argv)
    assert (scores["features"], scores["dimension"], scores["checkpoint"]) == ("pooled", 128, None)
    assert f"frozen resnet_small, weights {run / 'last.pth'}" in out
    model, _ = load_checkpoint(run / "last.pth")
    with torch.no_grad():
        expected = F.normalize(model.features(model.normalization(center_crops(data)))[0], dim=1)
    np.testing.assert_allclose(pooled, expected.numpy(), atol=1e-5)


def test_a_released_file_and_its_released_options(execute, tmp_path):
    torch.manual_seed(0)
    state = build_model("googlenet", 20, 128).state_dict()
    torch.save({"model": state, "epoch": 7, "optimizer": {"state": {}}}, tmp_path / "released.pth")
    write_split(tmp_path, "few", "validation", *shapes(8, range(2), 40, seed=3))
    argv = ("--checkpoint_path", tmp_path / "released.pth", "--n_cluster", 32, "--low_dim", 128)
    result = execute(*argv, data_dir=tmp_path, dataset="few")
    assert (result.code, result.err) == (0, "")
    assert "--n_cluster 32: not needed; the checkpoint says 20" in result.out
    assert "--low_dim 128: not needed; the checkpoint says 128" in result.out
    assert "released.pth after epoch 7: googlenet, embedding, 128-d" in result.out


def test_options_that_change_numbers_and_options_that_do_not(scored, run):
    random = ("--backbone", "resnet_small", "--weights", "none", "--seed")
    first, again, other = (scored(*random, seed)[1] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    last = ("--checkpoint_path", run / "last.pth")
    plain = scored(*last)[1]
    assert np.array_equal(scored(*last, "--workers", 0)[1], plain)
    half = scored(*last, "--precision", "bf16")[1]
    assert not np.array_equal(half, plain)
    assert (half * plain).sum(1).min() > 0.97
    scores, _, _ = scored(*last, "--seed", 7, "--nmi_engine", "sklearn")
    assert "sklearn" in scores["nmi_protocol"]
    assert scores["nmi_protocol"].endswith("seed 7")
    scores, _, out = scored(*last, "--nmi", "off")
    assert "nmi" not in scores
    assert "NMI left out: not asked for" in out


def test_mirror_images_are_averaged_as_in_training(scored, recipe_run):
    last = ("--checkpoint_path", recipe_run / "last.pth")
    scores, averaged, out = scored(*last)
    assert scores["flip_eval"] is True
    assert "image and mirror image averaged" in out
    assert np.array_equal(scored(*last, "--flip_eval")[1], averaged)
    scores, plain, _ = scored(*last, "--no-flip_eval")
    assert scores["flip_eval"] is False
    assert not np.array_equal(plain, averaged)


def test_the_first_dimensions_of_a_head_in_closed_form(scored, execute, run, recipe_run):
    last = ("--checkpoint_path", recipe_run)
    scores, cut, _ = scored(*last, "--dim", 6)
    assert scores["dimension"] == 6
    first = scored(*last)[1][:, :6]
    expected = first / np.linalg.norm(first, axis=1, keepdims=True)
    np.testing.assert_allclose(cut, expected, atol=2e-5)
    failed(execute(*last, "--dim", 17), "16 dimensions, not 17")
    failed(execute("--checkpoint_path", run, "--dim", 6), "are not in order")


# ---------------------------------------------------------------- files


def test_a_run_is_found_by_its_folder_and_by_its_published_name(scored, run, tmp_path):
    for name in ("run", "run.pth", "run/best.pth"):
        scores, _, _ = scored("--checkpoint_path", run.parent / name)
        assert scores["checkpoint"] == str(run / "best.pth")
    (tmp_path / "run.pth").write_bytes((run / "last.pth").read_bytes())
    (tmp_path / "run").mkdir()  # a file goes before a folder
    scores, _, _ = scored("--checkpoint_path", tmp_path / "run.pth")
    assert scores["checkpoint"] == str(tmp_path / "run.pth")


def test_a_network_that_diverged(execute, tmp_path, run):
    saved = torch.load(run / "last.pth")
    saved["model"]["base_model.conv1.weight"] *= 1e38
    torch.save(saved, tmp_path / "huge.pth")
    refused = execute("--checkpoint_path", tmp_path / "huge.pth")
    failed(refused, "features are not finite", code=3)
