"""What the ranks of a distributed run share. Rank r of N has the images r, r + N, ... of every step.

Without torch.distributed there is one rank, and everything here is the identity.
"""

from typing import Any

import torch
from torch import Tensor, distributed


def size() -> int:
    """Processes that train together; 1 without torch.distributed."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """The number of this process among them."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def gather(rows: Tensor) -> Tensor:
    """The (B, ...) rows of the whole step from each rank's (B / N, ...), in the order of one process, with gradients.

    A gradient is the sum over the ranks' losses. If each of them computes the loss of the whole step,
    averaging the gradients of weights over ranks, as DistributedDataParallel does, makes it that loss's.
    """
    if size() == 1:
        return rows
    return _Gather.apply(rows)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(size())]
        distributed.all_gather(parts, rows.contiguous())
        return torch.stack(parts, 1).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        whole = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(whole)
        return whole[rank() :: size()]
