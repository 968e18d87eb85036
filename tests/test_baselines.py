"""The presets of --baseline, and the instance softmax loss against its literal formula."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from scripts import failed
from synthetic import write_dataset
from torch import Tensor
from torch.nn import functional as F
from training import execute, options, outcome, same_weights, trained

import train as script
from losses import TrainingStep, instance_softmax_loss
from models import build_model

pytestmark = pytest.mark.usefixtures("one_thread")
DOUBLE = {"rtol": 1e-10, "atol": 1e-12}


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def literal(x: Tensor, t: float, alpha: float, neg_m: int) -> Tensor:
    """-1/2m sum_i (log P(i's other view) + alpha neg_m sum_j log(1 - P(j))), j the views of other images."""
    rows = len(x)
    total = torch.zeros((), dtype=x.dtype)
    for i in range(rows):
        partner = (i + rows // 2) % rows
        others = [j for j in range(rows) if j not in (i, partner)]
        e = [torch.exp(torch.dot(x[i], x[j].detach()) / t) for j in range(rows)]
        everything = e[partner] + neg_m * sum(e[j] for j in others)
        total = total + torch.log(e[partner] / everything)
        total = total + alpha * neg_m * sum(torch.log(1 - e[j] / everything) for j in others)
    return -total / rows


@pytest.mark.parametrize(
    "t, alpha, neg_m", [(0.1, 1.0, 1), (0.1, 1.0, 3), (0.07, 0.5, 1), (1.0, 0.0, 2), (0.5, 2.0, 7)]
)
@pytest.mark.parametrize("images, dim", [(2, 3), (3, 4), (8, 16), (16, 128)])
def test_instance_softmax_is_the_formula(images, dim, t, alpha, neg_m):
    x = unit(2 * images, dim, seed=images).requires_grad_()
    loss, expected = instance_softmax_loss(x, t, alpha, neg_m), literal(x, t, alpha, neg_m)
    torch.testing.assert_close(loss, expected, **DOUBLE)
    gradients = [torch.autograd.grad(value, x)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-8)  # the literal log(1 - p) cancels
    single = instance_softmax_loss(x.detach().float(), t, alpha, neg_m)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected.detach(), rtol=2e-5, atol=2e-5)


def test_defaults_are_those_of_the_released_code():
    assert torch.equal(instance_softmax_loss(unit(8, 5)), instance_softmax_loss(unit(8, 5), 0.1, alpha=1.0, neg_m=1))


@pytest.mark.parametrize("neg_m", [1, 3])
@pytest.mark.parametrize("x", [
    unit(1, 6).expand(8, 6).clone(),  # all the same
    torch.cat([unit(4, 6), -unit(4, 6)]),  # views opposite
    unit(2, 6).repeat_interleave(2, 0).repeat(2, 1),  # two pairs of equal images
])  # fmt: skip
def test_extreme_embeddings_are_finite(x, neg_m):
    """With a temperature at which a plain exponential of a float overflows."""
    rows = x.float().requires_grad_()
    loss = instance_softmax_loss(rows, 0.005, 1.0, neg_m)
    loss.backward()
    assert loss.isfinite() and rows.grad.isfinite().all()
    if neg_m == 1 and torch.equal(x, x[:1].expand_as(x)):  # every probability is 1/7
        assert loss.item() == pytest.approx(math.log(7) - 6 * math.log(6 / 7), rel=1e-5)


def test_under_autocast_it_is_float32():
    with torch.autocast("cpu", torch.bfloat16):
        loss = instance_softmax_loss(unit(8, 5).float())
    assert loss.dtype == torch.float32
    assert torch.equal(loss, instance_softmax_loss(unit(8, 5).float()))


@pytest.mark.parametrize("x, neg_m, message", [
    (unit(2, 3), 1, "m > 1"), (unit(5, 3), 1, "must be"), (torch.zeros(4), 1, "must be"), (unit(4, 3), 0, "neg_m"),
])  # fmt: skip
def test_refuses(x, neg_m, message):
    with pytest.raises(ValueError, match=message):
        instance_softmax_loss(x, neg_m=neg_m)


def test_a_step_of_isif_is_the_loss_of_its_embeddings_and_trains_these_alone():
    torch.manual_seed(0)
    model = build_model("resnet_small", 4, 8).double()
    inputs = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    losses = TrainingStep(model, (1.0, 0.0, 0.0), metric_loss="instance")(inputs)
    embedding = model.embed(model.pool(model.base_model(inputs)))
    torch.testing.assert_close(losses["loss"], literal(embedding, 0.1, 1.0, 1), **DOUBLE)
    losses["loss"].backward()
    touched = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert touched == {"base_model", "feat_ext"}


# ---------------------------------------------------------------- presets


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


def parsed(*argv: str) -> dict:
    return vars(script.parse_args(list(argv)))


def test_cbswr_is_the_default_and_each_other_one_differs():
    plain = parsed()
    differing = {
        name: {key for key, value in parsed(f"--baseline={name}").items() if value != plain[key]}
        for name in script.BASELINES
    }
    more = {"baseline", "given", "by_preset"}
    assert differing == {
        "isif": {"metric_loss", "ml", "rim", "recon", "positives"} | more,
        "cbs": {"recon"} | more,
        "cbswr": more,
        "kmeans": {"pseudo_labels"} | more,
        "stml": {"metric_loss", "ml", "rim", "recon", "positives", "distill_dim", "group", "batch_size", "optimizer",
                 "lr"} | more,
        "deepcluster": {"metric_loss", "ml", "rim", "recon", "positives", "pseudo_labels"} | more,
    }  # fmt: skip


def test_what_is_given_stands_above_the_preset_and_the_preset_above_a_file(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"ml": 0.5, "rim": 0.7, "lr": 0.3}))
    args = parsed(f"--config={file}", "--baseline=isif", "--rim=0.2")
    assert (args["ml"], args["rim"], args["recon"], args["lr"]) == (1.0, 0.2, 0.0, 0.3)
    file.write_text(json.dumps({"baseline": "isif", "rim": 0.7}))  # one list of options: the single one counts
    args = parsed(f"--config={file}")
    assert (args["metric_loss"], args["rim"], args["ml"]) == ("instance", 0.7, 1.0)


def test_the_run_keeps_what_the_preset_set_and_says_what_differs(data, tmp_path, capsys):
    done = trained(data, tmp_path / "a", baseline="isif", positives="nn")
    config = json.loads((done.run / "config.json").read_text())
    assert config["baseline"] == "isif" and config["positives"] == "nn"
    assert {name: config[name] for name in ("metric_loss", "ml", "rim", "recon")} == {
        "metric_loss": "instance", "ml": 1.0, "rim": 0.0, "recon": 0.0,
    }  # fmt: skip
    assert "baseline isif: --metric_loss instance" in (text := capsys.readouterr().out)
    assert "--positives nn; not as it has it: --positives\n" in text
    same = trained(data, tmp_path / "b", metric_loss="instance", ml=1, rim=0, recon=0, positives="nn")
    assert same_weights(done, same)
    assert done.rows[0]["loss"] == pytest.approx(done.rows[0]["metric_loss"])


def test_a_preset_is_resumed(data, tmp_path):
    trained(data, tmp_path / "a", baseline="kmeans", rim=0.1)
    assert script.main(["--resume", str(tmp_path / "a" / "run"), "--n_epoch=2"]) == 0
    resumed = outcome(tmp_path / "a" / "run")
    assert resumed.saved["config"]["rim"] == 0.1
    assert same_weights(resumed, trained(data, tmp_path / "b", baseline="kmeans", rim=0.1, n_epoch=2))


def test_refused(data, tmp_path):
    failed(execute("--baseline=isi"), "did you mean isif?")
    failed(execute(*options(data, tmp_path / "runs", baseline="isif", batch_size=1)), "--batch_size of at least 2")
    assert not (tmp_path / "runs").exists()
