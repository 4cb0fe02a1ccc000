"""Exponential moving averages of parameters and of other tensors."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def move(average: Tensor, source: Tensor, decay: float) -> None:
    """average = decay * average + (1 - decay) * source, in place and in the average's own precision."""
    average.lerp_(source.detach().to(average.dtype), 1.0 - decay)


def update_ema(average: nn.Module, source: nn.Module, decay: float) -> None:
    """Move each parameter of `average` towards that of `source`. Buffers stay as they are."""
    for slow, fast in zip(average.parameters(), source.parameters(), strict=True):
        move(slow, fast, decay)


@torch.no_grad()
def copy_buffers(average: nn.Module, source: nn.Module) -> None:
    """Take over the buffers of `source`: statistics of batch norm are running means already."""
    for kept, new in zip(average.buffers(), source.buffers(), strict=True):
        kept.copy_(new)
