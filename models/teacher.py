"""A teacher: the same network with the moving average of the weights in training."""

from __future__ import annotations

import copy

import torch
from torch import nn

from models.cbswr import CBSwR


class Teacher(nn.Module):
    """Follows a network as the exponential moving average of its weights; is always in evaluation mode."""

    def __init__(self, network: CBSwR, momentum: float, dim: int = 0) -> None:
        """momentum: from 0 (the network itself) to 1 (what it was at first).

        dim: of an embedding head of its own, which does not follow and is to be set; 0: it has that of the network.
        """
        super().__init__()
        self.network = copy.deepcopy(network)
        if dim:
            self.network.feat_ext = nn.Sequential(nn.Linear(network.pooled_dim, dim)).to(network.feat_ext[0].weight)
        self.network.eval().requires_grad_(False)
        self.momentum, self.own = momentum, "feat_ext." if dim else "no part"

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def follow(self, network: nn.Module) -> None:
        """Move towards the weights of `network` by a step; take its buffers as they are."""
        weights = dict(network.named_parameters())
        for name, own in self.network.named_parameters():
            if weights[name].requires_grad and not name.startswith(self.own):
                own.lerp_(weights[name], 1 - self.momentum)
        for own, buffer in zip(self.network.buffers(), network.buffers(), strict=True):
            own.copy_(buffer)

    def become(self, network: CBSwR) -> None:
        """Take all weights of `network`, but for a head of its own."""
        state = {name: value for name, value in network.state_dict().items() if not name.startswith(self.own)}
        self.network.load_state_dict(state, strict=False)
