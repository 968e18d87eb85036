"""The pre-processed arrays and what training sees of them: two random views of each image."""

from datasets.arrays import Split, load_split
from datasets.views import EpochPlan, ResidentLoader, TwoViewLoader, center_crops, crop_size

__all__ = [
    "EpochPlan", "ResidentLoader", "Split", "TwoViewLoader", "center_crops", "crop_size",
    "load_split",
]  # fmt: skip
