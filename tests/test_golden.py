"""Figures of the released code: equal weights and inputs give equal numbers in float64."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden_state import golden_images, golden_state
from torch import Tensor
from torch.nn import functional as F

from losses import cbswr_losses, center_softmax_loss, rim_loss, total_loss
from models import build_model, load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
GOLDEN = Path(__file__).parent / "golden"
LOSSES = np.load(GOLDEN / "losses.npz")
NETWORKS = {
    "googlenet": np.load(GOLDEN / "network_caffe_lrn.npz"),
    "googlenet_fallback_lrn": np.load(GOLDEN / "network.npz"),
}
SHAPES = json.loads(str(NETWORKS["googlenet"]["shapes"]))
STATE = golden_state(SHAPES, seed=int(NETWORKS["googlenet"]["seed"]))
SINGLE_STATE = {n: v.float() if v.is_floating_point() else v for n, v in STATE.items()}


def assert_golden(actual: Tensor, expected: np.ndarray, rtol: float = 1e-9, atol: float = 1e-12):
    torch.testing.assert_close(actual.detach(), torch.as_tensor(expected), rtol=rtol, atol=atol)


def golden_network(backbone: str, training: bool = False) -> torch.nn.Module:
    model = build_model(backbone, n_cluster=20, low_dim=128).double()
    model.load_state_dict(STATE)
    model.train(training)
    model.clustering[1].eval()  # dropout draws at random; the golden run went without
    return model


@pytest.fixture(params=["case0", "case1", "case2", "case3"])
def case(request) -> SimpleNamespace:
    """The tensors of one case of losses.npz by their names."""
    prefix = f"{request.param}_"
    names = [name for name in LOSSES.files if name.startswith(prefix)]
    tensors = {name.removeprefix(prefix): torch.from_numpy(LOSSES[name]) for name in names}
    return SimpleNamespace(**tensors)


def test_metric_loss_and_gradient(case):
    x = case.x.requires_grad_()
    settings = (float(case.temperature), float(case.alpha))
    loss = center_softmax_loss(x, case.centers, case.pseudo_labels, *settings)
    assert_golden(loss, case.metric_loss)
    assert_golden(torch.autograd.grad(loss, x)[0], case.metric_grad_x)


def test_rim_loss_and_gradient(case):
    logits = case.logits.requires_grad_()
    loss = rim_loss(F.normalize(logits, dim=1), float(case.mu))
    assert_golden(loss, case.rim_loss)
    assert_golden(torch.autograd.grad(loss, logits)[0], case.rim_grad_logits)


def test_names_and_shapes_are_those_of_the_released_checkpoints():
    state = build_model("googlenet", n_cluster=20, low_dim=128).state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == SHAPES


@pytest.mark.parametrize("backbone", NETWORKS)
@torch.no_grad()
def test_forward_and_features(backbone):
    figures = NETWORKS[backbone]
    network = golden_network(backbone)
    images = golden_images(2, 101)
    embedding, cluster_logits, feature_map = network(images)
    assert_golden(embedding, figures["embedding"])
    assert_golden(cluster_logits, figures["cluster_logits"])
    assert_golden(feature_map.mean((2, 3)), figures["feature_map_mean"])
    assert_golden(feature_map[:, :16, 0, 0], figures["feature_map_corner"])
    reconstruction = network.decoder(feature_map)
    assert_golden(reconstruction.mean((2, 3)), figures["reconstruction_mean"])
    assert_golden(reconstruction[:, :, :4, :4], figures["reconstruction_corner"])
    pooled, embedding = network.features(images)
    assert_golden(F.normalize(pooled, dim=1), figures["pooled"])
    assert_golden(embedding, figures["embedding"])


def assert_golden_step(network: torch.nn.Module, figures: dict, step: int) -> Tensor:
    """Compare the losses of a training step, and return their weighted sum."""
    first_views = golden_images(int(figures["batch_size"]), 201 + step)
    losses = cbswr_losses(network, torch.cat([first_views, first_views.flip(3) * 0.9]))
    assert losses["pseudo_labels"].tolist() == figures["step_pseudo_labels"][step].tolist()
    total = total_loss(losses)
    parts = [losses["metric"], losses["rim"], losses["reconstruction"], total]
    assert_golden(torch.stack(parts), figures["step_losses"][step])
    return total


@torch.no_grad()
def test_losses_of_the_first_training_step():
    network = golden_network("googlenet", training=True)
    assert_golden_step(network, NETWORKS["googlenet"], 0)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", NETWORKS)
def test_three_training_steps(backbone):
    figures = NETWORKS[backbone]
    network = golden_network(backbone, training=True)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    for step in range(3):
        optimizer.zero_grad()
        assert_golden_step(network, figures, step).backward()
        optimizer.step()
    with torch.no_grad():
        assert_golden(network.eval()(golden_images(2, 101))[0], figures["embedding_after"])


@pytest.mark.parametrize(
    "config, asked, backbone",
    [
        (None, None, "googlenet"),
        (None, "googlenet_fallback_lrn", "googlenet_fallback_lrn"),
        # runs of this project from before there were methods
        ({"backbone": "googlenet"}, None, "googlenet_fallback_lrn"),
        ({"backbone": "googlenet_caffe"}, None, "googlenet"),
        ({"backbone": "googlenet", "method": "cbswr"}, None, "googlenet"),
    ],
)
@torch.no_grad()
def test_files_load_with_the_response_norm_they_were_trained_with(
    tmp_path, config, asked, backbone
):
    path = tmp_path / "released.pth"
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3).state_dict()
    content = {"model": SINGLE_STATE, "epoch": 7, "optimizer": optimizer}
    if config:
        content["config"] = config
    torch.save(content, path)
    model, info = load_checkpoint(path, backbone=asked)
    assert (info["backbone"], info["epoch"]) == (backbone, 7)
    assert (info["n_cluster"], info["low_dim"]) == (20, 128)
    assert not model.training
    if config is None:
        embedding = model(golden_images(2, 101).float())[0]
        expected = NETWORKS[backbone]["embedding"].astype(np.float32)
        assert_golden(embedding, expected, rtol=0, atol=2e-6)
