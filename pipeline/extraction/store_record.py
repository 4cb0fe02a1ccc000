"""What the manifest of an exported store says: `describe_store` builds its identity and its about."""

from dataclasses import dataclass

from compress_ssl.pipeline.datasets import DATASETS
from compress_ssl.pipeline.datasets.base import Dataset
from compress_ssl.pipeline.models import MODELS
from compress_ssl.pipeline.models.embedder import Embedder, state_digest
from compress_ssl.pipeline.runtime.records import UNSET, UnsetType
from compress_ssl.pipeline.store.codecs import build_codec
from compress_ssl.pipeline.store.records import (
    DataIdentity,
    DataSource,
    LocalIdentity,
    Precision,
    StoreAbout,
    StoreIdentity,
    StoreRecord,
    TeacherIdentity,
)
from compress_ssl.pipeline.store.render_probe import probe_digests
from compress_ssl.pipeline.store.shards import shard_rows
from compress_ssl.pipeline.views.augment import ViewSpec
from compress_ssl.pipeline.views.render import default_local_size


@dataclass(frozen=True)
class StoreSettings:
    """The settings of an export that its manifest records, beside the view spec."""

    data: str  # spec of the data set, as --data
    limit: int | None  # number of images, spread evenly over the data set; None: all of them
    teacher: str  # spec of the teacher, as --teacher
    outputs: tuple[str, ...]  # outputs of the teacher to store, the embedding first
    views: int  # global views per image
    local_views: int  # local crops per image
    local_size: int | None  # side of a local crop in pixels; None: 3/7 of a global view's
    codec: str
    batch_size: int  # images per forward pass
    precision: Precision
    shard_rows: int | None  # rows per shard; None: chosen by the number of images and the size of a row


def describe_store(settings: StoreSettings, dataset: Dataset, embedder: Embedder, spec: ViewSpec) -> StoreRecord:
    """The manifest: the settings that define the store, and those that may change later.

    Raises UserError if the teacher does not accept local crops of the requested size.
    """
    return StoreRecord(
        _describe_identity(settings, dataset, embedder, spec), _describe_about(settings, dataset, embedder, spec)
    )


def _describe_identity(settings: StoreSettings, dataset: Dataset, embedder: Embedder, spec: ViewSpec) -> StoreIdentity:
    arrays = _array_shapes(settings, embedder)
    local: LocalIdentity | UnsetType = UNSET
    if settings.local_views:
        side = settings.local_size or default_local_size(embedder.preprocessing.size)
        embedder.require_size(side, "--local-size")
        local = LocalIdentity(settings.local_views, side)
    return StoreIdentity(
        data=DataIdentity(dataset.fingerprint, len(dataset)),
        teacher=_describe_teacher(embedder),
        views=spec,
        arrays=arrays,
        codec=settings.codec,
        batch_size=settings.batch_size,
        precision=settings.precision,
        shard_rows=settings.shard_rows or _choose_shard_rows(settings, len(dataset), arrays),
        local=local,
    )


def _describe_teacher(embedder: Embedder) -> TeacherIdentity:
    heads = embedder.head_tensors()
    return TeacherIdentity(
        weights=embedder.digest(),
        preprocessing=embedder.preprocessing,
        name=embedder.name,
        width=embedder.width,
        heads=state_digest(heads) if heads else UNSET,
    )


def _describe_about(settings: StoreSettings, dataset: Dataset, embedder: Embedder, spec: ViewSpec) -> StoreAbout:
    return StoreAbout(
        views=settings.views,
        small={},  # `FeatureStore.create` fills it in
        data=DataSource(DATASETS.absolute_spec(settings.data), settings.limit),
        teacher=MODELS.absolute_spec(settings.teacher),
        classes=tuple(dataset.classes),
        parameters=sum(p.numel() for p in embedder.backbone.parameters()),
        pixels=probe_digests(dataset, spec, embedder.preprocessing),
    )


def _array_shapes(settings: StoreSettings, embedder: Embedder) -> dict[str, tuple[int, ...]]:
    """{array: shape of one (i, v)} of the outputs to store; of local views, only the outputs that are vectors."""
    arrays = {name: tuple(embedder.shapes[name]) for name in settings.outputs}
    if settings.local_views:
        arrays |= {f"local_{n}": arrays[n] for n in ("embedding", "projection") if n in arrays}
    return arrays


def _choose_shard_rows(settings: StoreSettings, images: int, arrays: dict[str, tuple[int, ...]]) -> int:
    codec = build_codec(settings.codec)
    stored = {name: codec.shape(shape) for name, shape in arrays.items()}
    return shard_rows(images, settings.batch_size, stored, codec.dtype.itemsize)
