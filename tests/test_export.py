"""ONNX files: they give what PyTorch gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from photos import save_network
from scripts import run_in_process
from torch.nn import functional as F

from models import Pooling, build_model
from models.export import export_onnx
from utils.errors import UserError

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore")  # torch's remarks on its exporter


@pytest.mark.parametrize(
    ("backbone", "layers", "features"),
    [
        ("resnet_small", None, "embedding"),
        ("resnet_small", "layer1,layer3", "pooled"),
        ("googlenet", None, "embedding"),
    ],
)
def test_same_numbers(tmp_path, backbone, layers, features):
    flip = layers is not None
    torch.manual_seed(0)
    pooling = Pooling.parse(layers, "gem", False)
    model = build_model(backbone, 4, 12, pooling=pooling).eval()
    export_onnx(model, tmp_path / "net.onnx", 40, features, flip)
    images = np.random.default_rng(0).integers(0, 256, (5, 40, 40, 3), np.uint8)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (rows,) = session.run(["features"], {"images": images})
    with torch.no_grad():
        results = model.features(model.normalization(torch.from_numpy(images)), flip)
    expected = F.normalize(results[("pooled", "embedding").index(features)])
    np.testing.assert_allclose(rows, expected, atol=2e-5)
    assert np.abs(rows - rows[0]).max() > 1e-3  # the comparison can tell rows apart


def test_the_fallback_lrn_has_no_onnx(tmp_path):
    with pytest.raises(UserError, match="googlenet_fallback_lrn"):
        export_onnx(build_model("googlenet_fallback_lrn"), tmp_path / "net.onnx", 40)


def test_command(tmp_path):
    checkpoint = save_network(tmp_path / "net.pth")
    file = tmp_path / "net.onnx"
    result = run_in_process("embed.py", "--checkpoint_path", checkpoint, "--onnx", file)
    assert result.code == 0 and "squashed to 32 px" in result.out
    shape = onnx.load(file).graph.input[0].type.tensor_type.shape
    assert [size.dim_param or size.dim_value for size in shape.dim] == ["batch", 28, 28, 3]
