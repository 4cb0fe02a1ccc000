"""From the flags of a command to its `LearnerSpec`s.

Each value is the one that was given, else the one that the run in the folder recorded, else a default. So a default
that is changed does not change a run that has begun, also when the run is made longer or moves to another device.
docs/runs.md states the rule for users.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from compress_ssl.pipeline.distributed import collectives
from compress_ssl.pipeline.methods import METHODS
from compress_ssl.pipeline.methods.base import Recipe
from compress_ssl.pipeline.methods.options import MethodChoice, TypedMethod
from compress_ssl.pipeline.runtime.artifact import MANIFEST
from compress_ssl.pipeline.runtime.choices import Precision
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.options import require_types
from compress_ssl.pipeline.runtime.records import UNSET
from compress_ssl.pipeline.runtime.spec import parse
from compress_ssl.pipeline.training import version1_defaults as version1
from compress_ssl.pipeline.training.choices import OptimizerName, Pairing
from compress_ssl.pipeline.training.learner_spec import Execution, LearnerSpec
from compress_ssl.pipeline.training.run_record import RunRecord
from compress_ssl.pipeline.training.sampler import Sampling
from compress_ssl.pipeline.training.schedule import ScheduleKind
from compress_ssl.pipeline.training.student_choice import choose_student

# Today's defaults of flags that do not belong to the method.
SEED = 0
PAIRING: Pairing = "same"
PRECISION: Precision = "fp32"
EXECUTION = Execution(channels_last=True, compile=False, sync_bn=False)


@dataclass(frozen=True)
class Asked:
    """The flags of `compress distill` that runs record; None: not given."""

    student: tuple[str, ...]
    image_size: int | None = None
    epochs: float | None = None
    steps: int | None = None
    batch_size: int | None = None  # images per step of each rank
    views: int | None = None
    views_per_step: int | None = None  # of each student
    pairing: Pairing | None = None
    seed: int | None = None
    optimizer: OptimizerName | None = None
    lr: float | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    norm_decay: bool | None = None
    schedule: ScheduleKind | None = None
    warmup_epochs: float | None = None
    clip: float | None = None
    ema: float | None = None
    precision: Precision | None = None
    channels_last: bool | None = None
    compile: bool | None = None
    sync_bn: bool | None = None


@dataclass(frozen=True)
class Member:
    """One student of a command: its spec as typed, its folder, and the record of the run that has begun there."""

    spec: str
    folder: Path
    record: RunRecord | None


def resolve_learners(asked: Asked, typed: TypedMethod, members: Sequence[Member]) -> tuple[LearnerSpec, ...]:
    """One learner for all members if the method trains peers, else one for each.

    A student without a run of its own is trained like the others of the command that have begun. Raises UserError
    for specs that cannot be resolved.
    """
    begun = next((member for member in members if member.record), members[0])
    groups = [list(members)] if typed.method.needs.peers else [[member] for member in members]
    return tuple(_resolve_learner(asked, typed, group, begun) for group in groups)


def _resolve_learner(asked: Asked, typed: TypedMethod, group: Sequence[Member], begun: Member) -> LearnerSpec:
    """The learner of some students. begun: the member whose record counts if none of the group has one."""
    source = next((member for member in group if member.record), begun)
    record = source.record
    method = _choose_method(typed, record, f"{source.folder}/{MANIFEST}")
    recipe = _choose_recipe(asked, typed.method.recipe, record)
    training = record.identity.training if record else None
    return LearnerSpec(
        method=method,
        students=tuple(choose_student(one.spec, one.folder, one.record, asked.image_size) for one in group),
        recipe=recipe,
        lr=training.lr if training and asked.lr is None else asked.lr,
        ema=training.ema if training and asked.ema is None else asked.ema,
        precision=asked.precision or (training.precision if training else PRECISION),
        sampling=_resolve_sampling(asked, recipe, typed, record),
        execution=_resolve_execution(asked, record),
        begun_steps=max((one.record.about.steps or 0 for one in group if one.record), default=0) or None,
    )


def _choose_method(typed: TypedMethod, record: RunRecord | None, where: str) -> MethodChoice:
    """The method of a spec as typed. Options that it does not give are those with which the run was begun.

    record: of the run, None for a new one; `where` names its manifest in errors. Raises UserError for an unknown
    option, for one that is missing, and for a value of the wrong type.
    """
    spec, there = typed.spec, parse(record.identity.method) if record else None
    if record is None or there is None or not _same_method(typed, record):
        typed.check({})
        return MethodChoice(typed.text, spec, typed.method, {**typed.defaults, **typed.given(spec)})
    recorded = {**typed.defaults, **version1.METHOD_OPTIONS.get(spec.kind, {})}
    recorded |= typed.given(there, f"{where}: identity.method: ")
    if record.identity.options:
        require_types(record.identity.options, typed.keys, f"{where}: identity.options")
        recorded |= record.identity.options
    elif spec.kind in version1.BANKS and recorded.get("bank") is None:
        recorded["bank"] = min(version1.BANKS[spec.kind], max(1, record.identity.images // 2))
    typed.check(recorded)
    kept = {name: value for name, value in recorded.items() if typed.accepts(name)}
    return MethodChoice(record.identity.method, spec, typed.method, {**kept, **typed.given(spec)}, recorded)


def _same_method(typed: TypedMethod, record: RunRecord) -> bool:
    """Whether a spec names the recorded method: by the same words, or by another path of the same file."""
    as_typed = typed.spec, parse(record.identity.method)
    located = METHODS.locate(typed.text), METHODS.locate(record.method_spec)
    return any((one.kind, one.argument) == (there.kind, there.argument) for one, there in (as_typed, located))


def _choose_recipe(asked: Asked, published: Recipe, record: RunRecord | None) -> Recipe:
    """The recipe: fields that were given, else those of the run that was begun, else as published.

    The learning rate of a run that was begun is not in its recipe but in LearnerSpec.lr, since it is not scaled again;
    its length is in its Sampling.
    """
    names = ("optimizer", "momentum", "weight_decay", "norm_decay", "schedule", "warmup_epochs", "clip")
    given = {name: getattr(asked, name) for name in names if getattr(asked, name) is not None}
    if record is None:
        return replace(published, **given)
    training = record.identity.training
    begun = replace(
        published, optimizer=training.optimizer, momentum=training.momentum, weight_decay=training.weight_decay,
        norm_decay=training.norm_decay, schedule=training.schedule.kind, drops=training.schedule.drops,
        warmup_epochs=training.schedule.warmup_epochs, clip=training.clip, batch_size=record.identity.batch_size,
    )  # fmt: skip
    return replace(begun, **given)


def _resolve_sampling(asked: Asked, recipe: Recipe, typed: TypedMethod, record: RunRecord | None) -> Sampling:
    """Images, views and length. Raises UserError for fewer views per step than the method needs.

    --batch-size is per rank; a published or recorded batch size is that of all ranks together.
    """
    needs = typed.method.needs
    identity, about = (record.identity, record.about) if record else (None, None)
    if asked.views_per_step is not None and asked.views_per_step < needs.views:
        raise UserError(f"{typed.text} needs --views-per-step {needs.views} or more, not {asked.views_per_step}")
    w = (asked.views_per_step or needs.views) * (len(asked.student) if needs.independent else 1)
    epochs, steps = _resolve_length(asked, recipe, typed.spec.kind, record)
    return Sampling(
        seed=asked.seed if asked.seed is not None else identity.training.seed if identity else SEED,
        batch=asked.batch_size * collectives.world_size() if asked.batch_size else recipe.batch_size,
        views=asked.views or (about.views if about else None),
        views_per_step=identity.views_per_step if identity and asked.views_per_step is None else w,
        pairing=asked.pairing or (identity.pairing if identity else PAIRING),
        epochs=epochs,
        steps=steps,
        reads_features=bool(needs.arrays),
    )


def _resolve_length(
    asked: Asked, recipe: Recipe, kind: str, record: RunRecord | None
) -> tuple[float | None, int | None]:
    """(epochs, steps), one of which is None."""
    if asked.steps:
        return None, asked.steps
    if asked.epochs or record is None:
        return asked.epochs or recipe.epochs, None
    if record.about.steps is UNSET:
        return version1.EPOCHS.get(kind, recipe.epochs), None
    return (record.about.epochs, None) if record.about.epochs else (None, record.about.steps)


def _resolve_execution(asked: Asked, record: RunRecord | None) -> Execution:
    """How the networks are run. Version 1 did not record it."""
    begun = EXECUTION
    if record:
        about = record.about
        begun = Execution(
            version1.CHANNELS_LAST if about.channels_last is UNSET else about.channels_last,
            version1.COMPILE if about.compile is UNSET else about.compile,
            version1.SYNC_BN if about.sync_bn is UNSET else about.sync_bn,
        )
    return Execution(
        begun.channels_last if asked.channels_last is None else asked.channels_last,
        begun.compile if asked.compile is None else asked.compile,
        begun.sync_bn if asked.sync_bn is None else asked.sync_bn,
    )
