"""The arrays are what they should be, and an epoch's views are fixed by (seed, epoch) and by nothing else."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import shapes, write_dataset, write_split

from datasets import EpochPlan, ResidentLoader, TwoViewLoader, center_crops, crop_size, load_split
from datasets.views import Views, cut_views
from utils.errors import UserError

# ---------------------------------------------------------------- arrays


def test_load_split(tmp_path):
    images, labels = shapes(10, range(3), 16, seed=1)
    path = write_split(tmp_path, "tiny", "training", images, labels.astype(np.int32))
    for folder in (tmp_path, tmp_path / "tiny", str(tmp_path)):
        split = load_split(folder, "tiny", "training")
        np.testing.assert_array_equal(split.images, images)
        np.testing.assert_array_equal(split.labels, labels)
        assert split.labels.dtype == np.int64
        assert isinstance(split.images, np.memmap) and not split.images.flags.writeable
        assert (len(split), split.image_size, split.path) == (10, 16, path)


def test_the_two_halves_are_told_apart(tmp_path):
    write_dataset(tmp_path)
    training, validation = (load_split(tmp_path, "tiny", half) for half in ("training", "validation"))
    assert set(training.labels) == {1, 2, 3, 4} and set(validation.labels) == {5, 6, 7, 8}


def test_several_sizes(tmp_path):
    for size in (16, 24):
        write_split(tmp_path, "tiny", "training", *shapes(4, range(2), size, seed=1))
    assert load_split(tmp_path, "tiny", "training", 24).image_size == 24
    refused(tmp_path, "choose one with --image_size", "[16, 24]")
    write_split(tmp_path, "tiny", "training", *shapes(2, range(2), 256, seed=1))
    assert load_split(tmp_path, "tiny", "training").image_size == 256
    assert load_split(tmp_path, "tiny", "training", 16).image_size == 16


def refused(folder, *words: str, size: int | None = None) -> None:
    with pytest.raises(UserError) as caught:
        load_split(folder, "tiny", "training", size)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [None, 32])
def test_missing_files_name_the_script_that_makes_them(tmp_path, size):
    name = f"training_tiny_{size or 256}resized_img.npy"
    refused(tmp_path, name, "no such file", "cub200, car196, sop, inshop, glyphs", size=size)
    with pytest.raises(UserError, match=r"python pre_process/pre_process_glyphs\.py"):
        load_split(tmp_path, "glyphs", "training", size)


def test_missing_labels(tmp_path):
    image_file = write_split(tmp_path, "tiny", "training", *shapes(4, range(2), 16, seed=1))
    labels = image_file.with_name("training_tiny_16resized_label.npy")
    labels.unlink()
    refused(tmp_path, str(labels), "no such file")


IMAGES, LABELS = shapes(6, range(2), 16, seed=1)


@pytest.mark.parametrize("images, labels, words", [
    (IMAGES.astype(np.float32), LABELS, ["_img.npy", "expected uint8 images (N, S, S, 3), found float32"]),
    (IMAGES[..., 0], LABELS, ["_img.npy", "expected uint8 images"]),
    (IMAGES[:, :, :12], LABELS, ["_img.npy", "(6, 16, 12, 3)"]),
    (np.concatenate([IMAGES, IMAGES], 3), LABELS, ["_img.npy", "(6, 16, 16, 6)"]),
    (IMAGES, LABELS.astype(np.float64), ["_label.npy", "expected integer labels (N,), found float64"]),
    (IMAGES, LABELS[:, None], ["_label.npy", "found int64 (6, 1)"]),
    (IMAGES, LABELS[:5], ["_img.npy", "6 images but 5 labels"]),
    (IMAGES[:1], LABELS[:1], ["_img.npy", "holds 1 images; at least 2 are needed"]),
    (IMAGES[:0], LABELS[:0], ["_img.npy", "holds 0 images"]),
])  # fmt: skip
def test_arrays_of_another_kind(tmp_path, images, labels, words):
    write_split(tmp_path, "tiny", "training", images, labels)
    refused(tmp_path, *words)


@pytest.mark.parametrize("which", ["img", "label"])
def test_damaged_files(tmp_path, which):
    write_split(tmp_path, "tiny", "training", IMAGES, LABELS)
    path = tmp_path / "tiny" / f"training_tiny_16resized_{which}.npy"
    content = path.read_bytes()
    for damaged in (content[:-3], content[:60], content[:4], b"", b"no array"):
        path.write_bytes(damaged)
        refused(tmp_path, str(path), "pre-process again")
    with open(path, "wb") as file:
        np.savez(file, a=IMAGES)
    refused(tmp_path, str(path), "not a plain .npy array")


# ---------------------------------------------------------------- the plan of an epoch


def as_tuple(plan: EpochPlan) -> tuple:
    return tuple(a.tolist() for a in (plan.order, plan.top, plan.left, plan.flip, plan.second))


def test_the_plan_is_fixed_by_seed_and_epoch():
    positives = np.roll(np.arange(50), 1)
    plans = {
        (seed, epoch): as_tuple(EpochPlan(50, 8, 64, seed, epoch, positives)) for seed in (0, 1) for epoch in (1, 2)
    }
    for (seed, epoch), plan in plans.items():
        assert plan == as_tuple(EpochPlan(50, 8, 64, seed, epoch, positives))
    for one, other in itertools.combinations(plans.values(), 2):
        assert all(a != b for a, b in zip(one, other, strict=True))  # order, crops, flips and positives: all anew


def test_the_batch_size_does_not_change_what_is_drawn():
    assert as_tuple(EpochPlan(50, 8, 64, 3, 1)) == as_tuple(EpochPlan(50, 25, 64, 3, 1))


def test_chances_and_bounds():
    plan = EpochPlan(20_000, 10, 256, 1024, 1, np.full(20_000, -1))
    assert sorted(plan.order) == list(range(20_000))
    assert plan.flip.shape == plan.top.shape == plan.left.shape == (2, 20_000)
    for view in (0, 1):
        assert abs(plan.flip[view].mean() - 0.75) < 0.015
        for offset in (plan.top[view], plan.left[view]):
            assert set(offset) == set(range(33))  # 224 of 256: every one of 0 ... 32
            assert np.bincount(offset).min() > 0.7 * 20_000 / 33
    assert abs((plan.second == -1).mean() - 0.5) < 0.015
    pairs = [
        plan.top[0],
        plan.left[0],
        plan.flip[0],
        plan.top[1],
        plan.left[1],
        plan.flip[1],
        plan.second == -1,
        plan.order,
    ]
    correlations = np.corrcoef(np.array(pairs, dtype=float)) - np.eye(len(pairs))
    assert np.abs(correlations).max() < 0.03  # each drawn on its own


def test_without_positives_the_second_view_is_of_the_image_itself():
    assert EpochPlan(9, 2, 32, 0, 1).second.tolist() == list(range(9))


def test_the_last_incomplete_batch_is_dropped():
    plan = EpochPlan(23, 5, 32, 0, 1)
    assert len(plan) == 4
    seen = np.concatenate([plan.images(batch) for batch in range(len(plan))])
    assert len(seen) == len(set(seen)) == 20
    assert len(EpochPlan(20, 5, 32, 0, 1)) == 4 and len(EpochPlan(5, 5, 32, 0, 1)) == 1


@pytest.mark.parametrize("batch_size", [0, 24])
def test_batches_that_cannot_be_filled_are_refused(batch_size):
    with pytest.raises(ValueError, match="there are 23"):
        EpochPlan(23, batch_size, 32, 0, 1)


def test_views_are_first_views_then_second_views():
    positives = np.roll(np.arange(23), 1)
    plan = EpochPlan(23, 5, 32, 0, 1, positives)
    took = []
    for batch in range(len(plan)):
        images, views = plan.images(batch), plan.views(batch)
        assert views.index[:5].tolist() == images.tolist()
        for row, image in enumerate(images):
            for view in (0, 1):
                place = row + 5 * view
                assert views.top[place] == plan.top[view, image]
                assert views.left[place] == plan.left[view, image]
                assert views.flip[place] == plan.flip[view, image]
            took.append(views.index[row + 5] == positives[image])
            assert views.index[row + 5] in (image, positives[image])
    assert any(took) and not all(took)


# ---------------------------------------------------------------- cutting


@pytest.mark.parametrize("size, crop", [(256, 224), (64, 56), (32, 28), (96, 84), (9, 7)])
def test_crop_size(size, crop):
    assert crop_size(size) == crop


def test_cut_views_is_a_crop_and_a_flip():
    images = np.random.default_rng(0).integers(0, 256, (5, 20, 20, 3), dtype=np.uint8)
    rng = np.random.default_rng(1)
    views = Views(rng.integers(0, 5, 40), rng.integers(0, 5, 40), rng.integers(0, 5, 40), rng.random(40) < 0.5)
    patches = cut_views(images, views, 16)
    assert patches.dtype == np.uint8 and patches.shape == (40, 16, 16, 3)
    for row, patch in enumerate(patches):
        for y, x in itertools.product((0, 3, 15), (0, 6, 15)):
            column = views.left[row] + (15 - x if views.flip[row] else x)
            assert patch[y, x].tolist() == images[views.index[row], views.top[row] + y, column].tolist()
        expected = images[
            views.index[row], views.top[row] : views.top[row] + 16, views.left[row] : views.left[row] + 16
        ]
        np.testing.assert_array_equal(patch, np.fliplr(expected) if views.flip[row] else expected)


@pytest.fixture
def training(tmp_path):
    return load_split(write_dataset(tmp_path, size=32), "tiny", "training").images


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(training, workers):
    plan = EpochPlan(len(training), 5, 32, 7, 2, np.roll(np.arange(24), 1))
    expected = list(TwoViewLoader(training, plan, 0))
    actual = list(TwoViewLoader(training, plan, workers))
    assert len(actual) == len(expected) == len(TwoViewLoader(training, plan)) == 4
    for (views, images), (other_views, other_images) in zip(actual, expected, strict=True):
        assert views.shape == (10, 28, 28, 3)
        np.testing.assert_array_equal(views, other_views)
        np.testing.assert_array_equal(images, other_images)


def test_a_batch_holds_two_views_of_its_images(training):
    plan = EpochPlan(len(training), 5, 32, 7, 2)
    for number, (views, images) in enumerate(TwoViewLoader(training, plan, 1)):
        assert images.tolist() == plan.images(number).tolist()
        np.testing.assert_array_equal(views, cut_views(training, plan.views(number), 28))
        for row, image in enumerate(images.tolist()):
            for view in views[row], views[row + 5]:
                crops = np.lib.stride_tricks.sliding_window_view(training[image], (28, 28, 3))[:, :, 0]
                both = np.concatenate([crops, crops[..., ::-1, :]])
                assert (both == view.numpy()).all((2, 3, 4)).any()  # cut somewhere from this very image


@pytest.mark.parametrize("workers", [0, 2])
def test_first_batch_skips(training, workers):
    plan = EpochPlan(len(training), 5, 32, 7, 2)
    whole, rest = list(TwoViewLoader(training, plan, 0)), TwoViewLoader(training, plan, workers, first_batch=3)
    assert len(rest) == 1
    for (views, images), (other_views, other_images) in zip(rest, whole[3:], strict=True):
        np.testing.assert_array_equal(views, other_views)
        np.testing.assert_array_equal(images, other_images)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_may_be_left_early_and_faults_reach_the_caller(training, workers):
    plan = EpochPlan(len(training), 2, 32, 7, 2)
    batches = iter(TwoViewLoader(training, plan, workers))
    next(batches)
    batches.close()
    plan.second = np.full(24, 99)  # no such image
    with pytest.raises(IndexError):
        list(TwoViewLoader(training, plan, workers))


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("batch_size", [1, 7, 24, 100])
def test_center_crops(training, workers, batch_size):
    batches = list(center_crops(training, batch_size, workers))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    np.testing.assert_array_equal(np.concatenate(batches), training[:, 2:30, 2:30])


def test_fortran_order_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    np.save(folder / "training_set_32resized_img.npy", np.asfortranarray(np.zeros((4, 32, 32, 3), np.uint8)))
    np.save(folder / "training_set_32resized_label.npy", np.arange(4))
    with pytest.raises(UserError, match="Fortran order"):
        load_split(tmp_path, "set", "training")


def test_resident_views_equal_cut_views() -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
    plan = EpochPlan(20, 5, 32, 1, 1, np.roll(np.arange(20), 1))
    host = list(TwoViewLoader(images, plan, 1))
    resident = list(ResidentLoader(torch.from_numpy(images), plan))
    assert len(host) == len(resident) == 4
    for (views, index), (gathered, same) in zip(host, resident, strict=True):
        assert torch.equal(views, gathered)
        assert torch.equal(index, same)


# ---------------------------------------------------------------- the same data


def test_fingerprint_sees_every_byte_shape_and_dtype(tmp_path, monkeypatch):
    """Also at the edges of the blocks that it is computed by."""
    monkeypatch.setattr("datasets.arrays.HASH_BLOCK", 1000)
    images, labels = shapes(4, range(1, 3), 16, 0)  # 3072 bytes
    seen = set()
    for place in (None, 0, 999, 1000, 2999, 3071):
        changed = images.copy()
        if place is not None:
            changed.reshape(-1)[place] ^= 1
        write_split(tmp_path, "tiny", "training", changed, labels)
        found = load_split(tmp_path, "tiny", "training").fingerprint()
        assert found["images"].startswith("uint8 (4, 16, 16, 3) sha256 ")
        assert found["labels"].startswith("int64 (4,) sha256 ")
        seen.add(found["images"])
    assert len(seen) == 6
    write_split(tmp_path, "tiny", "training", changed, labels.astype(np.int32))
    assert load_split(tmp_path, "tiny", "training").fingerprint() == found  # labels count as int64
    write_split(tmp_path, "tiny", "training", changed, labels + 1)
    other = load_split(tmp_path, "tiny", "training").fingerprint()
    assert other["images"] == found["images"] and other["labels"] != found["labels"]


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_check_before_and_after_each_batch(training, workers):
    calls: list[int] = []
    plan = EpochPlan(len(training), 5, training.shape[1], 0, 1)
    list(TwoViewLoader(training, plan, workers, check=lambda: calls.append(1)))
    assert len(calls) == 2 * len(plan)
    list(center_crops(training, 7, workers, lambda: calls.append(1)))
    assert len(calls) == 2 * len(plan) + 2 * -(-len(training) // 7)
