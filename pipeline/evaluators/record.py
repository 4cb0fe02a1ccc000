"""What an evaluation folder says on disk, as records: its manifest, and its metrics.json.

metrics.json = {"model", "data", one entry for each protocol, "scores"}. Version 1 wrote no `scores`: there the
protocols themselves read their entries.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from compress_ssl.pipeline.evaluators import PROTOCOLS, find_protocol
from compress_ssl.pipeline.evaluators.scores import Score, sort_naturally
from compress_ssl.pipeline.runtime.artifact import Manifest, Mismatch
from compress_ssl.pipeline.runtime.choices import Precision
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.formatting import is_finite
from compress_ssl.pipeline.runtime.progress import echo
from compress_ssl.pipeline.runtime.records import (
    UNSET,
    Count,
    Digest,
    InvalidRecord,
    JsonObject,
    Number,
    Positive,
    Sha256,
    UnsetType,
    parse_json,
    read_record,
    to_json,
)
from compress_ssl.pipeline.runtime.storage import Folder, Storage
from compress_ssl.pipeline.views.preprocessing import Preprocessing

METRICS = "metrics.json"
OWN_ENTRIES = ("model", "data", "scores")  # of metrics.json, which no protocol may be called

# ---------------------------------------------------------------- what was scored


@dataclass(frozen=True)
class ModelRecord:
    """The model that was scored."""

    name: str
    role: str  # "student", "teacher" or "model"
    parameters: Count
    width: Positive
    spec: str | UnsetType = UNSET
    run: str | UnsetType = UNSET  # of a student
    method: str | UnsetType = UNSET  # of a student
    store: str | UnsetType = UNSET  # of a teacher

    @property
    def is_teacher(self) -> bool:
        return self.role == "teacher"


@dataclass(frozen=True)
class DataRecord:
    """The images it was scored on: specs, numbers of usable images, number of classes."""

    train: str
    train_images: Count
    val: str
    val_images: Count
    classes: Count

    @property
    def extent(self) -> tuple[int, int, int]:
        """Two evaluations are compared if these are equal: the same images may lie at another path elsewhere."""
        return self.train_images, self.val_images, self.classes


# ---------------------------------------------------------------- the manifest


@dataclass(frozen=True)
class WeightsRecord:
    """The weights that are scored, and how their images are prepared."""

    weights: Sha256
    preprocessing: Preprocessing


@dataclass(frozen=True)
class FingerprintsRecord:
    """Fingerprints of the two data sets."""

    train: Digest
    val: Digest


@dataclass(frozen=True)
class EvaluationIdentity:
    """What makes an evaluation this one; see runtime.artifact."""

    model: WeightsRecord
    crop_ratio: Number
    data: FingerprintsRecord
    precision: Precision


@dataclass(frozen=True)
class EvaluationAbout:
    """What an evaluation says of its model and images in words that may change."""

    model: ModelRecord
    train: str
    val: str


@dataclass(frozen=True)
class EvaluationRecord:
    """The manifest of an evaluation."""

    identity: EvaluationIdentity
    about: EvaluationAbout


FLAGS = {"precision": "--precision", "model.preprocessing.size": "--image-size"}
"""{entry of an evaluation's identity: the flag that it comes from}."""


def require_same_inputs(earlier: EvaluationRecord, asked: EvaluationRecord, where: str) -> None:
    """Raises Mismatch if the evaluation in a folder was made from other images or weights than a command asks for.

    The claim of the folder would refuse them too, but would not say in words what they are.
    """
    if earlier.identity.model.weights != asked.identity.model.weights:
        raise Mismatch(
            f"{where} was made with other weights than {asked.about.model.name} has now, as after more training; start "
            "anew with --overwrite, or choose another --out",
            differing=["model.weights"],
        )
    there, now = earlier.identity.data, asked.identity.data
    for which, same, was, spec in (
        ("train", there.train == now.train, earlier.about.train, asked.about.train),
        ("val", there.val == now.val, earlier.about.val, asked.about.val),
    ):
        if not same:
            raise Mismatch(
                f"{where} was made with the {which} images of {was} as they were then, and those of {spec} are others; "
                "choose another --out, or start anew with --overwrite"
            )


def read_evaluation_record(manifest: Manifest, where: str) -> EvaluationRecord:
    """The record in a manifest of the kind "evaluation"; `where` names the folder. Raises InvalidRecord."""
    entries = {"identity": manifest.identity, "about": manifest.about}
    return read_record(EvaluationRecord, entries, f"{where}/manifest.json")


# ---------------------------------------------------------------- metrics.json


@dataclass(frozen=True)
class Evaluation:
    """A metrics.json as the pages read it."""

    model: ModelRecord
    data: DataRecord
    scores: tuple[Score, ...]
    protocols: JsonObject  # the entries of the protocols, whose contents only they know

    @property
    def summary(self) -> str:
        """The model and its scores in one line."""
        scores = "  ".join(f"{score.title} {score.value:.2f}{score.suffix}" for score in self.scores)
        none = "no scores" if self.data.classes else "no labels, so no scores"
        return f"{self.model.name} ({self.model.role}): {scores or none}"

    @property
    def by_title(self) -> dict[str, Score]:
        return {score.title: score for score in self.scores}

    def to_json(self) -> JsonObject:
        """The contents of metrics.json. What a score leaves at its default is left out."""
        scores = [_without_defaults(score) for score in self.scores]
        return {"model": to_json(self.model), "data": to_json(self.data), **self.protocols, "scores": scores}


@dataclass(frozen=True)
class _OwnEntries:
    model: ModelRecord
    data: DataRecord
    scores: tuple[Score, ...] | UnsetType = UNSET


def read_evaluation(storage: Storage) -> Evaluation:
    """metrics.json of an evaluation folder. Raises InvalidRecord if it is damaged or is not one."""
    where = f"{storage}/{METRICS}"
    try:
        return parse_metrics(parse_json(storage.get(METRICS), where), where)
    except InvalidRecord as wrong:
        raise InvalidRecord(f"{wrong}, or repeat the command compress evaluate, which writes it again") from None


def read_teacher(given: Path | None, usual: Path | None) -> Evaluation | None:
    """The teacher's evaluation in a folder that the user gave, or where it is by default; None if there is none.

    Raises UserError if the given folder has none.
    """
    folder = given or usual
    if folder is None or not (folder / METRICS).exists():
        if given:
            raise UserError(f"--teacher {given} holds no metrics.json; score the teacher first, with --store")
        return None
    return read_evaluation(Folder(folder))


def on_same_images(teacher: Evaluation | None, data: DataRecord) -> Evaluation | None:
    """The teacher's evaluation if it is of as many images and classes; else a message says that it is left out."""
    if teacher and teacher.data.extent != data.extent:
        echo(f"the teacher {teacher.model.name} was scored on other images, so it is left out of the report")
        return None
    return teacher


def parse_metrics(entries: object, where: str) -> Evaluation:
    """The parsed JSON of a metrics.json; `where` names it in errors."""
    own = read_record(_OwnEntries, entries, where, ignore_unknown=True)
    assert isinstance(entries, dict)  # or it would not have been read
    protocols = {key: value for key, value in entries.items() if key not in OWN_ENTRIES}
    if not isinstance(own.scores, UnsetType):
        return Evaluation(own.model, own.data, own.scores, protocols)
    scores = [score for key in protocols for score in _scores_of_version1(key, protocols[key], where)]
    return Evaluation(own.model, own.data, tuple(order_by_protocol(scores)), protocols)


def _scores_of_version1(entry: str, metrics: object, where: str) -> list[Score]:
    """The scores in one entry, which its protocol reads; of an entry that no protocol here has, its numbers."""
    kind = entry.partition("_")[0]  # an entry is a protocol's name, or that name, "_" and a variant
    protocol = find_protocol(kind)
    if protocol is None:
        return list(_numbers_of(entry, metrics))
    if not isinstance(metrics, dict):
        raise InvalidRecord(
            f"{where} is not valid: {entry} is {metrics!r:.40}, not what the protocol {kind!r} writes; restore it "
            "from a copy"
        )
    scores = protocol.scores_of(entry, metrics, f"{where}, entry {entry}")
    named = [replace_key(score, entry) for score in scores]
    return sort_naturally(named) if protocol.side_by_side else named


def order_by_protocol(scores: list[Score]) -> list[Score]:
    """Scores in the order in which the protocols are registered; those of users' protocols come last."""
    kinds = list(PROTOCOLS.entries)

    def place(score: Score) -> tuple[int, str]:
        entry = score.key.partition(".")[0]
        kind = entry.partition("_")[0]
        return (kinds.index(kind) if kind in kinds else len(kinds)), entry

    return sorted(scores, key=place)


def _numbers_of(entry: str, metrics: object) -> Iterator[Score]:
    """The numbers in an entry of metrics.json that is known by its name alone, as scores without a unit."""
    for name, value in metrics.items() if isinstance(metrics, dict) else ():
        title = " ".join(f"{entry} {name}".split())
        if is_finite(value) and not isinstance(value, bool):
            limits = (min(0.0, value), max(100.0, value))
            yield Score(f"{entry}.{name}", title, value, "a number of metrics.json", unit="", range=limits)


def replace_key(score: Score, entry: str) -> Score:
    """The score as an evaluation names it: `nn.top1`."""
    return replace(score, key=f"{entry}.{score.key}")


def _without_defaults(score: Score) -> JsonObject:
    written: JsonObject = to_json(score)
    defaults = to_json(Score(score.key, score.title, score.value, range=score.range))
    kept = {"key", "title", "value"}
    if score.range != Score.range:
        kept.add("range")
    return {name: value for name, value in written.items() if name in kept or value != defaults[name]}
