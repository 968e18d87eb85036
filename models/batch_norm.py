"""Batch norm over the rows of several processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from utils.distributed import Processes
from utils.errors import UserError
from utils.tensors import as_float


@torch.no_grad()
def track_statistics(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int | Tensor) -> None:
    """Move the running statistics towards the mean (C,) and variance (C,) of `count` values."""
    unbiased = var * (count / (count - 1))
    norm.num_batches_tracked += 1
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
    norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), norm.momentum)


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with the statistics of all processes' rows, on any device.

    Every process holds the same number of rows. `torch.nn.SyncBatchNorm` does this on GPUs only.
    """

    @classmethod
    def like(cls, norm: nn.BatchNorm2d, processes: Processes) -> GlobalBatchNorm2d:
        """Return a norm that shares the weights and buffers of `norm`."""
        new = cls(norm.num_features, norm.eps, norm.momentum)
        new.processes = processes
        new.training = norm.training
        new._parameters = norm._parameters
        new._buffers = norm._buffers
        return new

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (B, C, H, W)."""
        if not self.training:
            return super().forward(x)
        wide = as_float(x)
        count = self.processes.world_size * wide.numel() // wide.shape[1]
        local_var, local_mean = torch.var_mean(wide, (0, 2, 3), correction=0)  # (C,)
        mean = self.processes.mean(local_mean)
        var = self.processes.mean(local_var + (local_mean - mean).square())
        track_statistics(self, mean, var, count)
        scale = torch.rsqrt(var + self.eps) * self.weight
        shift = self.bias - mean * scale
        return torch.addcmul(shift[:, None, None], wide, scale[:, None, None]).to(x.dtype)


def share_batch_norm(network: nn.Module, processes: Processes, device: torch.device) -> nn.Module:
    """Take every batch norm of `network` over all processes' rows; weights and names stay.

    Raises UserError for a kind of batch norm that cannot be shared.
    """
    if processes.world_size == 1:
        return network
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and type(module) is not nn.BatchNorm2d:
            raise UserError(
                f"the backbone's {type(module).__name__} cannot be shared by processes; train it "
                "in one process, or choose another backbone"
            )
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, GlobalBatchNorm2d.like(child, processes))
    return network
