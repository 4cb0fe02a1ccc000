"""What one learner of a command is made of: its method, its students and how they are trained, all resolved.

`resolve` makes it. Below a `LearnerSpec` nobody parses a spec or reads a manifest again.
"""

from dataclasses import dataclass, replace
from typing import cast

from compress_ssl.pipeline.methods.base import Recipe
from compress_ssl.pipeline.methods.options import MethodChoice
from compress_ssl.pipeline.runtime.choices import Precision
from compress_ssl.pipeline.runtime.options import Options
from compress_ssl.pipeline.training.choices import OptimizerName
from compress_ssl.pipeline.training.sampler import Sampling, StepSampler
from compress_ssl.pipeline.training.schedule import Schedule, ScheduleKind
from compress_ssl.pipeline.training.settings import TrainingSettings
from compress_ssl.pipeline.training.student_choice import StudentChoice

RECIPE_BATCH = 256
"""Images per step for which recipes publish their learning rate; for other batch sizes it is scaled linearly."""


@dataclass(frozen=True)
class Execution:
    """How the students' networks are run. These may change while a run lasts; its folder tells the last ones."""

    channels_last: bool  # memory format of the weights: channels-last, or contiguous
    compile: bool  # whether the students run by torch.compile
    sync_bn: bool  # whether batch norm statistics are those of all CUDA devices together


@dataclass(frozen=True)
class LearnerSpec:
    """A method and the students that it trains, with everything that their training depends on."""

    method: MethodChoice
    students: tuple[StudentChoice, ...]
    recipe: Recipe
    lr: float | None  # for the global batch; None: the recipe's, scaled
    ema: float | None
    precision: Precision
    sampling: Sampling
    execution: Execution
    begun_steps: int | None = None  # length of the run that was begun; None: there is none, or it is of version 1

    def with_resolved(self, resolved: Options) -> "LearnerSpec":
        """The spec in which options of the method that were left open are what they stand for.

        An option that was recorded as open in the same way, as version 1 did, stands for the same.
        """
        method = self.method
        recorded = method.recorded
        if recorded is not None:
            same = {key: value for key, value in resolved.items() if recorded.get(key) == method.options.get(key)}
            recorded = {**recorded, **same}
        return replace(self, method=replace(method, options={**method.options, **resolved}, recorded=recorded))

    def settings(self, sampler: StepSampler) -> TrainingSettings:
        """The hyper-parameters for the batch and the length of a sampler.

        Without `lr`, the recipe's learning rate is scaled linearly with the global batch (Goyal et al. 2017,
        arXiv 1706.02677); a given `lr` is used unscaled. The warm-up is cut where it is longer than the run.
        """
        recipe = self.recipe
        epochs = sampler.steps * sampler.batch / len(sampler.rows)
        # A recipe holds plain texts: Schedule and make_optimizer refuse unknown names.
        kind, optimizer = cast(ScheduleKind, recipe.schedule), cast(OptimizerName, recipe.optimizer)
        return TrainingSettings(
            optimizer=optimizer,
            lr=recipe.lr * sampler.batch / RECIPE_BATCH if self.lr is None else self.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            norm_decay=recipe.norm_decay,
            schedule=Schedule(kind, min(1.0, recipe.warmup_epochs / epochs), recipe.drops),
            clip=recipe.clip,
            ema=self.ema,
            precision=self.precision,
            seed=self.sampling.seed,
        )
