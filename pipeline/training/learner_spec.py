"""What one learner of a command is made of: its method, its students and how they are trained, all resolved.

`choose_method` and `student_choice.choose_student` put together what the user gave, what the run in the folder
recorded, and today's defaults, in this order. Below a `LearnerSpec` nobody parses a spec or reads a manifest again.
"""

from dataclasses import dataclass

from compress_ssl.pipeline.methods import METHODS
from compress_ssl.pipeline.methods.base import Recipe
from compress_ssl.pipeline.methods.options import MethodChoice, TypedMethod
from compress_ssl.pipeline.runtime.choices import Precision
from compress_ssl.pipeline.runtime.registry import parse
from compress_ssl.pipeline.training.run_record import RunRecord
from compress_ssl.pipeline.training.sampler import Sampling, StepSampler
from compress_ssl.pipeline.training.settings import TrainingSettings
from compress_ssl.pipeline.training.student_choice import StudentChoice
from compress_ssl.pipeline.training.version1_defaults import METHOD_OPTIONS


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

    def settings(self, sampler: StepSampler) -> TrainingSettings:
        """The hyper-parameters for the batch and the length of a sampler."""
        return TrainingSettings.from_recipe(
            self.recipe, sampler, lr=self.lr, ema=self.ema, precision=self.precision, seed=self.sampling.seed
        )


def choose_method(typed: TypedMethod, record: RunRecord | None, where: str) -> MethodChoice:
    """The method of a spec as typed. Options that it does not give are those with which the run was begun.

    record: of the run, None for a new one; `where` names its manifest in an error. Raises UserError for an unknown
    option, for one that is missing, and for a value of the wrong type.
    """
    spec, there = typed.spec, parse(record.identity.method) if record else None
    if record is None or there is None or not _same_method(typed, record):
        typed.check({})
        return MethodChoice(typed.text, spec, typed.method, {**typed.defaults, **typed.given(spec)})
    recorded = {**typed.defaults, **METHOD_OPTIONS.get(spec.kind, {})}
    recorded |= typed.given(there, f"{where}: identity.method: ")
    if record.identity.options:
        typed.check_recorded(record.identity.options, f"{where}: identity.options: ")
        recorded |= record.identity.options
    typed.check(recorded)
    kept = {name: value for name, value in recorded.items() if typed.accepts(name)}
    return MethodChoice(record.identity.method, spec, typed.method, {**kept, **typed.given(spec)}, recorded)


def _same_method(typed: TypedMethod, record: RunRecord) -> bool:
    """Whether a spec names the recorded method: by the same words, or by another path of the same file."""
    as_typed = typed.spec, parse(record.identity.method)
    located = METHODS.locate(typed.text), METHODS.locate(record.method_spec)
    return any((one.kind, one.argument) == (there.kind, there.argument) for one, there in (as_typed, located))
