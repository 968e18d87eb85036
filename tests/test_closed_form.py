"""The closed-form head against a singular value decomposition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensors import noise
from torch.nn import functional as F

from models import closed_form
from models.closed_form import RIDGE, closed_form_head
from utils.errors import UserError


def expected_head(x: np.ndarray, count: int, power: float, centered: bool) -> np.ndarray:
    """Project rows on directions of the largest variance, divided by deviation^power."""
    x = x - x.mean(0) * centered
    _, singular, directions = np.linalg.svd(x, full_matrices=False)
    variances = singular**2 / len(x)
    deviations = np.sqrt(variances + RIDGE * variances.mean())
    projected = x @ (directions[:count] / deviations[:count, None] ** power).T
    return projected / np.sqrt((projected**2).sum(1).mean())


@pytest.mark.parametrize(
    "kind, options, power",
    [
        ("svd", (0.7,), 0.0),
        ("pca", (), 0.0),
        ("pca", (0.7,), 0.0),
        ("whiten", (), 0.5),
        ("whiten", (0.7,), 0.7),
        ("whiten", (1.0,), 1.0),
    ],
)
def test_the_head_projects_on_scaled_directions(kind, options, power):
    x = (noise(50, 7) @ noise(7, 7, seed=1) + 3).float()
    weight, bias = closed_form_head(x, 4, kind, *options)
    assert weight.dtype == bias.dtype == torch.float32
    projected = (x @ weight.T + bias).double().numpy()
    expected = expected_head(x.double().numpy(), 4, power, kind != "svd")
    np.testing.assert_allclose(np.abs(projected), np.abs(expected), atol=1e-4)
    largest = weight.gather(1, weight.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()  # of the two signs of a direction


def test_svd_keeps_the_angles_between_features():
    x = F.normalize(noise(30, 6).float() + 1, dim=1)
    weight, bias = closed_form_head(x, 6, "svd")
    embedded = F.normalize(x @ weight.T + bias, dim=1)
    torch.testing.assert_close(embedded @ embedded.T, x @ x.T, atol=1e-5, rtol=0)


def test_fewer_images_than_dimensions():
    x = noise(5, 9)
    weight, bias = closed_form_head(x, 8, "whiten", 0.6)
    assert weight.isfinite().all() and bias.isfinite().all()
    assert torch.linalg.matrix_rank(weight) == 8  # directions in which no image varies count, too
    with pytest.raises(UserError, match="9 numbers, fewer than the 10 dimensions"):
        closed_form_head(x, 10, "pca")


@pytest.mark.parametrize("centered", [True, False])
def test_a_spectrum_is_computed_in_blocks(monkeypatch, centered):
    x = noise(50, 7) + 1
    whole = closed_form.Spectrum.of(x, centered)
    monkeypatch.setattr(closed_form, "BLOCK", 16)
    in_blocks = closed_form.Spectrum.of(x, centered)
    for value, expected in zip(vars(in_blocks).values(), vars(whole).values(), strict=True):
        torch.testing.assert_close(value.abs(), expected.abs(), rtol=1e-9, atol=1e-12)
