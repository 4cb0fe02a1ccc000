"""Making a folder the run of a student: its manifest is written, or compared with the one that is there.

Neither the number of steps nor the number of ranks is part of a run's identity: a run may be made longer, and may
continue on other machines. Its length is recorded beside the identity, and so is how the network is run.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from compress_ssl.pipeline.methods import METHODS
from compress_ssl.pipeline.models import MODELS
from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.records import UNSET, UnsetType, to_json
from compress_ssl.pipeline.runtime.registry import Registry
from compress_ssl.pipeline.runtime.spec import parse
from compress_ssl.pipeline.runtime.storage import Folder, absolute
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.training.learner import Learner
from compress_ssl.pipeline.training.learner_spec import LearnerSpec
from compress_ssl.pipeline.training.run_record import (
    RunAbout,
    RunIdentity,
    RunRecord,
    ScheduleRecord,
    StudentRecord,
    TrainingRecord,
    read_begun_run,
    read_run,
)
from compress_ssl.pipeline.training.sampler import StepSampler
from compress_ssl.pipeline.training.settings import TrainingSettings
from compress_ssl.pipeline.training.student import Student
from compress_ssl.pipeline.training.student_choice import StudentChoice

# ---------------------------------------------------------------- claiming


def claim_run_folders(learner: Learner, spec: LearnerSpec, store: FeatureStore, sampler: StepSampler) -> None:
    """Write a manifest into the folder of each student of a learner, or compare it with the manifest that is there.

    Raises Mismatch, which lists what differs and the flags to which it belongs.
    """
    peers = [_student_record(student) for student in learner.students]
    for student, choice, own in zip(learner.students, spec.students, peers, strict=True):
        own = replace(own, options=dict(choice.options) if choice.options else UNSET)
        record = RunRecord(
            _identity(learner.settings, spec, own, peers, store, sampler), _about(student, spec, store, sampler)
        )
        _claim(Folder(choice.folder), record, spec, choice)


def _claim(folder: Folder, asked: RunRecord, spec: LearnerSpec, choice: StudentChoice) -> None:
    earlier = read_begun_run(folder)
    if earlier is None:
        artifact.write(folder, "run", to_json(asked.identity), to_json(asked.about))
        return
    there = earlier.identity
    # What the record lacks was filled in when the command was resolved.
    there = replace(
        there,
        options={**(spec.method.recorded or {}), **(there.options or {})},
        student=replace(there.student, options={**(choice.recorded or {}), **(there.student.options or {})} or UNSET),
    )
    identity = asked.identity
    if there.method != identity.method:  # the options of two methods are not to be compared
        there, identity = replace(there, options=UNSET), replace(identity, options=UNSET)
    if there.student.spec != identity.student.spec:
        there = replace(there, student=replace(there.student, options=UNSET))
        identity = replace(identity, student=replace(identity.student, options=UNSET))
    one, other = there.student, identity.student
    if (one.spec, one.options) != (other.spec, other.options):  # the width and the weights follow from these
        there = replace(there, student=replace(one, width=other.width, initial=other.initial))
    artifact.require_equal(folder, to_json(there), to_json(identity), _name_flag)


_FLAGS = {
    "store": "--store", "method": "--method", "batch_size": "--batch-size", "pairing": "--pairing",
    "views_per_step": "--views-per-step", "views": "--views", "student.spec": "--student",
    "student.preprocessing.size": "--image-size", "training.optimizer": "--optimizer", "training.lr": "--lr",
    "training.momentum": "--momentum", "training.weight_decay": "--weight-decay",
    "training.norm_decay": "--norm-decay", "training.schedule.kind": "--schedule",
    "training.schedule.warmup_epochs": "--warmup-epochs", "training.clip": "--clip", "training.ema": "--ema",
    "training.precision": "--precision", "training.seed": "--seed",
}  # fmt: skip
"""{entry of the identity: the flag that it comes from}."""


def _name_flag(entry: str) -> str:
    """The flag, or the key of a spec, that an entry of the identity comes from; "" if it comes from none."""
    for prefix, flag in (("options.", "--method"), ("student.options.", "--student")):
        if entry.startswith(prefix):
            return f"{flag} {entry.removeprefix(prefix)}="
    return _FLAGS.get(entry, "")


# ---------------------------------------------------------------- the record of a run


def _identity(
    settings: TrainingSettings, spec: LearnerSpec, student: StudentRecord, peers: Sequence[StudentRecord],
    store: FeatureStore, sampler: StepSampler,
) -> RunIdentity:  # fmt: skip
    return RunIdentity(
        store=store.fingerprint,
        images=len(sampler.rows),
        student=student,
        method=spec.method.words,
        training=_training_record(settings, spec.recipe.warmup_epochs),
        batch_size=sampler.batch,
        pairing=spec.sampling.pairing,
        views_per_step=sampler.views_per_step,
        views=sampler.views,
        peers=tuple(peers) if len(peers) > 1 else UNSET,
        options=dict(spec.method.options),
    )


def _training_record(settings: TrainingSettings, warmup_epochs: float) -> TrainingRecord:
    schedule = settings.schedule
    return TrainingRecord(
        optimizer=settings.optimizer, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay,
        norm_decay=settings.norm_decay,
        schedule=ScheduleRecord(schedule.kind, schedule.drops, None, warmup_epochs),
        clip=settings.clip, ema=settings.ema, precision=settings.precision, seed=settings.seed,
    )  # fmt: skip


def _student_record(student: Student) -> StudentRecord:
    model = student.model
    return StudentRecord(model.spec, model.preprocessing, model.width, initial=model.digest())


def _about(student: Student, spec: LearnerSpec, store: FeatureStore, sampler: StepSampler) -> RunAbout:
    return RunAbout(
        store=absolute(str(store.storage)),
        data=store.export.data,
        views=sampler.views[-1] + 1,
        views_spec=store.identity.views,
        parameters=sum(p.numel() for p in student.model.backbone.parameters()),
        teacher=store.export.teacher,
        name=student.model.name,
        steps=sampler.steps,
        epochs=spec.sampling.epochs,
        channels_last=spec.execution.channels_last,
        compile=spec.execution.compile,
        sync_bn=spec.execution.sync_bn,
        student=_located(MODELS, student.model.spec),
        method=_located(METHODS, spec.method.words),
    )


def _located(family: Registry[Any], spec: str) -> str | UnsetType:  # of models or of methods
    """The spec with absolute paths if it has a relative one, else UNSET."""
    located = str(family.locate(spec))
    return UNSET if located == str(parse(spec)) else located


# ---------------------------------------------------------------- the length of a run


def require_length(learner: Learner, spec: LearnerSpec, sampler: StepSampler) -> None:
    """Raise UserError if an unfinished run would end before the step for which it was begun.

    Its schedule was laid out for that length. A run of version 1 does not record it: there, a run that is ahead of
    what was asked counts as finished if its newest weights are those in student.safetensors.
    """
    begun, taken, asked = spec.begun_steps, learner.start, sampler.steps
    if begun is not None:
        finished = taken >= begun
    else:
        finished = taken == asked or (taken > asked and all(s.is_exported() for s in learner.students))
    if finished or asked >= max(begun or 0, taken):
        return
    epochs = f"{(begun or taken) * sampler.batch / len(sampler.rows):g} epochs"
    length = f"was begun for {begun} ({epochs}) and has taken {taken}" if begun else f"has taken {taken} ({epochs})"
    raise UserError(
        f"{learner.students[0].folder}: {asked} steps were asked, but the run {length}, and is not finished; a run is "
        "not made shorter. Repeat the command without --epochs and --steps, ask for as many or more, or begin a "
        "shorter run in another --out"
    )


def record_changes(learner: Learner, spec: LearnerSpec, sampler: StepSampler) -> None:
    """Record a larger number of steps, how the network is run now, and options that are new in a user's code.

    A record of version 1 stays as it is.
    """
    for student, choice in zip(learner.students, spec.students, strict=True):
        folder = Folder(student.folder)
        record = read_run(folder)
        about, identity = record.about, _completed(record.identity, spec, choice)
        if about.steps is UNSET:
            continue
        if sampler.steps > about.steps:
            about = replace(about, steps=sampler.steps, epochs=spec.sampling.epochs)
        now = spec.execution
        about = replace(about, channels_last=now.channels_last, compile=now.compile, sync_bn=now.sync_bn)
        if (identity, about) != (record.identity, record.about):
            artifact.write(folder, "run", to_json(identity), to_json(about))


def _completed(there: RunIdentity, spec: LearnerSpec, choice: StudentChoice) -> RunIdentity:
    """The identity with the options that the method and the network did not have yet when the run was begun."""
    options = {**choice.options, **(there.student.options or {})}
    return replace(
        there,
        options={**spec.method.options, **(there.options or {})},
        student=replace(there.student, options=options or UNSET),
    )
