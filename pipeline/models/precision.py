"""Floating-point types of a forward pass, and unit vectors in float32 at least."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The autocast context of a precision; fp32 is none at all."""
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def at_least_float32(x: Tensor) -> Tensor:
    """In float32 at least: what mixed precision has halved is raised, doubles stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def l2_normalize(x: Tensor) -> Tensor:
    """Rows of length 1, in float32 at least: (..., d) -> (..., d)."""
    x = at_least_float32(x)
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
