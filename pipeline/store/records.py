"""The records of a store: its manifest (`StoreIdentity` and `StoreAbout`) and its history.

They are read here and nowhere else, with every type, range and name checked, and they are written from these classes
byte for byte as they were read. docs/store.md describes the files. A digest says that a record is whole, not that it
is true, so no entry is used before it is checked.
"""

from dataclasses import dataclass, replace
from typing import Annotated, TypedDict

from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.choices import Precision
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.records import (
    UNSET,
    Count,
    Digest,
    InvalidRecord,
    Meta,
    Positive,
    Sha256,
    UnsetType,
    parse_json,
    read_record,
)
from compress_ssl.pipeline.runtime.storage import Storage
from compress_ssl.pipeline.store.codecs import build_codec
from compress_ssl.pipeline.store.layout import VIEW_BLOCK
from compress_ssl.pipeline.views.augment import ViewSpec
from compress_ssl.pipeline.views.groups import GLOBAL_VIEWS, GROUPS, ROOM, ViewGroup
from compress_ssl.pipeline.views.preprocessing import Preprocessing

MAX_EXTENT = 2**40  # images, rows and numbers of a feature: what is larger is no store's, and overflows an index

Extent = Annotated[int, Meta(ge=1, le=MAX_EXTENT)]
Views = Annotated[int, Meta(ge=1, le=ROOM)]  # a larger number would be that of another group's view
Shape = Annotated[tuple[Extent, ...], Meta(min_length=1, max_length=2)]  # of one (i, v): (D,), or (R, D) of regions
OUTPUTS = ("embedding", "projection", "logits", "regions")  # of a teacher, see docs/store.md
ARRAYS = tuple(name for group in GROUPS if group.stored for name in group.arrays(OUTPUTS))
ArrayName = Annotated[str, Meta(pattern=rf"^({'|'.join(ARRAYS)})\Z")]
FileKey = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)*\Z")]  # inside the store: no `..`
Row = Annotated[str, Meta(pattern=r"^(0|[1-9][0-9]{0,17})\Z")]  # a row number as the key of a JSON object
Seconds = Annotated[int, Meta(ge=0)] | Annotated[float, Meta(ge=0)]

# ---------------------------------------------------------------- the manifest


@dataclass(frozen=True)
class DataIdentity:
    """The images of a store: their number, and the digest of their ids and class names."""

    fingerprint: Digest
    images: Extent


@dataclass(frozen=True)
class TeacherIdentity:
    """The network whose features are stored. The features of an evaluation record neither its name nor its width."""

    weights: Sha256
    preprocessing: Preprocessing
    name: str | UnsetType = UNSET
    width: Positive | UnsetType = UNSET
    heads: Sha256 | UnsetType = UNSET  # of the frozen heads; missing if the teacher has none


@dataclass(frozen=True)
class GroupIdentity:
    """A group of views of a store beside the global ones, whose number may not grow."""

    views: Views
    size: Positive  # side in pixels


@dataclass(frozen=True)
class ParentIdentity:
    """What a copy in part or in another codec was made of: the fingerprint of that store, the digest of the ids."""

    store: Digest
    images: Digest


@dataclass(frozen=True)
class StoreIdentity:
    """What makes a store this store. Its fingerprint is what runs and copies record; the number of views is not in it.

    `read_store` has checked that the codec can store the arrays and that each group of views has arrays of its own.
    """

    data: DataIdentity
    teacher: TeacherIdentity
    views: ViewSpec
    arrays: dict[ArrayName, Shape]  # shape of one (i, v)
    codec: str
    batch_size: Extent  # images per forward pass
    precision: Precision
    shard_rows: Extent  # of a row block; the last one may be shorter
    local: GroupIdentity | UnsetType = UNSET  # the entry of a group has the group's name
    parent: ParentIdentity | UnsetType = UNSET

    def group(self, group: ViewGroup) -> GroupIdentity | None:
        """The entry of a group of views; None if the store has none of them."""
        entry: GroupIdentity | UnsetType = getattr(self, group.name, UNSET)
        return entry or None

    def groups(self, views: int, start: int = 0) -> tuple[ViewGroup, ...]:
        """The groups of views of a store that holds the global views start..views-1, the global ones first."""
        side = self.teacher.preprocessing.size
        found = [replace(GLOBAL_VIEWS, count=views, start=start, size=side)]
        for group in GROUPS:
            entry = self.group(group) if group.stored else None
            if entry is not None:
                found.append(replace(group, count=entry.views, size=entry.size, ratio=(entry.size, side)))
        return tuple(found)


@dataclass(frozen=True)
class DataSource:
    """Where the images of a store were, for whoever opens them again."""

    spec: str  # as --data, with absolute paths
    limit: Extent | None  # number of images, spread evenly over the data set; None: all of them
    selected: bool | UnsetType = UNSET  # whether the store is a copy of some of these images


_Copied = TypedDict("_Copied", {"from": str, "store": Digest})  # `from` cannot be a field of a dataclass


@dataclass(frozen=True)
class StoreAbout:
    """What may change without making a store another one, and where it came from.

    The features that an evaluation writes have no entry but `views` and `small`: `exported` tells the two apart.
    """

    views: Views  # global views
    small: dict[FileKey, Digest]  # the small files: Zarr metadata, tables, codebooks, heads
    first_view: Annotated[int, Meta(ge=VIEW_BLOCK, multiple_of=VIEW_BLOCK)] | UnsetType = UNSET  # missing: 0
    data: DataSource | UnsetType = UNSET
    teacher: str | UnsetType = UNSET  # spec of the teacher, with absolute paths
    classes: tuple[str, ...] | UnsetType = UNSET  # names, by label
    parameters: Count | UnsetType = UNSET  # of the teacher's backbone
    pixels: dict[Row, Digest] | UnsetType = UNSET  # digests of the probe views by row, see `render_probe`
    like: Digest | UnsetType = UNSET  # fingerprint of the store given by --like
    copied: _Copied | UnsetType = UNSET

    @property
    def first(self) -> int:
        """Number of the first global view that the store holds."""
        return self.first_view or 0

    @property
    def copied_from(self) -> str | None:
        """Folder or URL of the store that this one is a copy of."""
        return self.copied["from"] if self.copied else None


@dataclass(frozen=True)
class ExportRecord:
    """What the manifest of an exported store says of its origin; the features of an evaluation have no such record."""

    data: DataSource
    teacher: str  # spec of the teacher
    name: str  # of the teacher, for readers
    width: int  # of the teacher's embedding, D
    classes: tuple[str, ...]
    parameters: int
    pixels: dict[Row, Digest]


@dataclass(frozen=True)
class StoreRecord:
    """The manifest of a store."""

    identity: StoreIdentity
    about: StoreAbout


def read_store(storage: Storage) -> StoreRecord:
    """Read the manifest of a store. Raises UserError if there is none, or if it is damaged or not valid."""
    return store_record(artifact.read(storage, "store"), f"{storage}/{artifact.MANIFEST}")


def store_record(manifest: artifact.Manifest, where: str) -> StoreRecord:
    """The record in a manifest of the kind `store`; `where` names the file in errors. Raises InvalidRecord."""
    record = read_record(StoreRecord, {"identity": manifest.identity, "about": manifest.about}, where)
    fault = _fault_of_identity(record.identity) or _fault_of_about(record)
    if fault:
        raise InvalidRecord(f"{where} is not valid: {fault}; restore it from a copy, or export anew")
    return record


def _fault_of_identity(identity: StoreIdentity) -> str:
    """The first entries that do not fit each other, in words; "" if all do."""
    arrays = identity.arrays
    if "embedding" not in arrays:
        return f"identity.arrays has {', '.join(arrays) or 'no array'}, but not embedding"
    for name, shape in arrays.items():
        if len(shape) != (2 if name == "regions" else 1):
            return f"identity.arrays.{name} has {len(shape)} axes"
        try:
            build_codec(identity.codec).shape(shape)
        except UserError as problem:
            return f"identity.codec: {problem}"
    for group in GROUPS:
        name = group.array("embedding")
        if group.stored and group.prefix and (identity.group(group) is None) == (name in arrays):
            return f"identity.{group.name} and the array {name} belong together, but one of them is missing"
    return ""


def _fault_of_about(record: StoreRecord) -> str:
    """The first entry of `about` that does not fit the identity, in words; "" if all do."""
    about = record.about
    if about.first >= about.views:
        return f"about.first_view is {about.first}, but the store has views below {about.views}"
    beyond = [row for row in about.pixels or {} if int(row) >= record.identity.data.images]
    if beyond:
        return f"about.pixels names row {beyond[0]}, but the store has {record.identity.data.images} images"
    return ""


def export_record(record: StoreRecord, where: str) -> ExportRecord:
    """What an exported store says of its origin. Raises UserError for the features of an evaluation."""
    teacher, about = record.identity.teacher, record.about
    if about.data is UNSET:
        raise UserError(
            f"{where} holds the features of view 0 that an evaluation wrote, and is no teacher's store; name "
            "a store that compress export-teacher made (compress verify --sample 0 checks this one's digests)"
        )
    if (
        teacher.name is UNSET
        or teacher.width is UNSET
        or about.teacher is UNSET
        or about.classes is UNSET
        or about.parameters is UNSET
        or about.pixels is UNSET
    ):
        raise InvalidRecord(
            f"{where}/{artifact.MANIFEST} is not valid: it lacks one of the entries identity.teacher.name, "
            "identity.teacher.width, about.teacher, about.classes, about.parameters and about.pixels; restore it from "
            "a copy, or export anew"
        )
    return ExportRecord(
        about.data, about.teacher, teacher.name, teacher.width, about.classes, about.parameters, about.pixels
    )


# ---------------------------------------------------------------- history


@dataclass(frozen=True)
class HistoryEvent:
    """A line of history.jsonl: which process on which host computed how much, when, with which versions."""

    when: str
    host: str
    pid: Count
    device: str
    versions: dict[str, str]  # of Python and of packages, by name
    images: Count
    views: Count  # image-view pairs
    seconds: Seconds
    waited: Seconds  # of these, for pixels from the loader


def read_history(raw: bytes, where: str) -> tuple[list[HistoryEvent], int]:
    """(events in order, number of lines that are none, because a crash cut them off or they are damaged)."""
    events: list[HistoryEvent] = []
    lines = [line for line in raw.split(b"\n") if line]
    for line in lines:
        try:
            events.append(read_record(HistoryEvent, parse_json(line, where), where, ignore_unknown=True))
        except InvalidRecord:
            continue
    return events, len(lines) - len(events)
