"""Which feature maps are pooled, and how, against literal formulas."""

from __future__ import annotations

import pytest
import torch
from tensors import noise
from torch import nn
from torch.nn import functional as F

from models import PAPER, Pooling, build_model
from models.pooling import POOLS, pool, pool_stripes
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
X = noise(3, 3, 32, 32).float()


def literal_pool(values: list[float], kind: str) -> float:
    if kind == "avg":
        return sum(values) / len(values)
    if kind == "max":
        return max(values)
    cubes = [max(value, 1e-6) ** 3 for value in values]
    return (sum(cubes) / len(cubes)) ** (1 / 3)


@pytest.mark.parametrize("kind", POOLS)
def test_a_pool_is_its_formula(kind):
    maps = noise(2, 3, 4, 5)
    rows = [[literal_pool(c.flatten().tolist(), kind) for c in image] for image in maps]
    expected = torch.tensor(rows, dtype=torch.float64)
    torch.testing.assert_close(pool(maps, kind), expected, rtol=1e-12, atol=0)


def test_gem_has_a_finite_gradient_where_a_map_is_zero():
    maps = torch.zeros(1, 2, 3, 3, requires_grad=True)
    pool(maps, "gem").sum().backward()
    assert maps.grad.isfinite().all()


@pytest.mark.parametrize(
    "height, count, rows",
    [
        (6, 3, [(0, 2), (2, 4), (4, 6)]),
        (7, 3, [(0, 3), (2, 5), (4, 7)]),
        (1, 2, [(0, 1), (0, 1)]),
        (5, 1, [(0, 5)]),
    ],
)
@pytest.mark.parametrize("kind", POOLS)
def test_stripes_pool_their_rows(kind, height, count, rows):
    maps = noise(2, 3, height, 4)
    expected = torch.cat([pool(maps[:, :, first:end], kind) for first, end in rows], 1)
    assert torch.equal(pool_stripes(maps, kind, count), expected)
    adaptive = {"avg": F.adaptive_avg_pool2d, "max": F.adaptive_max_pool2d}
    if kind in adaptive:
        torchs = adaptive[kind](maps, (count, 1))[..., 0].transpose(1, 2).flatten(1)
        torch.testing.assert_close(torchs, expected, rtol=1e-12, atol=1e-14)


def pooled_and_map(pooling: Pooling) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = build_model("resnet_small", 4, 8, pooling=pooling).eval()
    with torch.no_grad():
        return model, model.features(X)[0], model(X)[2]


def test_the_default_is_the_average_of_the_last_map_as_in_the_paper():
    _, pooled, feature_map = pooled_and_map(PAPER)
    assert torch.equal(pooled, feature_map.mean((2, 3)))
    assert Pooling.parse(None, None, unit=False) == PAPER == Pooling.parse("", "avg", unit=False)


@pytest.mark.parametrize(
    "layers, kinds, stripes, n_numbers, text",
    [
        ("layer1,layer3", ("gem", "max"), (1, 1), 32 + 128, "gem of layer1 + max of layer3"),
        (
            "last2",
            ("gem", "gem"),
            (3, 1),
            3 * 64 + 128,
            "gem of layer2 in 3 stripes + gem of layer3",
        ),
    ],
)
@torch.no_grad()
def test_layers_are_pooled_each_at_unit_length_and_joined(layers, kinds, stripes, n_numbers, text):
    texts = [",".join(map(str, values)) for values in (kinds, stripes)]
    pooling = Pooling.parse(layers, texts[0], unit=False, stripes=texts[1])
    model, pooled, feature_map = pooled_and_map(pooling)
    backbone = model.base_model
    first = backbone.layer1(backbone.relu(backbone.bn1(backbone.conv1(X))))
    second = backbone.layer2(first)
    maps = [first if layers.startswith("layer1") else second, backbone.layer3(second)]
    assert torch.equal(feature_map, maps[1])
    parts = []
    for rows, kind, count in zip(maps, kinds, stripes, strict=True):
        parts.append(F.normalize(pool_stripes(rows, kind, count)))
    torch.testing.assert_close(pooled, torch.cat(parts, 1) / 2**0.5, rtol=1e-5, atol=1e-6)
    assert model.pooled_dim == model.feat_ext[0].in_features == n_numbers
    assert str(model.pooling) == text
    options = model.pooling.options()
    again = Pooling.parse(options["layers"], options["pool"], False, options["stripes"])
    assert again == model.pooling


def test_stripes_of_the_last_map_get_unit_length():
    _, pooled, feature_map = pooled_and_map(Pooling.parse(None, "avg", unit=False, stripes="2"))
    expected = F.normalize(pool_stripes(feature_map, "avg", 2))
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "backbone, layers, width",
    [
        ("resnet18", "layer2,layer3,layer4", 896),
        ("googlenet", "inception_3b,inception_4e,inception_5b", 2336),
        ("googlenet_bn", "inception3b,inception5b", 1504),
    ],
)
def test_the_stages_have_the_widths_they_claim(backbone, layers, width):
    pooling = Pooling.parse(layers, "gem", unit=True)
    model = build_model(backbone, 4, 8, pooling=pooling).eval()
    with torch.no_grad():
        pooled, embedding = model.features(noise(1, 3, 64, 64).float())
    assert pooled.shape == (1, width) and embedding.shape == (1, 8)


@pytest.mark.parametrize(
    "layers, kinds, stripes, words",
    [
        ("layer9,layer4", "avg", None, "has no stage 'layer9'"),
        ("layer4,layer3", "avg", None, "in the order"),
        ("layer2,layer3", "avg", None, "end with its last stage"),
        ("layer3,layer3", "avg", None, "named twice"),
        ("layer3,layer4", "avg,gem,max", None, "pool avg,gem,max: 3 values for 2 layers"),
        ("layer4", "mean", None, "unknown pool 'mean'"),
        ("last9", "avg", None, "last9: resnet18 has fewer stages"),
        (None, "avg", "65", "stripes 65"),
        ("layer3,layer4", "avg", "1,2,3", "stripes 1,2,3: 3 values for 2 layers"),
    ],
)
def test_poolings_that_cannot_be(layers, kinds, stripes, words):
    with pytest.raises(UserError, match=words):
        build_model("resnet18", pooling=Pooling.parse(layers, kinds, False, stripes))
