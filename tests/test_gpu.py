"""What runs on a GPU only, or differently there. All of it is skipped where there is none."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from photos import make_photos, save_network
from scripts import failed, run_in_process
from synthetic import write_dataset
from tensors import noise
from torch import nn
from training import assert_same, before_call, execute, options, resumed, trained

import train
from datasets.views import images_on
from models import build_model
from models.batch_norm import share_batch_norm
from utils import clustering
from utils.clustering import kmeans
from utils.distributed import Processes
from utils.retrieval import nearest_neighbors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
CUDA = torch.device("cuda")
SETTINGS = {"device": "cuda", "recipe": "kmeans", "n_cluster": 4, "n_epoch": 2, "batch_size": 6}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def as_before():
    """Put back what --deterministic sets."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_step_computes_what_the_cpu_does(data, tmp_path):
    settings = SETTINGS | {"n_epoch": 1, "lr": 1e-6}
    on_gpu = trained(data, tmp_path / "gpu", **settings)
    on_cpu = trained(data, tmp_path / "cpu", **settings | {"device": "cpu"})
    for name in ("loss", "metric_loss", "reconstruction_loss"):
        assert on_gpu.rows[0][name] == pytest.approx(on_cpu.rows[0][name], rel=2e-2)
    faster = trained(data, tmp_path / "bf16", **settings, precision="bf16")
    assert faster.rows[0]["loss"] == pytest.approx(on_cpu.rows[0]["loss"], rel=5e-2)


def test_deterministic_runs_have_the_same_bits(data, tmp_path):
    """Wherever the images lie, and after a stop in the middle of an epoch."""
    runs = []
    for place in ("device", "host"):
        words = ["--deterministic", f"--data_on={place}"]
        runs.append(trained(data, tmp_path / place, *words, **SETTINGS))
    assert_same(*runs)

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with before_call(train.State, "end_step", 6, stop):  # in the second epoch
        stopped = execute(*options(data, tmp_path / "stopped", **SETTINGS), "--deterministic")
    assert stopped.code == 143
    assert_same(resumed(tmp_path / "stopped/run", "--deterministic"), runs[0])


def test_images_lie_on_the_gpu_if_there_is_room():
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8)
    (on_host,) = images_on(CUDA, [images], "host")
    assert on_host is images
    for choice in ("auto", "device"):
        (resident,) = images_on(CUDA, [images], choice)
        assert resident.is_cuda and np.array_equal(resident.cpu(), images)


@pytest.mark.parametrize("has_faiss", [True, False])
def test_clusters_of_rows_on_the_gpu(monkeypatch, has_faiss):
    if not has_faiss:
        monkeypatch.setattr(clustering, "faiss", None)
    elif clustering.faiss is None:
        pytest.skip("faiss is not installed")
    rows = noise(300, 8, seed=1).float() + 9 * torch.eye(8)[torch.arange(300) % 8]
    labels, centroids, inertia = kmeans(rows.cuda(), 8, n_init=3, seed=1)
    assert labels.is_cuda and centroids.is_cuda
    assert len(set(zip(labels.tolist(), (torch.arange(300) % 8).tolist(), strict=True))) == 8
    literal = (rows - centroids.cpu()[labels.cpu()]).square().sum()
    assert inertia == pytest.approx(float(literal), rel=1e-3)


def test_neighbors_on_the_gpu():
    rows = noise(400, 16).float()
    distances, numbers = nearest_neighbors(rows.cuda(), 5)
    expected, expected_numbers = nearest_neighbors(rows, 5)
    torch.testing.assert_close(distances.cpu(), expected, rtol=1e-3, atol=1e-3)
    assert (numbers.cpu() == expected_numbers).float().mean() > 0.99


@pytest.mark.parametrize("backbone", ["googlenet", "resnet18"])
def test_the_network_computes_what_it_does_on_a_cpu(backbone):
    torch.manual_seed(0)
    model = build_model(backbone, n_cluster=4, low_dim=8).eval()
    x = noise(2, 3, 96, 96).float() * (60 if backbone == "googlenet" else 1)
    with torch.inference_mode():
        expected = model(x)
        computed = model.cuda()(x.cuda())
    for value, reference in zip(computed, expected, strict=True):
        distance = (value.cpu() - reference).norm() / reference.norm()
        assert distance < 5e-3  # convolutions on a GPU round to 10 bits


def test_embeddings_by_the_gpu(tmp_path):
    photos = make_photos(tmp_path / "photos")
    network = save_network(tmp_path / "net.pth")
    for device in ("cpu", "cuda"):
        words = ["--images", photos, "--checkpoint_path", network, "--device", device]
        assert run_in_process("embed.py", *words, "--out", tmp_path / f"{device}.npy").code == 0
    cosines = (np.load(tmp_path / "cpu.npy") * np.load(tmp_path / "cuda.npy")).sum(1)
    assert cosines.min() > 0.999


def test_batch_norm_of_several_processes(tmp_path):
    """SyncBatchNorm under nccl, of a group of one process: the numbers of an ordinary one."""
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).cuda().train()
        shared = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).cuda().train()
        shared.load_state_dict(plain.state_dict())
        shared = share_batch_norm(shared, Processes(0, 2), CUDA)
        assert isinstance(shared[1], nn.SyncBatchNorm)
        x = noise(6, 3, 8, 8).float().cuda()
        results = [network(x) for network in (plain, shared)]
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
        for result in results:
            result.square().mean().backward()
        gradients = [network[0].weight.grad for network in (plain, shared)]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
        buffers = [network[1].running_var for network in (plain, shared)]
        torch.testing.assert_close(*buffers, rtol=1e-4, atol=1e-6)
    finally:
        dist.destroy_process_group()


def test_out_of_memory_is_one_line(data, tmp_path):
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-4)
    result = execute(*options(data, tmp_path, **SETTINGS | {"batch_size": 24}, low_dim=4096))
    failed(result, "out of memory on the GPU", "--batch_size")
