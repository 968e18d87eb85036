"""The start that is chosen without labels: what finds images again by their parts."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from synthetic import write_dataset, write_split
from tensors import noise
from torch.nn import functional as F
from training import assert_same, resumed, same_weights, stopped, trained

from datasets.arrays import load_split
from datasets.views import part_crops
from models import start
from models.closed_form import Spectrum
from models.start import Head, aligned_share, best_of, score_heads
from recipes import start as recipes_start
from utils.errors import UserError
from utils.metrics import mean_log_rank


def test_mean_log_rank_by_its_definition():
    first = F.normalize(noise(7, 3), dim=1)
    second = F.normalize(first + 0.8 * noise(7, 3, seed=1), dim=1)
    ranks = []
    for queries, rows in ((first, second), (second, first)):
        for i, query in enumerate(queries):
            order = sorted(range(7), key=lambda j: float(-query @ rows[j]))
            ranks.append(1 + order.index(i))
    assert max(ranks) > 1
    assert mean_log_rank(first, second) == pytest.approx(np.log(ranks).mean())
    same = torch.ones(7, 3)
    assert mean_log_rank(same, same) == pytest.approx(np.log(7))  # ties are no finds


def features(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features of 200 images and of their parts, with a nuisance in one direction.

    It has `scale` times the variance of the 9 others, which tell an image, and differs by part.
    """
    images = noise(200, 10).float()
    parts = images[:, None] + 0.5 * noise(200, 4, 10, seed=1).float()
    images[:, 0] *= scale
    parts[..., 0] = scale * noise(200, 4, seed=2).float()
    return images, parts


def test_whitening_is_chosen_where_the_largest_variance_is_noise():
    images, parts = features(20.0)
    heads = score_heads(images, parts, torch.arange(200), False)
    best = best_of(heads, False)
    assert (best.kind, heads[0].kind) == ("whiten", "svd")
    assert best.power >= 0.6
    assert best.score > 1.5 * heads[0].score


def test_squares_judge_only_where_images_are_not_aligned():
    images, parts = features(1.0)
    parts[:, 2:] = noise(200, 2, 10, seed=5).float()  # squares tell nothing
    aligned, others = (
        best_of(score_heads(images, parts, torch.arange(200), is_aligned), is_aligned).score
        for is_aligned in (True, False)
    )
    assert aligned > 2 * others


def stripes_of_twins(n_shifted: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features of 100 threes of similar images, and their 3 stripes, top to bottom.

    The stripes of the third image of `n_shifted` threes lie one stripe lower.
    """
    kinds = noise(100, 1, 3, 8).expand(100, 3, 3, 8).clone()
    kinds[:n_shifted, 2] = kinds[:n_shifted, 2].roll(1, dims=1)
    stripes = (kinds + 0.05 * noise(100, 3, 3, 8, seed=1)).flatten(0, 1).float()
    pooled = noise(100, 1, 16, seed=2) + 0.01 * noise(100, 3, 16, seed=3)
    return pooled.flatten(0, 1).float(), stripes


def test_stripes_that_lie_at_the_same_height():
    pooled, stripes = stripes_of_twins(0)
    assert aligned_share(pooled, [stripes]) == 1.0
    pooled, stripes = stripes_of_twins(30)
    # of the 6 directed pairs of three images 4 are with the one that is shifted
    assert aligned_share(pooled, [stripes]) == pytest.approx(1 - 0.3 * 4 / 6)
    both = aligned_share(pooled, [stripes, stripes_of_twins(0)[1]])
    assert both == pytest.approx(1 - 0.3 * 4 / 6 / 2)


def test_copies_of_an_image_keep_the_frozen_features():
    images, parts = features(1.0)
    copies = images[:1].expand(200, -1), parts[:1].expand(200, -1, -1)
    assert best_of(score_heads(*copies, torch.arange(200), False), False).kind == "svd"
    assert aligned_share(copies[0], [noise(1, 3, 4).float().expand(200, 3, 4)]) <= 1
    for kind, centered in (("svd", False), ("whiten", True)):
        weight, bias = Spectrum.of(copies[0], centered).head(10, 0.5)
        assert weight.isfinite().all() and bias.isfinite().all(), kind


def test_many_images_are_judged_by_heads_of_some():
    assert start._thinned(torch.arange(50), 50).equal(torch.arange(50))
    thinned = start._thinned(torch.arange(51), 50)
    assert len(thinned.unique()) == 50 and (thinned[0], thinned[-1]) == (0, 50)


def test_few_images_keep_the_frozen_features():
    images, parts = features(1.0)
    for count, is_aligned in ((2, False), (5, False), (99, False), (49, True)):
        (head,) = score_heads(images[:count], parts[:count], torch.arange(count), is_aligned)
        assert head.kind == "svd" and 0 < head.score <= 1
    assert len(score_heads(images[:50], parts[:50], torch.arange(50), True)) == 9


def test_of_heads_as_good_the_strongest_is_taken_where_images_are_aligned():
    heads = [Head("svd", 0.0, 0.7), Head("whiten", 0.6, 0.8), Head("whiten", 0.75, 0.785)]
    heads.append(Head("whiten", 0.9, 0.783))
    assert best_of(heads, False).power == 0.6 and best_of(heads, True).power == 0.75


def test_parts_lie_where_they_should(tmp_path):
    ramp = np.zeros((3, 40, 40, 3), np.uint8)
    ramp[:] = np.arange(40)[None, None, :, None]  # brighter to the right
    write_split(tmp_path, "ramp", "training", ramp, np.arange(3))
    split = load_split(tmp_path, "ramp", "training")
    batches = list(part_crops(split, np.array([2, 0]), 7, batch_size=1))
    assert [tuple(batch.shape) for batch in batches] == [(4, 35, 35, 3)] * 2
    left, right = batches[0][:2].float().mean((1, 2, 3)).tolist()
    assert left == pytest.approx(11.5, abs=0.5)  # columns 0 to 23
    assert right == pytest.approx(27.5, abs=0.5)  # columns 16 to 39
    spread = [part.max() - part.min() for part in batches[0][2:].float()]
    assert all(40 * 0.15**0.5 - 3 < width < 40 * 0.5**0.5 + 1 for width in spread)
    shared = [
        batch
        for rank in (0, 1)
        for batch in part_crops(split, np.array([2, 0]), 7, 1, share=(rank, 2))
    ]
    assert all(map(torch.equal, shared, batches))


FROZEN = "frozen features"
SETTINGS = {"recipe": "best", "low_dim": None, "lr": None, "batch_size": 8}


@pytest.mark.parametrize("least, stripes", [(0.0, "3,1"), (1.01, "1")])
def test_the_recipe_keeps_its_choice(tmp_path, monkeypatch, least, stripes):
    monkeypatch.setattr(recipes_start, "ALIGNED", least)
    write_dataset(tmp_path / "data", count=120)
    run = trained(tmp_path / "data", tmp_path / "whole", n_epoch=2, **SETTINGS)
    config = json.loads((run.run / "config.json").read_text())
    log = (run.run / f"{run.run.name}.log").read_text()
    assert config["stripes"] == stripes
    assert f" with stripes {stripes}\n" in log and "% of stripes find their like" in log
    (measure,) = re.findall(r"heads find parts: (.*)", log)
    head = re.search(r"the start is (.*) with stripes", log)[1]
    start_power = float(head.removeprefix("whiten ").replace(FROZEN, "0"))
    assert config["whiten_power"] == start_power
    fitted = re.findall(r"head by (.*) of the features", log)
    assert len(fitted) == 4  # before and after each epoch
    assert all(float(text.partition(" ")[2] or 0) <= 0.45 for text in fitted[::2])
    assert all(float(text.partition(" ")[2] or 0) >= start_power for text in fitted[1::2])
    scores = {text[:-6]: float(text[-5:]) for text in measure.split(", ")}
    assert len(scores) == 9
    least = max(scores.values()) * (0.98 if stripes == "3,1" else 1) - 0.001  # three digits
    assert scores[head] >= least
    again = stopped(tmp_path / "data", tmp_path / "stopped", 20, n_epoch=2, **SETTINGS)
    assert_same(resumed(again), run)


@pytest.mark.parametrize(
    ("chosen", "expected"), [(-1, ["1", "0.45", "1"]), (3, ["0.3", "0.3", "0.45"])]
)
def test_training_begins_with_less_whitening_and_ends_with_more(
    tmp_path, monkeypatch, chosen, expected
):
    monkeypatch.setattr(recipes_start, "best_of", lambda heads, is_aligned: heads[chosen])
    write_dataset(tmp_path / "data", count=120)
    run = trained(tmp_path / "data", tmp_path / "whole", n_epoch=1, **SETTINGS)
    begun = trained(tmp_path / "data", tmp_path / "start", n_epoch=0, **SETTINGS)
    begun = resumed(begun.run, "--n_epoch=1")
    log = (begun.run / f"{begun.run.name}.log").read_text()
    heads = re.findall(r"head by whiten (.*) of the features", log)
    assert heads == expected  # the start, and before and after the epoch
    assert same_weights(begun, run)


def test_a_kind_of_head_that_is_given_stays(tmp_path):
    write_dataset(tmp_path / "data", count=120)
    run = trained(tmp_path / "data", tmp_path, "--head_init=pca", n_epoch=1, **SETTINGS)
    log = (run.run / f"{run.run.name}.log").read_text()
    assert log.count("head by pca of") == 2 and "find parts" not in log
    assert json.loads((run.run / "config.json").read_text())["refit_head"] == "start"


def test_options_that_are_given_stay(tmp_path):
    write_dataset(tmp_path / "data", count=120)
    words = {"recipe": "best", "lr": None, "n_epoch": None}
    run = trained(tmp_path / "data", tmp_path / "a", "--stripes=3,1", **words, low_dim=None)
    config = json.loads((run.run / "config.json").read_text())
    assert (config["stripes"], config["low_dim"]) == ("3,1", 320)
    run = trained(tmp_path / "data", tmp_path / "b", **words, low_dim=300)  # one piece has 192
    config = json.loads((run.run / "config.json").read_text())
    assert (config["stripes"], config["low_dim"]) == ("3,1", 300)
    (tmp_path / "more.json").write_text('{"n_epoch": 1, "stripes": "2,1"}')
    (tmp_path / "plain.json").write_text(
        '{"method": "soft_centers", "layers": "last2", "head_init": "auto", "stripes": "1,1"}'
    )
    plain = {"recipe": tmp_path / "plain.json", "low_dim": None, "n_epoch": 0}
    run = trained(tmp_path / "data", tmp_path / "d", **plain)
    assert json.loads((run.run / "config.json").read_text())["stripes"] in ("1", "1,1")
    more = f"--config={tmp_path / 'more.json'}"
    run = trained(tmp_path / "data", tmp_path / "c", more, **words, low_dim=None)
    config = json.loads((run.run / "config.json").read_text())
    assert (config["stripes"], config["n_epoch"]) == ("2,1", 1)


@pytest.mark.parametrize("least, epochs", [(24, [1, 2, 3]), (25, [0])])
def test_fewer_images_than_the_recipe_trains_on(tmp_path, least, epochs):
    write_dataset(tmp_path / "data")
    run = trained(tmp_path / "data", tmp_path, f"--min_images={least}", n_epoch=None, **SETTINGS)
    assert [row["epoch"] for row in run.rows] == epochs


def test_few_images_keep_the_start(tmp_path):
    write_dataset(tmp_path / "data")
    run = trained(tmp_path / "data", tmp_path, n_epoch=None, **SETTINGS)
    assert [row["epoch"] for row in run.rows] == [0]
    log = (run.run / f"{run.run.name}.log").read_text()
    assert "24 images are too few to train on (min_images is 1000): the start is" in log
    assert "low_dim 512 becomes 192 for 24 images" in log
    again = resumed(run.run, "--n_epoch=1")
    assert [row["epoch"] for row in again.rows] == [0, 1]
    assert "goes on after epoch 0, step 0" in again.out


def test_training_on_a_sample(tmp_path):
    write_dataset(tmp_path / "data")
    split = load_split(tmp_path / "data", "tiny", "training")
    sample = split.sample(10, seed=3)
    assert len(sample) == 10 and set(sample.rows) < set(split.rows)
    assert np.array_equal(split.sample(10, seed=3).rows, sample.rows)
    assert not np.array_equal(split.sample(10, seed=4).rows, sample.rows)
    with pytest.raises(UserError, match="images to train on, not 1000"):
        split.sample(1000, seed=3)
    run = trained(tmp_path / "data", tmp_path, n_images=10, n_epoch=1, batch_size=5)
    assert "10 images" in (run.run / f"{run.run.name}.log").read_text()
