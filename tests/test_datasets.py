"""The arrays are checked, and an epoch's views are fixed by seed and epoch and nothing else."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic import shapes, write_dataset, write_split

from datasets.arrays import UNLABELED, Split, beside, load_split
from datasets.views import (
    CropPlan,
    EpochPlan,
    center_crops,
    crop_size,
    cut_crops,
    gather_crops,
    images_on,
    resize_crops,
    two_view_batches,
)
from utils.errors import UserError

IMAGES, LABELS = shapes(24, range(1, 5), 32, seed=1)


@pytest.fixture
def training(tmp_path) -> Split:
    return load_split(write_dataset(tmp_path), "tiny", "training")


def split_of(count: int, image_size: int = 32) -> Split:
    """Make a split whose pixels nobody looks at."""
    images = np.broadcast_to(np.uint8(0), (count, image_size, image_size, 3))
    return Split(images, np.arange(count), Path("none"), np.arange(count))


# ------------------------------------------------------------------------------------ arrays


def test_load_split(tmp_path):
    path = write_split(tmp_path, "tiny", "training", IMAGES, LABELS.astype(np.int32))
    write_split(tmp_path, "tiny", "validation", IMAGES[:9], LABELS[:9] + 4)
    for folder in (tmp_path, tmp_path / "tiny", str(tmp_path)):
        split = load_split(folder, "tiny", "training")
        np.testing.assert_array_equal(split.images, IMAGES)
        np.testing.assert_array_equal(split.labels, LABELS)
        assert split.labels.dtype == np.int64
        assert isinstance(split.images, np.memmap) and not split.images.flags.writeable
        assert (len(split), split.image_size, split.path) == (24, 32, path)
    assert str(load_split(tmp_path, "tiny", "validation")) == "9 images of 4 classes"
    renamed = (tmp_path / "tiny").rename(tmp_path / "Downloads")
    assert len(load_split(renamed, "tiny", "training")) == 24


def assert_refused(folder: Path, *words: str, dataset: str = "tiny") -> None:
    with pytest.raises(UserError) as caught:
        load_split(folder, dataset, "training")
    for word in words:
        assert word in str(caught.value)


def test_several_sizes(tmp_path):
    for size in (16, 24):
        write_split(tmp_path, "tiny", "training", *shapes(4, range(2), size, seed=1))
    assert load_split(tmp_path, "tiny", "training", 24).image_size == 24
    assert_refused(tmp_path, "in sizes [16, 24]; choose an image size")
    write_split(tmp_path, "tiny", "training", *shapes(2, range(2), 256, seed=1))
    assert load_split(tmp_path, "tiny", "training").image_size == 256
    assert load_split(tmp_path, "tiny", "training", 16).image_size == 16


def test_missing_files_name_the_script_that_makes_them(tmp_path):
    name = "training_glyphs_256resized_img.npy: no such file; make it with python "
    assert_refused(tmp_path, name + "pre_process/pre_process_glyphs.py", dataset="glyphs")
    assert_refused(tmp_path, "pre_process_folder.py --images DIR --name tiny")
    labels = beside(write_split(tmp_path, "tiny", "training", IMAGES, LABELS), "label.npy")
    labels.unlink()
    assert_refused(tmp_path, f"{labels}: no such file")


@pytest.mark.parametrize(
    "images, labels, words",
    [
        (IMAGES.astype(np.float32), LABELS, "expected uint8 images (N, 32, 32, 3), found float32"),
        (IMAGES[:, :, :12], LABELS, "(24, 32, 12, 3)"),
        (np.asfortranarray(IMAGES), LABELS, "Fortran order"),
        (IMAGES, LABELS[:5], "expected 24 integer labels, found int64 (5,)"),
        (IMAGES, np.where(LABELS == 1, UNLABELED, LABELS), "-1 (no label) beside labels"),
        (IMAGES[:1], LABELS[:1], "holds 1 images; at least 2 are needed"),
    ],
)
def test_arrays_of_another_kind(tmp_path, images, labels, words):
    folder = tmp_path / "tiny"
    folder.mkdir()
    np.save(folder / "training_tiny_32resized_img.npy", images)
    np.save(folder / "training_tiny_32resized_label.npy", labels)
    assert_refused(tmp_path, str(folder), words)


@pytest.mark.parametrize("kind", ["img", "label"])
def test_damaged_files(tmp_path, kind):
    path = beside(write_split(tmp_path, "tiny", "training", IMAGES, LABELS), f"{kind}.npy")
    content = path.read_bytes()
    for damaged in (content[:-3], content[:60], b"", b"no array"):
        path.write_bytes(damaged)
        assert_refused(tmp_path, f"{path}: not a plain .npy array of numbers, or truncated")


def test_parts_of_a_half(training):
    rest, held_out = training.hold_out(2)
    assert rest.classes.tolist() == [1, 2] and held_out.classes.tolist() == [3, 4]
    assert sorted([*rest.rows, *held_out.rows]) == list(range(24))
    np.testing.assert_array_equal(training.labels[held_out.rows], held_out.labels)
    assert set(held_out.class_numbers()) == {0, 1}
    (batch,) = center_crops(held_out, 100)
    np.testing.assert_array_equal(batch, training.images[held_out.rows, 2:30, 2:30])
    for n_classes in (1, 3):
        with pytest.raises(UserError, match="hold out at least 2 and leave at least 2"):
            training.hold_out(n_classes)


def test_a_half_without_labels(tmp_path):
    write_split(tmp_path, "tiny", "training", IMAGES, np.full(24, UNLABELED))
    split = load_split(tmp_path, "tiny", "training")
    assert str(split) == "24 images without labels"
    with pytest.raises(UserError, match="has no labels"):
        split.class_numbers()


def test_fingerprint_sees_every_byte(monkeypatch):
    """The bytes at the edges of the blocks that are hashed count, too."""
    monkeypatch.setattr("datasets.arrays.HASH_BLOCK", 1000)
    fingerprints = set()
    for place in (0, 999, 1000, IMAGES.size - 1):
        images = IMAGES.copy()
        images.reshape(-1)[place] ^= 1
        for labels in (LABELS, LABELS + 1):
            split = Split(images, labels, Path("none"), np.arange(24))
            fingerprints.add(tuple(split.fingerprint().values()))
    assert len(fingerprints) == 8
    assert all(images.startswith("uint8 (24, 32, 32, 3) sha256 ") for images, _ in fingerprints)


# ---------------------------------------------------------------------------- plan of an epoch


def drawn(plan: EpochPlan) -> list[list]:
    return [array.tolist() for array in (plan.order, plan.corners, plan.flips, plan.second)]


def test_the_plan_is_fixed_by_seed_and_epoch():
    positives = np.roll(np.arange(50), 1)
    plans = []
    for seed, epoch in itertools.product((0, 1), (1, 2)):
        draws = [drawn(EpochPlan(split_of(50), m, seed, epoch, positives)) for m in (8, 25)]
        assert draws[0] == draws[1]  # whatever the batch size
        plans.append(draws[0])
    for plan, other_plan in itertools.combinations(plans, 2):
        # order, corners, flips and positives: all anew
        assert all(a != b for a, b in zip(plan, other_plan, strict=True))


def test_chances_and_bounds():
    count = 20_000
    plan = EpochPlan(split_of(count, 256), 10, 1024, 1, positives=np.full(count, -1))
    assert sorted(plan.order) == list(range(count))
    for offsets in plan.corners.reshape(4, count):
        assert set(offsets) == set(range(33))  # 224 of 256 pixels: 0 ... 32
        assert np.bincount(offsets).min() > 0.7 * count / 33
    is_positive = plan.second == -1
    assert np.abs(plan.flips.mean(1) - 0.75).max() < 0.015
    assert abs(is_positive.mean() - 0.5) < 0.015
    draws = [*plan.corners.reshape(4, count), *plan.flips, is_positive, plan.order]
    correlations = np.corrcoef(np.array(draws, dtype=float)) - np.eye(len(draws))
    assert np.abs(correlations).max() < 0.03  # each drawn on its own


def test_every_image_is_drawn_once_and_the_last_incomplete_batch_is_dropped():
    plan = EpochPlan(split_of(23), 5, 0, 1)
    assert len(plan) == 4
    images = np.concatenate([plan.index(batch) for batch in range(4)])
    assert len(set(images)) == len(images) == 20
    assert plan.second.tolist() == plan.order.tolist()  # without positives


def test_second_views_are_of_the_image_or_its_positive():
    positives = np.roll(np.arange(23), 1)
    plan = EpochPlan(split_of(23), 5, 0, 1, positives)
    takes_positive = []
    for batch in range(len(plan)):
        images = plan.index(batch)
        crops = plan.crops(batch)
        drawn_numbers = [*plan.corners, plan.flips]
        for cut, numbers in zip((crops.top, crops.left, crops.flip), drawn_numbers, strict=True):
            assert cut.reshape(2, 5).tolist() == numbers[:, plan.places(batch)].tolist()
        assert crops.row[:5].tolist() == images.tolist()
        for second, image in zip(crops.row[5:], images, strict=True):
            assert second in (image, positives[image])
            takes_positive.append(second == positives[image])
    assert any(takes_positive) and not all(takes_positive)


def test_a_group_is_an_image_and_its_neighbors():
    neighbors = np.stack([np.roll(np.arange(30), -1), np.roll(np.arange(30), -2)], 1)
    plan = EpochPlan(split_of(30), 9, 0, 1, neighbors=neighbors)
    assert len(plan) == 3
    groups = plan.order.reshape(-1, 3)
    assert len(set(groups[:, 0])) == len(groups) == 9
    assert groups[:, 1:].tolist() == neighbors[groups[:, 0]].tolist()


def test_crops_are_drawn_by_place_so_that_an_image_that_is_twice_in_a_batch_differs():
    """Each of two images is the neighbor of the rest: it is in nearly every group."""
    neighbors = np.tile([0, 1], (64, 1))
    plan = EpochPlan(split_of(64, 256), 30, 0, 1, neighbors=neighbors)
    crops = plan.crops(0)
    for image in (0, 1):
        places = np.flatnonzero(crops.row == image)
        cuts = {(crops.top[p], crops.left[p], crops.flip[p]) for p in places}
        assert len(places) >= 20 and len(cuts) > 0.9 * len(places)


@pytest.mark.parametrize("n_processes", [2, 4])
def test_shares_of_processes_add_up_to_the_whole_batch(n_processes):
    positives = np.roll(np.arange(30), 1)
    whole = EpochPlan(split_of(30), 8, 0, 1, positives)
    parts = []
    for rank in range(n_processes):
        parts.append(EpochPlan(split_of(30), 8, 0, 1, positives, share=(rank, n_processes)))
        assert len(parts[-1]) == len(whole)
    for batch in range(len(whole)):
        index = np.concatenate([part.index(batch) for part in parts])
        assert index.tolist() == whole.index(batch).tolist()
        for name in ("row", "top", "left", "flip"):
            values = [getattr(part.crops(batch), name).reshape(2, -1) for part in parts]
            joined = np.concatenate(values, axis=1).reshape(-1)
            assert joined.tolist() == getattr(whole.crops(batch), name).tolist()


# ------------------------------------------------------------------------------------ cutting


def test_crop_size():
    assert [crop_size(size) for size in (256, 64, 32, 9)] == [224, 56, 28, 7]


def test_a_crop_is_a_square_perhaps_mirrored():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 20, 20, 3), dtype=np.uint8)
    crops = CropPlan(*rng.integers(0, 5, (3, 40)), np.full(40, 16), rng.random(40) < 0.5)
    patches = cut_crops(images, crops, 16)
    assert patches.dtype == np.uint8 and patches.shape == (40, 16, 16, 3)
    for patch, row, top, left, _, flip in zip(patches, *vars(crops).values(), strict=True):
        square = images[row, top : top + 16, left : left + 16]
        np.testing.assert_array_equal(patch, np.fliplr(square) if flip else square)
    gathered = gather_crops(torch.from_numpy(images), crops, 16)
    np.testing.assert_array_equal(gathered, patches)


@pytest.mark.parametrize("is_resident", [False, True])
def test_crops_of_any_size_are_resized(is_resident):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 20, 20, 3), dtype=np.uint8)
    side = rng.integers(6, 17, 40)
    top, left = rng.integers(0, 21 - side, (2, 40))
    crops = CropPlan(rng.integers(0, 5, 40), top, left, side, rng.random(40) < 0.5)
    patches = resize_crops(torch.from_numpy(images) if is_resident else images, crops, 24)
    assert patches.dtype == torch.uint8 and patches.shape == (40, 24, 24, 3)
    for patch, row, top, left, side, flip in zip(patches, *vars(crops).values(), strict=True):
        square = Image.fromarray(images[row, top : top + side, left : left + side])
        square = square.resize((24, 24), Image.Resampling.BILINEAR)
        expected = np.fliplr(square) if flip else np.asarray(square)
        assert np.abs(patch.numpy() - expected.astype(int)).max() <= 1


def test_sides_of_crops_are_drawn_by_area():
    areas = []
    for epoch in (1, 2):
        crops = EpochPlan(split_of(600, 200), 600, 0, epoch, crop_area=0.25).crops(0)
        assert crops.side.min() >= 100 and crops.side.max() <= 200
        assert (crops.top + crops.side).max() <= 200 and (crops.left + crops.side).max() <= 200
        assert crops.top.min() == crops.left.min() == 0
        areas.append((crops.side / 200) ** 2)
    assert abs(np.mean(areas) - 0.625) < 0.02 and not np.array_equal(*areas)


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("first_batch", [0, 3])
@pytest.mark.parametrize("is_resident", [False, True])
def test_batches_depend_neither_on_workers_nor_on_the_first_batch(
    training, workers, first_batch, is_resident
):
    plan = EpochPlan(training, 5, 7, 2, np.roll(np.arange(24), 1))
    images = torch.from_numpy(training.images.copy()) if is_resident else training.images
    batches = list(two_view_batches(images, plan, workers, first_batch))
    assert len(batches) == 4 - first_batch
    for number, (views, index) in enumerate(batches, first_batch):
        assert views.dtype == torch.uint8 and views.shape == (10, 28, 28, 3)
        assert index.tolist() == plan.index(number).tolist()
        expected = cut_crops(training.images, plan.crops(number), 28)
        np.testing.assert_array_equal(views, expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_may_be_left_early_and_faults_reach_the_caller(training, workers):
    plan = EpochPlan(training, 2, 7, 2)
    batches = iter(two_view_batches(training.images, plan, workers))
    next(batches)
    batches.close()
    plan.rows = np.full(24, 99)  # no such image
    with pytest.raises(IndexError):
        list(two_view_batches(training.images, plan, workers))


@pytest.mark.parametrize("is_resident", [True, False])
@pytest.mark.parametrize("workers", [0, 3])
def test_center_crops(training, workers, is_resident):
    split = training
    if is_resident:
        split = replace(training, images=torch.from_numpy(training.images.copy()))
    batches = list(center_crops(split, 7, workers))
    assert [len(batch) for batch in batches] == [7, 7, 7, 3]
    np.testing.assert_array_equal(np.concatenate(batches), training.images[:, 2:30, 2:30])
    for rank in range(2):
        of_process = center_crops(split, 7, workers, share=(rank, 2))
        for batch, expected in zip(of_process, batches[rank::2], strict=True):
            np.testing.assert_array_equal(batch, expected)


def test_images_stay_in_their_file_without_a_gpu(training):
    cpu = torch.device("cpu")
    halves = [training.images]
    assert images_on(cpu, halves, "auto") is halves
    with pytest.raises(UserError, match="no GPU to hold the images"):
        images_on(cpu, halves, "device")
