"""A teacher: the same network with the moving average of the weights in training."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.cbswr import CBSwR


class Teacher(nn.Module):
    """Follows a network as the exponential moving average of its weights; is always in evaluation mode."""

    def __init__(self, network: CBSwR, momentum: float, large: nn.Module | None = None) -> None:
        """momentum: from 0 (the network itself) to 1 (what it was at first); large: an embedding head beside it."""
        super().__init__()
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.large = copy.deepcopy(large).requires_grad_(False) if large else None
        self.momentum = momentum

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode."""
        return super().train(False)

    def embed(self, pooled: Tensor) -> Tensor:
        """What the teacher sees in pooled features (B, C): its large embedding, if it has one, of unit length."""
        if self.large is None:
            return self.network.embed(pooled)
        with torch.autocast(pooled.device.type, enabled=False):
            return F.normalize(self.large(pooled), dim=1)

    @torch.no_grad()
    def follow(self, network: nn.Module, large: nn.Module | None = None) -> None:
        """Move towards the weights of `network` and `large` by a step; take the network's buffers as they are."""
        pairs = [(self.network, network)] + ([] if large is None else [(self.large, large)])
        for mine, theirs in pairs:
            for own, weight in zip(mine.parameters(), theirs.parameters(), strict=True):
                if weight.requires_grad:
                    own.lerp_(weight, 1 - self.momentum)
        for own, buffer in zip(self.network.buffers(), network.buffers(), strict=True):
            own.copy_(buffer)

    def become(self, network: CBSwR) -> None:
        """Take all weights of `network`."""
        self.network.load_state_dict(network.state_dict())
