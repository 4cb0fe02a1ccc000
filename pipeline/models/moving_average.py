"""Exponential moving averages (EMA) of parameters and of other tensors."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def move(average: Tensor, source: Tensor, decay: float) -> None:
    """average = decay * average + (1 - decay) * source, in place and in the type of `average`."""
    average.lerp_(source.detach().to(average.dtype), 1.0 - decay)


def update_ema(average: nn.Module, source: nn.Module, decay: float) -> None:
    """Move each parameter of `average` towards the same parameter of `source`. Buffers do not change.

    Raises ValueError if the two modules have different numbers of parameters.
    """
    for slow, fast in zip(average.parameters(), source.parameters(), strict=True):
        move(slow, fast, decay)


@torch.no_grad()
def copy_buffers(average: nn.Module, source: nn.Module) -> None:
    """Copy all buffers of `source`: the statistics of batch norm are moving averages already.

    Raises ValueError if the two modules have different numbers of buffers.
    """
    for buffer, new in zip(average.buffers(), source.buffers(), strict=True):
        buffer.copy_(new)
