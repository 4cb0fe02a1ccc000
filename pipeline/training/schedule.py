"""The learning rate as a function of the step: a schedule has no state to save or restore."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from compress_ssl.pipeline.runtime.errors import UserError

ScheduleKind = Literal["cosine", "step", "constant"]
SCHEDULES: tuple[ScheduleKind, ...] = get_args(ScheduleKind)


@dataclass(frozen=True)
class Schedule:
    """The factor on the base learning rate, after a linear warm-up from 0.

    cosine: falls to 0 at the run's end (Loshchilov and Hutter 2017, arXiv 1608.03983, one cycle).
    step: falls to a factor at each of `drops`. constant: stays 1.
    """

    kind: ScheduleKind
    warmup: float = 0.0  # fraction of the run in which the factor rises linearly from 0
    drops: tuple[tuple[float, float], ...] = ((0.6, 0.1), (0.8, 0.01))  # (fraction of the run, factor from there on)

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise UserError(f"unknown schedule {self.kind!r}. Known: {', '.join(SCHEDULES)}")

    def __call__(self, done: float) -> float:
        """The factor in [0, 1] of the step before which the fraction `done` of the run, in [0, 1), was completed."""
        if done < self.warmup:
            return done / self.warmup
        if self.kind == "cosine":
            after = (done - self.warmup) / max(1e-12, 1.0 - self.warmup)
            return 0.5 * (1.0 + math.cos(math.pi * after))
        if self.kind == "step":
            # 1e-9: the fraction of a step on a drop's boundary may be rounded below it
            return next((factor for start, factor in reversed(self.drops) if done >= start - 1e-9), 1.0)
        return 1.0
