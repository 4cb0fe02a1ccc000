"""Floating-point types of a forward pass, and L2 normalisation that is never done in 16 bits."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Value of --precision: the type of torch.autocast; None: no autocast."""


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The autocast context of a precision; for fp32 a context that does nothing."""
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def at_least_float32(x: Tensor) -> Tensor:
    """Convert float16 and bfloat16 to float32; float32 and float64 are returned unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def l2_normalize(x: Tensor) -> Tensor:
    """Divide vectors (..., d) by their length, in float32 or float64; a zero vector stays zero."""
    return F.normalize(at_least_float32(x), dim=-1)
