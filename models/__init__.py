"""Backbones, decoder and the CBSwR network."""

from models.backbones import BACKBONES, check_crop_size
from models.cbswr import CBSwR, build_model, pooled_channels, pooled_width
from models.checkpoint import load_checkpoint, load_network
from models.pooling import PAPER, Pooling

__all__ = [
    "BACKBONES",
    "PAPER",
    "CBSwR",
    "Pooling",
    "build_model",
    "check_crop_size",
    "load_checkpoint",
    "load_network",
    "pooled_channels",
    "pooled_width",
]
