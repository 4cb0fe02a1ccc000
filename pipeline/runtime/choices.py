"""Names that flags take and records hold in more than one room, apart from the modules that import torch."""

from typing import Literal

Precision = Literal["fp32", "bf16", "fp16"]
"""The arithmetic of a forward pass; `models.precision.PRECISIONS` has the type of each."""
