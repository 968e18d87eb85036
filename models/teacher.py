"""A teacher: the same network with the moving average of the weights in training."""

from __future__ import annotations

import copy

import torch
from torch import nn

from models.cbswr import CBSwR


class Teacher(nn.Module):
    """Follows a network as the exponential moving average of its weights; is always in evaluation mode."""

    def __init__(self, network: CBSwR, momentum: float) -> None:
        """momentum: from 0 (the network itself) to 1 (what it was at first)."""
        super().__init__()
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.momentum = momentum

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def follow(self, network: nn.Module) -> None:
        """Move towards the weights of `network` by a step; take its buffers as they are."""
        for own, weight in zip(self.network.parameters(), network.parameters(), strict=True):
            if weight.requires_grad:
                own.lerp_(weight, 1 - self.momentum)
        for own, buffer in zip(self.network.buffers(), network.buffers(), strict=True):
            own.copy_(buffer)

    def become(self, network: CBSwR) -> None:
        """Take all weights of `network`."""
        self.network.load_state_dict(network.state_dict())
