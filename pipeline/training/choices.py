"""The names that --pairing and --optimizer take, apart from the modules that import torch."""

from typing import Literal

Pairing = Literal["same", "fresh", "cross"]
"""How a step pairs the student's views with the teacher's.

same: both see the same stored view. fresh: the student sees a view that was never stored, the teacher a stored one.
cross: they see two different stored views.
"""

OptimizerName = Literal["sgd", "adam", "adamw", "lars"]
"""The optimizers of `optimizers.make_optimizer`."""
