"""Draw misc/best_model.png: the method, from two views of an image to the three losses."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

NETWORK, TENSOR, LOSS = "#dbe7f5", "#f4f1e6", "#f7d9d3"
SIDES = {"left": (0, 0.5), "right": (1, 0.5), "top": (0.5, 1), "bottom": (0.5, 0)}
# name: (x, y, width, height, color, text)
BOXES = {
    "views": (0.0, 2.0, 1.7, 1.2, TENSOR, "two views of\neach image\n2m × 3 × 224 × 224"),
    "backbone": (2.3, 2.0, 1.5, 1.2, NETWORK, "backbone\n(GoogLeNet,\nResNet)"),
    "map": (4.4, 2.0, 1.6, 1.2, TENSOR, "feature map\n2m × 1024 × 7 × 7"),
    "pool": (6.6, 2.0, 1.5, 1.2, NETWORK, "average pool,\nfeat_ext,\nnormalize"),
    "embedding": (8.7, 2.0, 1.5, 1.2, TENSOR, "embedding\n2m × 128"),
    "head": (10.7, 2.0, 1.8, 1.2, NETWORK, "clustering:\nbatch norm, dropout,\nlinear, normalize"),
    "logits": (13.0, 2.0, 1.5, 1.2, TENSOR, "cluster logits\n2m × K"),
    "rim": (13.0, 4.1, 1.5, 1.0, LOSS, "clustering loss\n$0.3\\;L_{rim}$"),
    "metric": (8.7, 4.1, 1.5, 1.0, LOSS, "metric loss\n$0.9\\;L_m$"),
    "labels": (13.0, -0.1, 1.5, 1.1, TENSOR, "pseudo-labels\n(argmax of the\nfirst view)"),
    "centroids": (4.4, -0.1, 1.6, 1.1, TENSOR, "centroids\n|U| × 1024 × 7 × 7"),
    "decoder": (2.3, -0.1, 1.5, 1.1, NETWORK, "decoder"),
    "reconstruction": (0.0, -0.1, 1.7, 1.1, LOSS, "reconstruction loss\n$0.001\\;L_{rec}$"),
    "centers": (6.6, 4.1, 1.5, 1.0, TENSOR, "centers of the\nclusters, |U| × 128"),
}
# from, side, to, side, dashed (no gradient), bend
ARROWS = (
    ("views", "right", "backbone", "left", False, 0),
    ("backbone", "right", "map", "left", False, 0),
    ("map", "right", "pool", "left", False, 0),
    ("pool", "right", "embedding", "left", False, 0),
    ("embedding", "right", "head", "left", False, 0),
    ("head", "right", "logits", "left", False, 0),
    ("logits", "top", "rim", "bottom", False, 0),
    ("embedding", "top", "metric", "bottom", False, 0),
    ("logits", "bottom", "labels", "top", True, 0),
    ("labels", "left", "centroids", "right", True, 0),
    ("map", "bottom", "centroids", "top", False, 0),
    ("centroids", "left", "decoder", "right", False, 0),
    ("decoder", "left", "reconstruction", "right", False, 0),
    ("views", "bottom", "reconstruction", "top", False, 0),
    ("centroids", "right", "pool", "bottom", True, -0.25),
    ("pool", "top", "centers", "bottom", True, 0),
    ("centers", "right", "metric", "left", True, 0),
)


def anchor(name: str, side: str) -> tuple[float, float]:
    """Return the middle of a side of a box."""
    x, y, width, height, _, _ = BOXES[name]
    right, up = SIDES[side]
    return x + right * width, y + up * height


def draw(axes: Axes) -> None:
    """Draw boxes, then arrows; dashed ones carry no gradient."""
    for x, y, width, height, color, text in BOXES.values():
        style = {"boxstyle": "round,pad=0.04", "facecolor": color, "edgecolor": "#555555"}
        shape = FancyBboxPatch((x, y), width, height, **style)
        axes.add_patch(shape)
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8.5)
    style = {"arrowstyle": "-|>", "mutation_scale": 11, "shrinkA": 4, "shrinkB": 4}
    style |= {"linewidth": 1.1, "color": "#333333"}
    for start, start_side, end, end_side, detached, bend in ARROWS:
        ends = (anchor(start, start_side), anchor(end, end_side))
        curve = {"connectionstyle": f"arc3,rad={bend}", "linestyle": "--" if detached else "-"}
        axes.add_patch(FancyArrowPatch(*ends, **style, **curve))
    title = "CBSwR: center-based softmax with reconstruction"
    axes.text(0, 5.0, title, fontsize=12, weight="bold", va="center")
    legend = "solid: gradient flows back    dashed: detached"
    axes.text(0, 4.55, legend, fontsize=8.5, color="#555555", va="center")
    axes.set_xlim(-0.2, 14.8)
    axes.set_ylim(-0.4, 5.4)
    axes.axis("off")


def main() -> None:
    """Draw the figure and save it."""
    figure, axes = plt.subplots(figsize=(14, 5.4))
    draw(axes)
    path = Path(__file__).with_name("best_model.png")
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})


if __name__ == "__main__":
    main()
