"""Figures of the released code: the same weights and inputs must give the same numbers here, in float64."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_state import golden_images, golden_state
from torch.nn import functional as F

from losses import cbswr_losses, center_softmax_loss, rim_loss, total_loss
from models import build_model, load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
GOLDEN = Path(__file__).parent / "golden"
LOSSES = np.load(GOLDEN / "losses.npz")
NETWORK = np.load(GOLDEN / "network.npz")
CASES = sorted({name.split("_")[0] for name in LOSSES.files})
STATE = golden_state(json.loads(str(NETWORK["shapes"])), seed=int(NETWORK["seed"]))
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def near(actual: torch.Tensor, expected: np.ndarray, **tolerance: float) -> None:
    torch.testing.assert_close(actual.detach(), torch.as_tensor(expected), **(tolerance or EXACT))


def case(name: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(f"{name}_"): torch.from_numpy(LOSSES[key]) for key in LOSSES.files if key.startswith(name)}


@pytest.fixture(scope="module")
def network():
    model = build_model("googlenet", int(NETWORK["n_cluster"]), 128).double()
    model.load_state_dict(STATE)
    return model.eval()


def test_there_are_four_loss_cases():
    assert CASES == ["case0", "case1", "case2", "case3"]


@pytest.mark.parametrize("name", CASES)
def test_metric_loss_and_gradient(name):
    data = case(name)
    x = data["x"].requires_grad_()
    loss = center_softmax_loss(
        x, data["centers"], data["pseudo_labels"], float(data["temperature"]), float(data["alpha"])
    )
    near(loss, data["metric_loss"])
    near(torch.autograd.grad(loss, x)[0], data["metric_grad_x"])


@pytest.mark.parametrize("name", CASES)
def test_rim_loss_and_gradient(name):
    data = case(name)
    logits = data["logits"].requires_grad_()
    loss = rim_loss(F.normalize(logits, dim=1), float(data["mu"]))
    near(loss, data["rim_loss"])
    near(torch.autograd.grad(loss, logits)[0], data["rim_grad_logits"])


def test_names_and_shapes_are_those_of_the_released_checkpoints(network):
    own = {name: list(value.shape) for name, value in network.state_dict().items()}
    assert own == json.loads(str(NETWORK["shapes"]))


@torch.no_grad()
def test_forward(network):
    embedding, cluster_logits, feature_map = network(golden_images(2, 101))
    near(embedding, NETWORK["embedding"])
    near(cluster_logits, NETWORK["cluster_logits"])
    near(F.normalize(network.pool(feature_map), dim=1), NETWORK["pooled"])
    near(feature_map.mean((2, 3)), NETWORK["feature_map_mean"])
    near(feature_map[:, :16, 0, 0], NETWORK["feature_map_corner"])
    reconstruction = network.decoder(feature_map)
    near(reconstruction.mean((2, 3)), NETWORK["reconstruction_mean"])
    near(reconstruction[:, :, :4, :4], NETWORK["reconstruction_corner"])


@torch.no_grad()
def test_features_of_retrieval_are_the_same_pooled_and_embedding(network):
    pooled, embedding = network.features(golden_images(2, 101))
    near(pooled, NETWORK["pooled"])
    near(embedding, NETWORK["embedding"])


def test_three_training_steps():
    model = build_model("googlenet", int(NETWORK["n_cluster"]), 128).double()
    model.load_state_dict(STATE)
    model.train()
    model.clustering[1].eval()  # dropout draws at random; the golden run went without
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step, expected in enumerate(NETWORK["step_losses"]):
        first = golden_images(int(NETWORK["batch_size"]), 201 + step)
        losses = cbswr_losses(model, torch.cat([first, first.flip(3) * 0.9]))
        total = total_loss(losses)
        assert losses["pseudo_labels"].tolist() == NETWORK["step_pseudo_labels"][step].tolist()
        near(torch.stack([losses["metric"], losses["rim"], losses["reconstruction"], total]), expected)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    with torch.no_grad():
        near(model.eval()(golden_images(2, 101))[0], NETWORK["embedding_after"])


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_released_file_loads_and_says_what_it_is(tmp_path, prefix):
    path = tmp_path / "released.pth"
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3).state_dict()
    torch.save(
        {"model": {prefix + name: v.float() if v.is_floating_point() else v for name, v in STATE.items()},
         "epoch": 7, "optimizer": optimizer}, path)  # fmt: skip
    model, info = load_checkpoint(path)
    assert info == {
        "path": str(path), "epoch": 7, "backbone": "googlenet", "n_cluster": 20, "low_dim": 128, "config": {},
        "data": {}, "image_size": None,
    }  # fmt: skip
    assert not model.training
    with torch.no_grad():
        embedding = model(golden_images(2, 101).float())[0]
    near(embedding, NETWORK["embedding"].astype(np.float32), rtol=0, atol=2e-6)
