"""Learning rate as a function of the step: nothing to save, nothing to restore."""

import math
from dataclasses import dataclass

from compress_ssl.pipeline.runtime.artifact import UserError

SCHEDULES = ("cosine", "step", "constant")


@dataclass(frozen=True)
class Schedule:
    """Factor on the base rate. `drops`: (fraction of the run, factor) pairs of the step schedule."""

    kind: str
    warmup: float = 0.0  # fraction of the run spent rising linearly from 0
    drops: tuple[tuple[float, float], ...] = ((0.6, 0.1), (0.8, 0.01))

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise UserError(f"unknown schedule {self.kind!r}. Known: {', '.join(SCHEDULES)}")

    def __call__(self, done: float) -> float:
        """done: fraction of the run behind us, in [0, 1). Loshchilov and Hutter 2017 for cosine, to 0."""
        if done < self.warmup:
            return done / self.warmup
        if self.kind == "cosine":
            after = (done - self.warmup) / max(1e-12, 1.0 - self.warmup)
            return 0.5 * (1.0 + math.cos(math.pi * after))
        if self.kind == "step":
            return next((factor for start, factor in reversed(self.drops) if done >= start - 1e-9), 1.0)
        return 1.0
