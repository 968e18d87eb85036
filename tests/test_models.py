"""The parts of the network against torch's own layers, and what every backbone promises."""

from __future__ import annotations

import copy

import pytest
import torch
from tensors import noise, random_pixels, unit
from torch import Tensor, nn
from torch.nn import functional as F

from models import BACKBONES, PAPER, Pooling, build_model, check_crop_size
from models.decoder import Decoder, WeightedBatchNorm2d
from models.lrn import LocalResponseNorm
from models.spec import CAFFE, IMAGENET, PLUS_MINUS_ONE
from utils.errors import UserError
from utils.features import pooled_features

pytestmark = pytest.mark.usefixtures("one_thread")
CHANNELS = {
    "googlenet": 1024,
    "googlenet_fallback_lrn": 1024,
    "googlenet_bn": 1024,
    "resnet18": 512,
    "resnet34": 512,
    "resnet50": 2048,
    "resnet101": 2048,
    "resnet_small": 128,
}


# --------------------------------------------------------------- local response normalization


@pytest.mark.parametrize(
    "size, alpha, beta, k", [(5, 1e-4, 0.75, 1.0), (5, 2.0, 0.75, 1.0), (3, 0.5, 0.5, 2.0)]
)
@pytest.mark.parametrize("n_channels", [1, 2, 4, 12])
def test_lrn_is_torchs(size, alpha, beta, k, n_channels):
    x = (3 * noise(2, n_channels, 3, 4)).requires_grad_()
    y = LocalResponseNorm(x.shape[1], size, alpha, beta, k)(x)
    expected = nn.LocalResponseNorm(size, alpha, beta, k)(x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    weight = noise(2, n_channels, 3, 4, seed=1)
    gradients = [torch.autograd.grad((value * weight).sum(), x)[0] for value in (y, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------ batch norm of equal rows


def used_norm(kind: type[nn.BatchNorm2d], dtype: torch.dtype = torch.float64) -> nn.BatchNorm2d:
    norm = kind(4).to(dtype)
    with torch.no_grad():
        for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            values.copy_(noise(4).abs() + 0.5)
    return norm


@pytest.mark.parametrize("counts", [(1, 1, 1), (1, 5, 2), (7,), (1, 1, 60)])
def test_weighted_batch_norm_is_batch_norm_of_repeated_rows(counts):
    counts = torch.tensor(counts)
    x = noise(len(counts), 4, 3, 2).requires_grad_()
    weight = noise(int(counts.sum()), 4, 3, 2, seed=1)
    weighted = used_norm(WeightedBatchNorm2d)
    plain = used_norm(nn.BatchNorm2d)
    y = weighted(x, counts).repeat_interleave(counts, 0)
    expected = plain(x.repeat_interleave(counts, 0))
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    gradients = torch.autograd.grad((y * weight).sum(), (x, weighted.weight, weighted.bias))
    right = torch.autograd.grad((expected * weight).sum(), (x, plain.weight, plain.bias))
    torch.testing.assert_close(gradients, right, rtol=1e-9, atol=1e-11)
    for a, b in zip(weighted.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_weighted_batch_norm_without_counts_or_in_evaluation_is_batch_norm():
    x = noise(3, 4, 2, 2)
    weighted = used_norm(WeightedBatchNorm2d)
    plain = used_norm(nn.BatchNorm2d)
    assert torch.equal(weighted(x), plain(x))
    assert torch.equal(weighted.eval()(x, torch.tensor([1, 9, 1])), plain.eval()(x))
    assert torch.equal(weighted.running_var, plain.running_var)


def test_weighted_batch_norm_under_autocast_takes_its_statistics_in_float32():
    """Values around 100 have no digits left in bfloat16 for a variance."""
    x = (100 + noise(3, 4, 5, 5)).bfloat16()
    counts = torch.tensor([1, 9, 300])
    norm = used_norm(WeightedBatchNorm2d, torch.float32)
    exact = copy.deepcopy(norm)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x, counts)
    expected = exact(x.float(), counts)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected.bfloat16())
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    assert torch.equal(norm.running_mean, exact.running_mean)
    assert torch.equal(norm.running_var, exact.running_var)


# ----------------------------------------------------------------------------------- decoder


@pytest.mark.parametrize("size", [(28, 28), (17, 33)])
def test_decoder_gives_images_of_any_size(size):
    images = Decoder(6)(noise(2, 6, 1, 2).float(), size)
    assert images.shape == (2, 3, *size)
    assert images.min() > 0 and images.max() < 1


def test_decoder_doubles_the_map_five_times():
    decoder = Decoder(6).eval()
    maps = noise(1, 6, 7, 7).float()
    x = maps
    for block in range(5):
        layers = decoder.decoder[4 * block : 4 * block + 4]
        x = F.interpolate(layers(x), scale_factor=2, mode="nearest")
    expected = decoder.decoder[-1](x).sigmoid()
    assert torch.equal(decoder(maps), expected)
    assert torch.equal(decoder(maps, (224, 224)), expected)


# --------------------------------------------------------------------------------- backbones


@pytest.mark.parametrize("name", BACKBONES)
def test_feature_map_of_224_pixels(name):
    with torch.device("meta"):  # shapes without the computation
        model = build_model(name, 6, 5)
        feature_map = model.base_model(torch.empty(2, 3, 224, 224))
        reconstruction = model.decoder(feature_map[:1], (224, 224))
    side = 28 if name == "resnet_small" else 7
    assert feature_map.shape == (2, CHANNELS[name], side, side)
    assert reconstruction.shape == (1, 3, 224, 224)
    assert model.pooled_dim == CHANNELS[name]
    assert (model.backbone_name, model.n_cluster, model.low_dim) == (name, 6, 5)


def assert_unit_rows(*matrices: Tensor) -> None:
    for rows in matrices:
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["googlenet", "resnet_small"])
@torch.no_grad()
def test_forward_and_features_with_and_without_autocast(name):
    torch.manual_seed(1)
    model = build_model(name, 6, 5).eval()
    inputs = model.normalization(random_pixels(2, 32))
    exact_embedding, exact_logits, feature_map = model(inputs)
    pooled, embedding = model.features(inputs)
    assert torch.equal(embedding, exact_embedding)
    assert torch.equal(pooled, feature_map.mean((2, 3)))
    with torch.autocast("cpu", torch.bfloat16):
        embedding, cluster_logits, feature_map = model(inputs)
        pooled, _ = model.features(inputs)
    assert feature_map.dtype == torch.bfloat16 and pooled.dtype == torch.float32
    assert_unit_rows(embedding, exact_embedding, cluster_logits, exact_logits)
    for rows, exact in ((embedding, exact_embedding), (cluster_logits, exact_logits)):
        assert (rows * exact).sum(1).min() > 0.98  # bfloat16 turns the vectors a little only
        assert not torch.equal(rows, exact)


@pytest.mark.parametrize("pooling", [PAPER, Pooling.parse("layer2,layer3", "gem", unit=True)])
@torch.no_grad()
def test_flip_averages_the_pooled_features_of_image_and_mirror_image(pooling):
    torch.manual_seed(1)
    model = build_model("resnet_small", 4, 8, pooling=pooling).eval()
    x = noise(3, 3, 32, 32).float()
    mean = (model.pool(model.maps(x)) + model.pool(model.maps(x.flip(3)))) / 2
    if pooling.unit:
        mean = F.normalize(mean, dim=1)
    pooled, embedding = model.features(x, flip=True)
    torch.testing.assert_close(pooled, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(embedding, model.embed(mean), rtol=1e-5, atol=1e-5)
    mirrored, _ = model.features(x.flip(3), flip=True)
    torch.testing.assert_close(pooled, mirrored, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(pooled, model.features(x)[0], atol=1e-3)
    for flip in (False, True):  # several poolings in one pass have the same bits
        pixels = [noise(3, 32, 32, 3).abs().mul(99).byte()]
        _, rows = pooled_features(model, pixels, flip=flip, poolings=[PAPER, pooling])
        assert torch.equal(rows, pooled_features(model, pixels, flip=flip)[0])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("resnet_smal",), "unknown backbone 'resnet_smal'; did you mean resnet_small"),
        (("resnet_small", 4, 0), "at least 1, not 4 and 0"),
        (("resnet_small", 4, 4, "auto"), "no pretrained weights for resnet_small"),
    ],
)
def test_build_model_refuses(arguments, message):
    with pytest.raises(UserError, match=message):
        build_model(*arguments)


@pytest.mark.parametrize("name", ["googlenet", "googlenet_bn"])
def test_crops_that_leave_nothing_to_pool_are_refused(name):
    smallest = BACKBONES[name].smallest_crop
    check_crop_size(name, smallest)
    with torch.device("meta"):
        backbone = build_model(name).eval().base_model
        assert backbone(torch.empty(1, 3, smallest, smallest)).shape[2:] == (1, 1)
    with pytest.raises(UserError, match=f"{name} takes crops of at least {smallest} px"):
        check_crop_size(name, smallest - 1)


# ------------------------------------------------------------------- which parts are trained


def moved_statistics(model: nn.Module) -> set[str]:
    """Return the parts of the network whose batch norm statistics a forward pass moves."""
    before = {name: value.clone() for name, value in model.named_buffers()}
    _, _, feature_map = model.train()(noise(4, 3, 32, 32).float())
    model.decoder(feature_map)
    changed = [
        name for name, value in model.named_buffers() if not torch.equal(value, before[name])
    ]
    return {".".join(name.split(".")[:2]) for name in changed}


def test_batch_norm_statistics_are_kept_unless_they_are_trained():
    model = build_model("resnet_small", 4, 8)
    model.train_parts()
    heads = {"decoder.decoder", "clustering.0"}
    assert moved_statistics(model) == heads
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.train_parts(batch_norm=True)
    stages = {f"base_model.{name}" for name in ("bn1", "layer1", "layer2", "layer3")}
    assert moved_statistics(model) == heads | stages
    model.train_parts(1, batch_norm=True)
    assert moved_statistics(model) == heads | {"base_model.layer3"}
    trained = [name for name, p in model.base_model.named_parameters() if p.requires_grad]
    assert all(name.startswith("layer3.") for name in trained) and trained
    with pytest.raises(UserError, match=r"resnet_small has 3 stages .* fewer than 4"):
        model.train_parts(4)


def test_the_head_is_set_and_shortened():
    model = build_model("resnet_small", 4, 8)
    weight = unit(8, 128).float()
    bias = noise(8).float()
    model.set_head(weight, bias)
    pooled = noise(3, 128, seed=1).float()
    raw = pooled @ weight.T + bias
    torch.testing.assert_close(model.embed(pooled), F.normalize(raw, dim=1))
    model.shorten(3)
    torch.testing.assert_close(model.embed(pooled), F.normalize(raw[:, :3], dim=1))
    assert model.low_dim == 3
    with pytest.raises(UserError, match="has 3 dimensions, not 4"):
        model.shorten(4)


# ----------------------------------------------------------------------- input normalization


@pytest.mark.parametrize("normalization", [CAFFE, IMAGENET, PLUS_MINUS_ONE])
def test_normalization_and_back(normalization):
    images = random_pixels(2, 5)
    before = images.clone()
    inputs = normalization(images)
    assert torch.equal(images, before)
    assert inputs.dtype == torch.float32 and inputs.shape == (2, 3, 5, 5)
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    colors = images.permute(0, 3, 1, 2).float()
    if normalization.order == "BGR":
        colors = colors[:, [2, 1, 0]]
    torch.testing.assert_close(normalization.pixels(inputs), colors, rtol=0, atol=1e-4)
    mean = torch.tensor(normalization.mean).view(3, 1, 1)
    subtracted = normalization.mean_subtracted(inputs)
    torch.testing.assert_close(subtracted, colors - mean, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "backbone, expected",
    [
        ("googlenet", [50 - 102.9801, 100 - 115.9465, 200 - 122.7717]),
        ("googlenet_bn", [200 / 127.5 - 1, 100 / 127.5 - 1, 50 / 127.5 - 1]),
        (
            "resnet50",
            [(200 / 255 - 0.485) / 0.229, (100 / 255 - 0.456) / 0.224, (50 / 255 - 0.406) / 0.225],
        ),
    ],
)
def test_each_backbone_has_the_input_of_its_weights(backbone, expected):
    pixel = torch.tensor([[[[200, 100, 50]]]], dtype=torch.uint8)  # R, G, B
    inputs = BACKBONES[backbone].normalization(pixel).flatten()
    torch.testing.assert_close(inputs, torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["input", "image"])
@pytest.mark.parametrize("backbone", ["googlenet", "resnet_small"])
def test_a_perfect_reconstruction_shows_the_image(backbone, kind):
    model = build_model(backbone, 4, 3)
    images = random_pixels(2, 8)
    target = model.reconstruction_target(model.normalization(images), kind)
    assert torch.equal(model.reconstructed_pixels(target, kind), images)
