"""The losses of a whole batch, against a version that goes row by row."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tensors import noise
from test_losses import literal_center, literal_rim
from torch import Tensor, nn
from torch.nn import functional as F

from losses import cbswr_losses, instance_softmax_loss, total_loss
from models import PAPER, Pooling, build_model
from models.decoder import WeightedBatchNorm2d

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("metric", "rim", "reconstruction")
LABELS = torch.tensor([4, 0, 9, 4])
INPUTS = noise(8, 3, 16, 16, seed=4)
TWO_LAYERS = Pooling.parse("layer2,layer3", "gem,avg", unit=True)


def small_model(pooling: Pooling = PAPER) -> nn.Module:
    torch.manual_seed(3)
    model = build_model("resnet_small", 5, 8, pooling=pooling).double()
    model.train_parts(batch_norm=True)
    model.train()
    model.clustering[1].eval()  # dropout draws at random
    return model


def row_by_row(model: nn.Module, labels: Tensor | None, target: Tensor, **settings) -> dict:
    """Compute steps 1 to 5; every row has a copy of its centroid, and each copy is decoded."""
    options = {"temperature": 0.1, "alpha": 1.0, "mu": 1.0, "neg_m": 1} | settings
    n_rows = len(INPUTS)
    maps = model.maps(INPUTS)
    embedding = model.embed(model.pool(maps))
    cluster_logits = model.cluster(embedding)
    if labels is None:
        labels = torch.tensor([int(row.argmax()) for row in cluster_logits[: n_rows // 2]])
    labels = [int(labels[i % (n_rows // 2)]) for i in range(n_rows)]
    centroids = []
    for rows in maps:
        members = [[rows[j] for j in range(n_rows) if labels[j] == label] for label in labels]
        centroids.append(torch.stack([torch.stack(maps_of).mean(0) for maps_of in members]))
    row_centers = model.embed(model.pool(centroids)).detach()
    centers = torch.stack([row_centers[labels.index(label)] for label in sorted(set(labels))])
    reconstruction = plain_decode(model.decoder.decoder, centroids[-1])
    softmax = (options["temperature"], options["alpha"], options["neg_m"])
    return {
        "metric": literal_center(embedding, centers, torch.tensor(labels), *softmax),
        "rim": literal_rim(cluster_logits, options["mu"]),
        "reconstruction": (reconstruction - target).square().sum() / target.numel(),
        "pseudo_labels": torch.tensor(labels[: n_rows // 2]),
    }


def plain_decode(layers: nn.Sequential, maps: Tensor) -> Tensor:
    """Apply conv, batch norm, ReLU and an upsampling to 1/16 ... 1/1 of the size."""
    for block, divisor in enumerate((16, 8, 4, 2, 1)):
        maps = layers[4 * block + 2](layers[4 * block + 1](layers[4 * block](maps)))
        size = [math.ceil(side / divisor) for side in INPUTS.shape[-2:]]
        maps = F.interpolate(maps, size, mode="nearest")
    return layers[20](maps).sigmoid()


SETTINGS = {"temperature": 0.3, "alpha": 0.5, "mu": 2.0, "neg_m": 3}


@pytest.mark.parametrize(
    "labels, pooling, settings",
    [
        (None, PAPER, {}),
        (LABELS, PAPER, SETTINGS),
        (LABELS.repeat(2), PAPER, SETTINGS),
        (LABELS, TWO_LAYERS, {}),
        (LABELS, PAPER, {"recon_target": "image"}),
    ],
)
def test_a_batch_equals_the_row_by_row_version(labels, pooling, settings):
    model = small_model(pooling)
    literal = copy.deepcopy(model)
    for module in literal.modules():
        if isinstance(module, WeightedBatchNorm2d):
            module.__class__ = nn.BatchNorm2d
    target = INPUTS * INPUTS.new_tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
    if "recon_target" in settings:
        target = target + INPUTS.new_tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
    expected = row_by_row(literal, labels, target, **settings)
    actual = cbswr_losses(model, INPUTS, labels, **settings)
    assert len(set(expected["pseudo_labels"].tolist())) > 1  # else the metric loss has no formula
    assert actual["pseudo_labels"].tolist() == expected["pseudo_labels"].tolist()
    for name in NAMES:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-11)
    for losses in (actual, expected):
        sum(losses[name] for name in NAMES).backward()
    for (name, a), b in zip(model.named_parameters(), literal.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-9, msg=name)
    for (name, a), b in zip(model.named_buffers(), literal.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=name)


def test_each_centroid_is_decoded_once():
    model = small_model()
    n_decoded = []
    model.decoder.register_forward_pre_hook(lambda _, maps: n_decoded.append(len(maps[0])))
    cbswr_losses(model, INPUTS, LABELS)
    assert n_decoded == [3]


def test_without_reconstruction_the_decoder_rests():
    model = small_model()
    before = {name: buffer.clone() for name, buffer in model.decoder.named_buffers()}
    losses = cbswr_losses(model, INPUTS, LABELS, reconstruct=False)
    assert losses["reconstruction"] == 0
    assert all(torch.equal(before[name], b) for name, b in model.decoder.named_buffers())
    expected = cbswr_losses(small_model(), INPUTS, LABELS)
    assert torch.equal(losses["metric"], expected["metric"])
    assert torch.equal(losses["rim"], expected["rim"])


def test_softmax_over_images():
    losses = cbswr_losses(small_model(), INPUTS, LABELS, softmax_over="images", alpha=0.5)
    embedding, _, _ = small_model()(INPUTS)
    torch.testing.assert_close(losses["metric"], instance_softmax_loss(embedding, alpha=0.5))


def test_a_single_cluster_trains_on():
    model = small_model()
    losses = cbswr_losses(model, INPUTS, torch.zeros(4, dtype=torch.long))
    total_loss(losses).backward()
    assert all(losses[name].isfinite() for name in NAMES)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_which_parts_each_loss_trains():
    model = small_model()
    losses = cbswr_losses(model, INPUTS, LABELS)
    losses["reconstruction"].backward(retain_graph=True)
    assert model.feat_ext[0].weight.grad is None
    assert model.base_model.conv1.weight.grad.abs().max() > 0
    model.zero_grad()
    losses["metric"].backward()
    assert model.feat_ext[0].weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in model.decoder.parameters())


def test_losses_under_autocast_are_float32():
    model = small_model().float()
    expected = cbswr_losses(copy.deepcopy(model), INPUTS.float(), LABELS)
    with torch.autocast("cpu", torch.bfloat16):
        losses = cbswr_losses(model, INPUTS.float(), LABELS)
    total_loss(losses).backward()
    for name in NAMES:
        assert losses[name].dtype == torch.float32
        torch.testing.assert_close(losses[name], expected[name], rtol=0.05, atol=0.05)
    for parameter in model.parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()


def test_gradients_do_not_depend_on_the_order_of_threads():
    model = small_model().float()
    inputs = noise(32, 3, 48, 48).float()
    n_threads = torch.get_num_threads()
    torch.set_num_threads(4)
    losses = [cbswr_losses(model, inputs, torch.arange(16) % 2) for _ in range(3)]
    weight = model.decoder.decoder[20].weight
    gradients = [torch.autograd.grad(loss["reconstruction"], weight)[0] for loss in losses]
    torch.set_num_threads(n_threads)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


@pytest.mark.parametrize(
    "inputs, labels, options, message",
    [
        (INPUTS[:5], None, {}, "two views of each image"),
        (INPUTS, torch.zeros(3), {}, r"pseudo_labels must be \(4,\)"),
        (INPUTS, LABELS, {"recon_target": "pixels"}, "input or image, not 'pixels'"),
    ],
)
def test_batches_that_do_not_fit_are_refused(inputs, labels, options, message):
    with pytest.raises(ValueError, match=message):
        cbswr_losses(small_model(), inputs, labels, **options)
