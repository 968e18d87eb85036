"""What is pooled and how, mirror averaging, and the closed-form start of the head, against literal formulas."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scripts import failed, run_in_process
from synthetic import write_dataset

from datasets import center_crops, load_split
from losses import cbswr_losses
from models import PAPER, Pooling, build_model, load_checkpoint
from models.closed_form import closed_form_head, start_head
from models.pooling import pool, pool_stripes
from utils.errors import UserError
from utils.features import extract_features

pytestmark = pytest.mark.usefixtures("one_thread")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["avg", "max", "gem"])
def test_a_pool_is_its_formula(kind):
    maps = noise(2, 3, 4, 5)
    expected = torch.empty(2, 3, dtype=torch.float64)
    for image in range(2):
        for channel in range(3):
            values = [float(v) for v in maps[image, channel].flatten()]
            cubes = [max(v, 1e-6) ** 3 for v in values]
            expected[image, channel] = {
                "avg": sum(values) / 20,
                "max": max(values),
                "gem": (sum(cubes) / 20) ** (1 / 3),
            }[kind]
    assert torch.allclose(pool(maps, kind), expected, rtol=1e-12)


@pytest.mark.parametrize("height, count, rows", [
    (6, 3, [(0, 2), (2, 4), (4, 6)]), (7, 3, [(0, 3), (2, 5), (4, 7)]), (4, 3, [(0, 2), (1, 3), (2, 4)]),
    (2, 3, [(0, 1), (0, 2), (1, 2)]), (1, 2, [(0, 1), (0, 1)]), (5, 1, [(0, 5)]),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["avg", "max", "gem"])
def test_stripes_pool_their_rows(kind, height, count, rows):
    maps = noise(2, 3, height, 4)
    expected = torch.cat([pool(maps[:, :, first:end], kind) for first, end in rows], 1)
    assert torch.equal(pool_stripes(maps, kind, count), expected)
    if kind != "gem":
        adaptive = {"avg": torch.nn.functional.adaptive_avg_pool2d, "max": torch.nn.functional.adaptive_max_pool2d}
        same = adaptive[kind](maps, (count, 1))[..., 0].transpose(1, 2).flatten(1)
        assert torch.allclose(same, expected, rtol=1e-12)


def test_stripes_of_layers_are_joined():
    pooling = Pooling.parse("last2", "gem", unit=True, stripes="3,1")
    model = build_model("resnet_small", 4, 8, pooling=pooling).eval()
    x = noise(3, 3, 32, 32).float()
    with torch.no_grad():
        second, last = model.maps(x)
        parts = [pool_stripes(second, "gem", 3), pool(last, "gem")]
        expected = torch.cat([part / part.norm(dim=1, keepdim=True) for part in parts], 1) / 2**0.5
        pooled, _ = model.features(x)
    assert model.pooled_dim == 3 * 64 + 128 and model.feat_ext[0].in_features == 320
    assert torch.allclose(pooled, expected, atol=1e-6)
    assert str(model.pooling) == "gem of layer2 in 3 stripes + gem of layer3"
    whole = build_model("resnet_small", 4, 8, pooling=Pooling.parse(None, "avg", unit=False, stripes="2")).eval()
    with torch.no_grad():
        expected = pool_stripes(whole.base_model(x), "avg", 2)
        assert torch.allclose(whole.pool(*whole.maps(x)), expected / expected.norm(dim=1, keepdim=True), atol=1e-6)


def test_gem_has_a_finite_gradient_at_a_dead_map():
    maps = torch.zeros(1, 2, 3, 3, requires_grad=True)
    pool(maps, "gem").sum().backward()
    assert maps.grad.isfinite().all()


def test_layers_are_pooled_each_at_unit_length_and_joined():
    model = build_model("resnet_small", 4, 8, pooling=Pooling.parse("layer1,layer3", "gem,max", unit=False)).eval()
    x = noise(3, 3, 32, 32).float()
    with torch.no_grad():
        first = model.base_model.layer1(model.base_model.relu(model.base_model.bn1(model.base_model.conv1(x))))
        last = model.base_model.layer3(model.base_model.layer2(first))
        parts = [pool(first, "gem"), pool(last, "max")]
        expected = torch.cat([part / part.norm(dim=1, keepdim=True) for part in parts], 1) / 2**0.5
        embedding, _, feature_map = model(x)
        pooled, same = model.features(x)
    assert model.pooled_dim == 32 + 128 and model.feat_ext[0].in_features == 160
    assert torch.equal(feature_map, last)
    assert torch.allclose(pooled, expected, atol=1e-6) and torch.allclose(embedding, same, atol=1e-6)


def test_the_default_pools_the_last_map_as_the_paper_does():
    torch.manual_seed(0)
    model = build_model("resnet_small", 4, 8).eval()
    x = noise(2, 3, 32, 32).float()
    with torch.no_grad():
        assert torch.equal(model.pool(*model.maps(x)), model.base_model(x).mean((2, 3)))
    assert Pooling.parse(None, None, unit=False) == PAPER == Pooling.parse("", "avg", unit=False)


@pytest.mark.parametrize("backbone, layers, width", [
    ("resnet18", "layer2,layer3,layer4", 896), ("googlenet", "inception_3b,inception_4e,inception_5b", 2336),
    ("googlenet_caffe", "inception_4e,inception_5b", 1856), ("googlenet_bn", "inception3b,inception5b", 1504),
])  # fmt: skip
def test_the_stages_of_every_backbone_have_the_widths_they_claim(backbone, layers, width):
    model = build_model(backbone, 4, 8, pooling=Pooling.parse(layers, "gem", unit=True)).eval()
    with torch.no_grad():
        pooled, embedding = model.features(noise(1, 3, 64, 64).float())
    assert pooled.shape == (1, width) and embedding.shape == (1, 8)
    assert pooled.norm().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("layers, pool_, words", [
    ("layer9,layer4", "avg", "has no stage 'layer9'"), ("layer4,layer3", "avg", "in the order"),
    ("layer2,layer3", "avg", "end with its last stage, layer4"), ("layer3,layer3", "avg", "twice"),
    ("layer3,layer4", "avg,gem,max", "3 pools for 2 layers"), (None, "avg,gem", "2 pools for 1 layers"),
    ("layer4", "mean", "unknown pool 'mean'"), ("last9", "avg", "last9: resnet18 has 4 stages"),
    ("last0", "avg", "no stage 'last0'"), ("last2,layer4", "avg", "no stage 'last2'"),
])  # fmt: skip
def test_layers_and_pools_that_cannot_be(layers, pool_, words):
    with pytest.raises(UserError, match=words):
        build_model("resnet18", 4, 8, pooling=Pooling.parse(layers, pool_, unit=False))


@pytest.mark.parametrize("layers, stripes, words", [
    (None, "0", "--stripes 0"), (None, "65", "--stripes 65"), (None, "two", "--stripes two"),
    ("layer3,layer4", "1,2,3", "3 numbers for 2 layers"), (None, "1,2", "2 numbers for 1 layers"),
])  # fmt: skip
def test_stripes_that_cannot_be(layers, stripes, words):
    with pytest.raises(UserError, match=words):
        build_model("resnet18", 4, 8, pooling=Pooling.parse(layers, "avg", False, stripes))


def test_flip_averages_the_pooled_features_of_image_and_mirror_image():
    for pooling in (PAPER, Pooling.parse("layer2,layer3", "gem", unit=True)):
        torch.manual_seed(1)
        model = build_model("resnet_small", 4, 8, pooling=pooling).eval()
        x = noise(3, 3, 32, 32).float()
        with torch.no_grad():
            mean = (model.pool(*model.maps(x)) + model.pool(*model.maps(x.flip(3)))) / 2
            pooled, embedding = model.features(x, flip=True)
            assert torch.allclose(pooled, mean / mean.norm(dim=1, keepdim=True), atol=1e-6)
            start = mean / mean.norm(dim=1, keepdim=True) if pooling.unit else mean
            raw = start @ model.feat_ext[0].weight.T + model.feat_ext[0].bias
            assert torch.allclose(embedding, raw / raw.norm(dim=1, keepdim=True), atol=1e-5)
            mirrored = model.features(x.flip(3), flip=True)
        assert torch.allclose(embedding, mirrored[1], atol=1e-6)
        assert not torch.allclose(embedding, model.features(x)[1], atol=1e-3)


@pytest.mark.parametrize("kind, given, power", [
    ("pca", (), 0.0), ("pca", (0.7,), 0.0), ("whiten", (), 0.5), ("whiten", (0.7,), 0.7), ("whiten", (1.0,), 1.0),
])  # fmt: skip
def test_the_closed_form_is_a_singular_value_decomposition(kind, given, power):
    x = noise(50, 7) @ noise(7, 7, seed=1) + 3
    weight, bias = closed_form_head(x.float(), 4, kind, *given)
    centred = x.float().double().numpy() - x.float().double().numpy().mean(0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    expected = centred @ (directions[:4] / singular[:4, None] ** power).T
    expected /= np.sqrt((expected**2).sum(1).mean())
    found = (x.float() @ weight.T + bias).double().numpy()
    assert found.shape == (50, 4) and weight.dtype == bias.dtype == torch.float32
    assert np.allclose(np.abs(found), np.abs(expected), atol=1e-4)  # a direction may point either way
    assert np.allclose(found @ found.T, expected @ expected.T, atol=1e-4)


def test_more_dimensions_than_the_features_have_are_refused():
    x = noise(50, 3) @ noise(3, 9, seed=1)  # of rank 3
    assert closed_form_head(x, 3, "whiten")[0].shape == (3, 9)
    with pytest.raises(UserError, match=r"--low_dim 4: .* 3 directions of 9 only"):
        closed_form_head(x, 4, "whiten")
    weight, bias = closed_form_head(x, 5, "whiten", fill=True)
    assert torch.equal(weight[:3], closed_form_head(x, 3, "whiten")[0]) and not weight[3:].any() and not bias[3:].any()
    with pytest.raises(UserError, match="4 directions"):
        closed_form_head(noise(5, 9), 5, "pca")


def test_the_losses_take_the_centroids_of_every_pooled_layer():
    torch.manual_seed(2)
    model = build_model("resnet_small", 4, 8, pooling=Pooling.parse("layer2,layer3", "gem,avg", unit=True)).double()
    model.train()
    x, labels = noise(8, 3, 32, 32), torch.tensor([0, 1, 0, 2])
    found = cbswr_losses(model, x, labels)
    maps, both = model.maps(x), labels.repeat(2)
    centres = []
    for label in range(3):
        means = [one[both == label].mean(0, keepdim=True) for one in maps]
        centres.append(model.embed(model.pool(*means))[0])
    z, total = model.embed(model.pool(*maps)), 0.0
    for i in range(8):
        s = [(z[i] @ c).item() / 0.1 for c in centres]
        q = [np.exp(v) / sum(np.exp(s)) for v in s]
        others = [j for j in range(3) if j != both[i]]
        total += (z[i] @ z[(i + 4) % 8]).item() / 0.1 - np.log(sum(np.exp(s[j]) for j in others))
        total += sum(np.log(1 - q[j]) for j in others)
    assert found["metric"].item() == pytest.approx(-total / 8, rel=1e-9)


TINY = {
    "dataset": "toy",
    "backbone": "resnet_small",
    "weights": "none",
    "device": "cpu",
    "batch_size": 8,
    "n_cluster": 4,
}
CLOSED = {"head_init": "whiten", "low_dim": 12, "layers": "layer2,layer3", "pool": "gem,avg"}


def options(given: dict) -> list[str]:
    return [
        word for name, value in given.items() for word in ([f"--{name}"] if value is True else [f"--{name}", value])
    ]


def test_a_closed_form_embedder_without_training(tmp_path):
    write_dataset(tmp_path / "data", "toy")
    at = {"data_dir": tmp_path / "data", "checkpoint_dir": tmp_path}
    run = run_in_process(
        "train.py", *options({**TINY, **CLOSED, **at, "n_epoch": 0, "flip_eval": True, "model_name": "m"})
    )
    assert run.code == 0, run
    model, info = load_checkpoint(tmp_path / "m" / "last.pth")
    assert str(model.pooling) == "gem of layer2 + avg of layer3" and info["low_dim"] == 12
    training = load_split(tmp_path / "data", "toy", "training")
    pooled, _ = extract_features(model, center_crops(training.images, 100), flip=True)
    expected = closed_form_head(pooled, 12, "whiten")
    assert torch.allclose(model.feat_ext[0].weight, expected[0], rtol=1e-3, atol=1e-4)

    # test.py scores the very same embedding, with --flip_eval alone
    scores = json.loads((tmp_path / "m" / "metrics.jsonl").read_text().splitlines()[0])
    given = {
        "dataset": "toy",
        "data_dir": tmp_path / "data",
        "device": "cpu",
        "checkpoint_path": tmp_path / "m" / "last.pth",
    }
    for flip in (True, False):
        target = tmp_path / f"{flip}.json"
        done = run_in_process("test.py", *options({**given, "json": target} | ({"flip_eval": True} if flip else {})))
        assert (
            done.code == 0
            and ("mirror image averaged" in done.out) == flip
            and "gem of layer2 + avg of layer3" in done.out
        )
        tested = json.loads(target.read_text())
        assert tested["flip_eval"] is flip
        if flip:
            assert tested["recall@1"] == scores["recall@1"] and tested["nmi"] == pytest.approx(scores["nmi"])
    failed(run_in_process("test.py", *options({**given, "pool": "gem"})), "--pool goes with --backbone")


def test_training_goes_on_from_the_closed_form(tmp_path):
    write_dataset(tmp_path / "data", "toy")
    at = {"data_dir": tmp_path / "data", "checkpoint_dir": tmp_path, "model_name": "m", "n_epoch": 1}
    assert run_in_process("train.py", *options({**TINY, **CLOSED, **at})).code == 0
    first = torch.load(tmp_path / "m" / "last.pth")["model"]
    start = closed_form_start(tmp_path)
    moved = (first["feat_ext.0.weight"] - start).norm() / start.norm()
    assert 0 < moved < 0.2  # one epoch at the rate of 0.001 goes a little from there
    again = run_in_process("train.py", "--resume", tmp_path / "m", "--n_epoch", "2", "--device", "cpu")
    assert again.code == 0  # the head is not begun anew
    second = torch.load(tmp_path / "m" / "last.pth")["model"]
    assert 0 < (second["feat_ext.0.weight"] - first["feat_ext.0.weight"]).norm() / start.norm() < 0.2


def closed_form_start(folder) -> torch.Tensor:
    """The head that such a run begins with."""
    torch.manual_seed(1024)
    model = build_model("resnet_small", 4, 12, pooling=Pooling.parse(CLOSED["layers"], CLOSED["pool"], unit=True))
    training = load_split(folder / "data", "toy", "training")
    pooled, _ = extract_features(model, center_crops(training.images, 100))
    start_head(model, *closed_form_head(pooled, 12, "whiten"))
    return model.feat_ext[0].weight


def test_a_head_that_the_data_cannot_give_is_refused_in_one_line(tmp_path):
    write_dataset(tmp_path / "data", "toy")
    at = {"data_dir": tmp_path / "data", "checkpoint_dir": tmp_path, "n_epoch": 0}
    failed(
        run_in_process("train.py", *options({**TINY, **at, **CLOSED, "low_dim": 100})), "--low_dim 100", "directions"
    )
    failed(
        run_in_process("train.py", *options({**TINY, **at, **CLOSED, "layers": "layer4,layer3"})), "no stage 'layer4'"
    )
    failed(run_in_process("train.py", *options({**TINY, **at, **CLOSED, "compile": True})), "--compile", "--layers")
    assert not (tmp_path / "CBSwR_toy").exists()


@pytest.mark.parametrize(
    "config",
    [
        {"stripes": []},
        {"stripes": "no"},
        {"layers": 3},
        {"pool": "mean"},
        {"layers": "layer7,layer3"},
        {"head_init": []},
    ],
)
def test_a_checkpoint_with_senseless_pooling_is_refused(tmp_path, config):
    state = build_model("resnet_small", 4, 8).state_dict()
    torch.save({"model": state, "epoch": 1, "config": {"backbone": "resnet_small", **config}}, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"c\.pth"):
        load_checkpoint(tmp_path / "c.pth")
