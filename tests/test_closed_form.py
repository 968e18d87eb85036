"""The closed-form head against a singular value decomposition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensors import noise

from models.closed_form import closed_form_head
from utils.errors import UserError


@pytest.mark.parametrize(
    "kind, options, power",
    [
        ("pca", (), 0.0),
        ("pca", (0.7,), 0.0),
        ("whiten", (), 0.5),
        ("whiten", (0.7,), 0.7),
        ("whiten", (1.0,), 1.0),
    ],
)
def test_the_head_projects_on_scaled_principal_directions(kind, options, power):
    x = (noise(50, 7) @ noise(7, 7, seed=1) + 3).float()
    weight, bias = closed_form_head(x, 4, kind, *options)
    assert weight.dtype == bias.dtype == torch.float32
    projected = (x @ weight.T + bias).double().numpy()
    centered = x.double().numpy() - x.double().numpy().mean(0)
    _, singular, directions = np.linalg.svd(centered, full_matrices=False)
    expected = centered @ (directions[:4] / singular[:4, None] ** power).T
    expected /= np.sqrt((expected**2).sum(1).mean())
    np.testing.assert_allclose(np.abs(projected), np.abs(expected), atol=1e-4)
    largest = weight.gather(1, weight.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()  # of the two signs of a direction


def test_more_dimensions_than_the_features_have():
    x = noise(50, 3) @ noise(3, 9, seed=1)  # of rank 3
    with pytest.raises(UserError, match="50 images have 3 directions, fewer than the 4"):
        closed_form_head(x, 4, "whiten")
    weight, bias = closed_form_head(x, 5, "whiten", fill=True)
    assert torch.equal(weight[:3], closed_form_head(x, 3, "whiten")[0])
    assert not weight[3:].any() and not bias[3:].any()
    with pytest.raises(UserError, match="5 images have 4 directions"):
        closed_form_head(noise(5, 9), 5, "pca")
