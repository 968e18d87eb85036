"""Images in a page: small, and as data URIs."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

GALLERY_SIDE, MAP_SIDE = 144, 80  # pixels
QUALITY = 75


def data_uri(image: np.ndarray, side: int) -> str:
    """An image uint8 RGB (H, W, 3) as WebP, at most `side` pixels wide and high, in a data URI."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    picture.save(out, "WEBP", quality=QUALITY)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode("ascii")
