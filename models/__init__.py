"""Backbones, decoder and the CBSwR network."""

from models.backbones import BACKBONES, check_crop_size
from models.cbswr import CBSwR, build_model
from models.checkpoint import load_checkpoint, load_network

__all__ = ["BACKBONES", "CBSwR", "build_model", "check_crop_size", "load_checkpoint", "load_network"]
