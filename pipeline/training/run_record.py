"""The manifest of a run as frozen dataclasses: what makes a run what it is, and what its folder tells readers about it.

`read_run` is the one place that reads a run's manifest. Whoever needs a fact about a run takes it from the record. The
entries that version 1 did not write are missing in its runs (UNSET); `version1_defaults` says what they mean there.
"""

from dataclasses import dataclass
from typing import Annotated

from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.choices import Precision
from compress_ssl.pipeline.runtime.options import Option
from compress_ssl.pipeline.runtime.records import (
    UNSET,
    Count,
    Digest,
    InvalidRecord,
    Meta,
    Number,
    Positive,
    Sha256,
    UnsetType,
    read_record,
)
from compress_ssl.pipeline.runtime.storage import Storage
from compress_ssl.pipeline.store.records import DataSource
from compress_ssl.pipeline.training.choices import OptimizerName, Pairing
from compress_ssl.pipeline.training.schedule import ScheduleKind
from compress_ssl.pipeline.views.augment import ViewSpec
from compress_ssl.pipeline.views.preprocessing import Preprocessing

MAX_SIDE = 8192  # of an image in pixels: models take up to about 1500


@dataclass(frozen=True)
class StudentRecord:
    """A student before its first step."""

    spec: str  # as it was typed
    preprocessing: Preprocessing
    width: Positive
    initial: Sha256  # digest of the initial weights
    options: dict[str, Option] | UnsetType = UNSET  # what the keys of a network of our own stand for


@dataclass(frozen=True)
class ScheduleRecord:
    """The learning rate's schedule. The warm-up is kept in epochs: as a fraction it would change with the length."""

    kind: ScheduleKind
    drops: tuple[tuple[Number, Number], ...]
    warmup: None
    warmup_epochs: Number


@dataclass(frozen=True)
class TrainingRecord:
    """The hyper-parameters of a run, see training.settings.TrainingSettings."""

    optimizer: OptimizerName
    lr: Number
    momentum: Number
    weight_decay: Number
    norm_decay: bool
    schedule: ScheduleRecord
    clip: Number | None
    ema: Number | None
    precision: Precision
    seed: Count  # below 2**64


@dataclass(frozen=True)
class RunIdentity:
    """What makes a run what it is: a repeated command has to agree with all of it."""

    store: Digest  # fingerprint of the store
    images: Positive  # usable ones
    student: StudentRecord
    method: str  # spec of the method, as it was typed
    training: TrainingRecord
    batch_size: Positive  # images per step of all ranks together
    pairing: Pairing
    views_per_step: Positive
    views: Annotated[tuple[Count, ...], Meta(min_length=1)]  # numbers of the stored views
    peers: tuple[StudentRecord, ...] | UnsetType = UNSET  # all students of a method that trains several together
    options: dict[str, Option] | UnsetType = UNSET  # every option of the method, given or not


@dataclass(frozen=True)
class RunAbout:
    """Facts for readers of a run that may change without making it another run."""

    store: str  # where the store was
    data: DataSource
    views: Positive  # stored views below this number are used
    views_spec: ViewSpec
    parameters: Count
    teacher: str  # spec
    name: str  # of the student, for files
    steps: Positive | UnsetType = UNSET  # length of the run; grows
    epochs: Number | UnsetType | None = UNSET  # the same as it was asked for; null if it was asked for in steps
    channels_last: bool | UnsetType = UNSET
    compile: bool | UnsetType = UNSET
    sync_bn: bool | UnsetType = UNSET
    student: str | UnsetType = UNSET  # identity.student.spec with absolute paths, if a path in it is relative
    method: str | UnsetType = UNSET  # identity.method, likewise


@dataclass(frozen=True)
class RunRecord:
    """All that the manifest of a run says."""

    identity: RunIdentity
    about: RunAbout

    @property
    def student_spec(self) -> str:
        """The student's spec, in any working directory. In a run of version 1, a path may be relative."""
        return self.about.student or self.identity.student.spec

    @property
    def method_spec(self) -> str:
        """The method's spec, likewise."""
        return self.about.method or self.identity.method


def read_run(storage: Storage) -> RunRecord:
    """The record of the run in a folder.

    Raises UserError if the folder holds none, and InvalidRecord, which names the entry, if it is malformed.
    """
    return parse_run(artifact.read(storage, "run"), f"{storage}/{artifact.MANIFEST}")


def read_begun_run(storage: Storage) -> RunRecord | None:
    """The record of the run in a folder, None if the folder is empty or missing. Raises UserError as `read_run`."""
    manifest = artifact.claimed(storage, "run")
    return None if manifest is None else parse_run(manifest, f"{storage}/{artifact.MANIFEST}")


def parse_run(manifest: artifact.Manifest, where: str) -> RunRecord:
    """The record in a run's manifest; `where` names the manifest in an error. Raises InvalidRecord."""
    entries = {"identity": manifest.identity, "about": manifest.about}
    record = read_record(RunRecord, entries, where)
    used = record.identity.views
    if list(used) != sorted(set(used)) or used[-1] != record.about.views - 1:
        raise InvalidRecord(
            f"{where} is not valid: identity.views is {list(used)[:8]}, but must be ascending and end with "
            f"{record.about.views - 1}, the last below about.views; restore it from a copy"
        )
    seed, size = record.identity.training.seed, record.identity.student.preprocessing.size
    if seed >= 2**64 or size > MAX_SIDE:  # msgspec's ranges end at 2**63
        name, limit = ("training.seed", 2**64 - 1) if seed >= 2**64 else ("student.preprocessing.size", MAX_SIDE)
        raise InvalidRecord(f"{where} is not valid: identity.{name} is more than {limit}; restore it from a copy")
    return record
