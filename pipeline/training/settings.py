"""The hyper-parameters with which a learner trains."""

from dataclasses import dataclass
from typing import cast

from compress_ssl.pipeline.methods.base import Recipe
from compress_ssl.pipeline.runtime.choices import Precision
from compress_ssl.pipeline.training.choices import OptimizerName
from compress_ssl.pipeline.training.sampler import StepSampler
from compress_ssl.pipeline.training.schedule import Schedule, ScheduleKind

RECIPE_BATCH = 256
"""Images per step for which recipes publish their learning rate; for other batch sizes it is scaled linearly."""


@dataclass(frozen=True)
class TrainingSettings:
    """Hyper-parameters of a learner. All of them are part of the run's identity in its manifest."""

    optimizer: OptimizerName
    lr: float  # base learning rate for the global batch: the images that all ranks together show in a step
    momentum: float
    weight_decay: float
    norm_decay: bool  # whether weight decay applies to norms and biases too
    schedule: Schedule
    clip: float | None  # largest norm of the gradient; None: the gradient is not clipped
    ema: float | None  # decay of the averaged student per step; None: no average is kept
    precision: Precision
    seed: int

    @classmethod
    def from_recipe(
        cls,
        recipe: Recipe,
        sampler: StepSampler,
        *,
        lr: float | None,
        ema: float | None,
        precision: Precision,
        seed: int,
    ) -> "TrainingSettings":
        """Derive the settings of a run from a recipe and the run's length.

        Without `lr`, the recipe's learning rate is scaled linearly with the global batch (Goyal et al. 2017,
        arXiv 1706.02677); a given `lr` is used unscaled. The warm-up is cut where it is longer than the run.
        """
        rate = recipe.lr * sampler.batch / RECIPE_BATCH if lr is None else lr
        epochs = sampler.steps * sampler.batch / len(sampler.rows)
        # A recipe holds plain texts: Schedule and make_optimizer refuse unknown names.
        kind, optimizer = cast(ScheduleKind, recipe.schedule), cast(OptimizerName, recipe.optimizer)
        schedule = Schedule(kind, min(1.0, recipe.warmup_epochs / epochs), recipe.drops)
        return cls(
            optimizer, rate, recipe.momentum, recipe.weight_decay, recipe.norm_decay, schedule,
            recipe.clip, ema, precision, seed,
        )  # fmt: skip
