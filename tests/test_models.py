"""The networks' parts against torch's own layers, and what every backbone promises."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from losses import METRIC_LOSSES
from models import BACKBONES, build_model
from models.backbones import CAFFE, IMAGENET, PLUS_MINUS_ONE
from models.decoder import Decoder, WeightedBatchNorm2d
from models.lrn import LocalResponseNorm
from utils.arguments import BACKBONE_NAMES, METRIC_LOSS_NAMES
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
GENERATOR = torch.Generator().manual_seed(0)
CHANNELS = {
    "googlenet": 1024, "googlenet_caffe": 1024, "googlenet_bn": 1024, "resnet18": 512, "resnet34": 512,
    "resnet50": 2048, "resnet101": 2048, "resnet_small": 128,
}  # fmt: skip


def noise(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


# ---------------------------------------------------------------- local response normalisation


def torch_lrn(kind: str, size: int, alpha: float, beta: float, k: float) -> nn.Module:
    layer = nn.CrossMapLRN2d if kind == "released" else nn.LocalResponseNorm
    return layer(size, alpha, beta, k)


@pytest.mark.parametrize("kind", ["released", "caffe"])
@pytest.mark.parametrize("size, alpha, beta, k", [(5, 1e-4, 0.75, 1.0), (5, 2.0, 0.75, 1.0), (3, 0.5, 0.5, 2.0)])
@pytest.mark.parametrize("channels", [1, 2, 4, 12])
def test_lrn_is_torchs(kind, size, alpha, beta, k, channels):
    x = noise(2, channels, 3, 4, scale=3).requires_grad_()
    weight = noise(2, channels, 3, 4)
    results = []
    for layer in (LocalResponseNorm(kind, size, alpha, beta, k), torch_lrn(kind, size, alpha, beta, k)):
        y = layer(x)
        results.append((y.detach(), torch.autograd.grad((y * weight).sum(), x)[0]))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_the_two_kinds_of_lrn_differ():
    """Channel 0 never leaves the released code's running sum."""
    x = torch.zeros(1, 12, 1, 1)
    x[0, 0], x[0, 8] = 100.0, 1.0
    released, caffe = (LocalResponseNorm(kind, alpha=1.0)(x)[0, 8].item() for kind in ("released", "caffe"))
    assert caffe == pytest.approx((1 + 1 / 5) ** -0.75, rel=1e-6)
    assert released == pytest.approx((1 + (1 + 100**2) / 5) ** -0.75, rel=1e-6)


def test_caffe_lrn_gradcheck():
    assert torch.autograd.gradcheck(LocalResponseNorm("caffe", alpha=1.0), noise(2, 7, 2, 2).requires_grad_())


def test_released_lrn_leaves_its_input_alone_and_follows_its_layout():
    x = noise(2, 8, 3, 3).to(memory_format=torch.channels_last)
    before = x.clone()
    y = LocalResponseNorm("released", alpha=1.0)(x)
    assert torch.equal(x, before)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, nn.CrossMapLRN2d(5, 1.0)(x.contiguous()))


@pytest.mark.parametrize("kind, size", [("alexnet", 5), ("caffe", 4)])
def test_lrn_refuses_unknown_kinds_and_even_windows(kind, size):
    with pytest.raises(ValueError, match="an odd window"):
        LocalResponseNorm(kind, size)


# ---------------------------------------------------------------- batch norm of repeated rows


def trained_norm(kind: type[nn.BatchNorm2d], channels: int) -> nn.BatchNorm2d:
    norm = kind(channels).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.copy_(torch.rand(channels, generator=generator, dtype=torch.float64) + 0.5)
    return norm


@pytest.mark.parametrize("counts", [(1, 1, 1), (1, 5, 2), (7,), (1, 1, 60)])
def test_weighted_batch_norm_is_batch_norm_of_repeated_rows(counts):
    counts = torch.tensor(counts)
    x = noise(len(counts), 4, 3, 2).requires_grad_()
    weight = noise(int(counts.sum()), 4, 3, 2)
    weighted, plain = trained_norm(WeightedBatchNorm2d, 4), trained_norm(nn.BatchNorm2d, 4)
    outputs = weighted(x, counts).repeat_interleave(counts, 0), plain(x.repeat_interleave(counts, 0))
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-12)
    gradients = [
        torch.autograd.grad((y * weight).sum(), (x, norm.weight, norm.bias))
        for y, norm in zip(outputs, (weighted, plain), strict=True)
    ]
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    for (name, actual), expected in zip(weighted.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}")


def test_weighted_batch_norm_without_counts_or_in_evaluation_is_batch_norm():
    x, counts = noise(3, 4, 2, 2), torch.tensor([1, 9, 1])
    weighted, plain = trained_norm(WeightedBatchNorm2d, 4), trained_norm(nn.BatchNorm2d, 4)
    assert torch.equal(weighted(x), plain(x))
    assert torch.equal(weighted.eval()(x, counts), plain.eval()(x))
    assert torch.equal(weighted.running_var, plain.running_var)


# ---------------------------------------------------------------- decoder


@pytest.mark.parametrize("maps, size, expected", [
    ((2, 6, 7, 7), None, (2, 3, 224, 224)),
    ((1, 6, 2, 3), None, (1, 3, 64, 96)),
    ((2, 6, 4, 4), (28, 28), (2, 3, 28, 28)),
    ((2, 6, 7, 7), (224, 200), (2, 3, 224, 200)),
    ((2, 6, 1, 1), (17, 33), (2, 3, 17, 33)),
])  # fmt: skip
def test_decoder_sizes(maps, size, expected):
    images = Decoder(6)(torch.randn(maps, generator=GENERATOR), size)
    assert images.shape == expected
    assert images.min() > 0 and images.max() < 1


def test_decoder_doubles_the_map_five_times():
    """The given size 224 and the default go through 14, 28, 56, 112, 224: the same image."""
    decoder, maps = Decoder(6).eval(), torch.randn(1, 6, 7, 7, generator=GENERATOR)
    x = maps
    for block in range(5):
        x = nn.functional.interpolate(decoder.decoder[4 * block : 4 * block + 4](x), scale_factor=2, mode="nearest")
    assert torch.equal(decoder(maps), decoder.decoder[-1](x).sigmoid())
    assert torch.equal(decoder(maps), decoder(maps, (224, 224)))


# ---------------------------------------------------------------- backbones


def test_the_names_on_the_command_line_are_those_of_the_backbones():
    assert tuple(BACKBONES) == BACKBONE_NAMES == tuple(CHANNELS)
    assert tuple(METRIC_LOSSES) == METRIC_LOSS_NAMES


@pytest.mark.parametrize("name", BACKBONES)
def test_feature_map_of_224_pixels(name):
    """On torch's meta device: shapes without the computation."""
    with torch.device("meta"):
        model = build_model(name, 6, 5)
        feature_map = model.base_model(torch.empty(2, 3, 224, 224))
        reconstruction = model.decoder(feature_map[:1], (224, 224))
    side = 28 if name == "resnet_small" else 7
    assert feature_map.shape == (2, CHANNELS[name], side, side)
    assert model.channels == CHANNELS[name]
    assert reconstruction.shape == (1, 3, 224, 224)
    assert model.backbone_name == name and (model.n_cluster, model.low_dim) == (6, 5)


def assert_unit_rows(*tensors: torch.Tensor) -> None:
    for rows in tensors:
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["googlenet", "googlenet_bn", "resnet18", "resnet_small"])
def test_forward(name):
    torch.manual_seed(1)
    model = build_model(name, 6, 5).train()
    images = torch.randint(0, 256, (3, 64, 64, 3), generator=GENERATOR, dtype=torch.uint8)
    inputs = model.normalization(images)
    embedding, cluster_logits, feature_map = model(inputs)
    assert embedding.shape == (3, 5) and cluster_logits.shape == (3, 6)
    assert_unit_rows(embedding, cluster_logits)
    assert all(p.requires_grad for p in model.parameters()) and feature_map.requires_grad
    model.eval()
    with torch.no_grad():
        pooled, same = model.features(inputs)
        assert torch.equal(same, model(inputs)[0])
    assert pooled.shape == (3, CHANNELS[name])
    assert_unit_rows(pooled, same)


@pytest.mark.parametrize("name", ["googlenet", "resnet_small"])
def test_autocast_gives_float32_vectors_of_unit_length(name):
    torch.manual_seed(1)
    model = build_model(name, 6, 5).eval()
    inputs = model.normalization(torch.randint(0, 256, (2, 32, 32, 3), generator=GENERATOR, dtype=torch.uint8))
    with torch.no_grad():
        full = model(inputs)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(inputs)
            pooled, embedding = model.features(inputs)
    assert half[2].dtype == torch.bfloat16
    assert_unit_rows(half[0], half[1], pooled, embedding)
    for actual, expected in zip(half[:2], full[:2], strict=True):
        assert (actual * expected).sum(1).min() > 0.98  # bfloat16 turns the vectors a little only
        assert not torch.equal(actual, expected)


def test_names_of_the_parts():
    for name, first in (("googlenet", "base_model.0.7x7_s2.weight"), ("resnet18", "base_model.conv1.weight")):
        names = list(build_model(name).state_dict())
        assert names[0] == first
        assert {"decoder.decoder.0.weight", "decoder.decoder.20.weight", "feat_ext.0.weight", "feat_ext.0.bias",
                "clustering.0.running_mean", "clustering.2.weight"} <= set(names)  # fmt: skip
        assert not [n for n in names if ".fc." in n or "aux" in n]


def test_the_seed_makes_the_network():
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(build_model("resnet_small", 4, 3).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["base_model.conv1.weight"], states[2]["base_model.conv1.weight"])


@pytest.mark.parametrize("arguments, message", [
    (("resnet_smal",), "unknown backbone 'resnet_smal'; did you mean resnet_small"),
    (("vit",), "unknown backbone 'vit' .*googlenet"),
    (("resnet_small", 0), "at least 1, not 0 and 128"),
    (("resnet_small", 4, 0), "at least 1, not 4 and 0"),
    (("resnet_small", 4, 4, "auto"), "no pretrained weights exist for resnet_small"),
    (("resnet_small", 4, 4, "no/such/file.pth"), "no/such/file.pth: no such file"),
])  # fmt: skip
def test_build_model_refuses(arguments, message):
    with pytest.raises(UserError, match=message):
        build_model(*arguments)


def test_none_needs_no_file():
    assert build_model("resnet_small", weights="none").n_cluster == 32


# ---------------------------------------------------------------- input normalisation


@pytest.mark.parametrize("normalization", [CAFFE, IMAGENET, PLUS_MINUS_ONE])
def test_normalization_and_back(normalization):
    images = torch.randint(0, 256, (2, 5, 4, 3), generator=GENERATOR, dtype=torch.uint8)
    before = images.clone()
    inputs = normalization(images)
    assert torch.equal(images, before)
    assert inputs.dtype == torch.float32 and inputs.shape == (2, 3, 5, 4)
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    colours = images.permute(0, 3, 1, 2).float()
    if normalization.order == "BGR":
        colours = colours[:, [2, 1, 0]]
    torch.testing.assert_close(normalization.pixels(inputs), colours, rtol=0, atol=1e-4)
    mean = torch.tensor(normalization.mean).view(3, 1, 1)
    torch.testing.assert_close(normalization.mean_subtracted(inputs), colours - mean, rtol=0, atol=1e-4)


def test_one_pixel_by_hand():
    pixel = torch.tensor([[[[200, 100, 50]]]], dtype=torch.uint8)  # R, G, B
    for normalization, expected in (
        (CAFFE, [50 - 102.9801, 100 - 115.9465, 200 - 122.7717]),
        (IMAGENET, [(200 / 255 - 0.485) / 0.229, (100 / 255 - 0.456) / 0.224, (50 / 255 - 0.406) / 0.225]),
        (PLUS_MINUS_ONE, [200 / 127.5 - 1, 100 / 127.5 - 1, 50 / 127.5 - 1]),
    ):
        torch.testing.assert_close(normalization(pixel).flatten(), torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, normalization", [
    ("googlenet", CAFFE), ("googlenet_caffe", CAFFE), ("googlenet_bn", PLUS_MINUS_ONE), ("resnet50", IMAGENET),
])  # fmt: skip
def test_each_backbone_has_the_input_of_its_weights(name, normalization):
    assert BACKBONES[name].normalization == normalization


def test_reconstruction_targets():
    model = build_model("resnet_small", 4, 3)
    images = torch.randint(0, 256, (2, 8, 8, 3), generator=GENERATOR, dtype=torch.uint8)
    inputs = model.normalization(images)
    colours = images.permute(0, 3, 1, 2) / 255
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    torch.testing.assert_close(model.reconstruction_target(inputs, "image"), colours, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.reconstruction_target(inputs), colours - mean, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="not 'pixels'"):
        model.reconstruction_target(inputs, "pixels")
