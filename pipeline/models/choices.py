"""The names that --precision takes, apart from `precision.py`, which imports torch."""

from typing import Literal

Precision = Literal["fp32", "bf16", "fp16"]
"""The arithmetic of a forward pass; `precision.PRECISIONS` has the type of each."""
