"""The pre-processed arrays and what training sees of them: two random views of each image."""

from datasets.arrays import Split, load_split
from datasets.views import EpochPlan, TwoViewLoader, center_crops, crop_size

__all__ = ["EpochPlan", "Split", "TwoViewLoader", "center_crops", "crop_size", "load_split"]
