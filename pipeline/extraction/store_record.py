"""What the manifest of an exported store says: `describe_store` builds its identity and its about."""

from compress_ssl.pipeline.datasets import DATASETS
from compress_ssl.pipeline.extraction.export_job import Job, StoreFlags
from compress_ssl.pipeline.models import MODELS
from compress_ssl.pipeline.models.embedder import Embedder, state_digest
from compress_ssl.pipeline.runtime.records import UNSET, UnsetType
from compress_ssl.pipeline.store.codecs import build_codec
from compress_ssl.pipeline.store.records import (
    DataIdentity,
    DataSource,
    GroupIdentity,
    StoreAbout,
    StoreIdentity,
    StoreRecord,
    TeacherIdentity,
)
from compress_ssl.pipeline.store.render_probe import probe_digests
from compress_ssl.pipeline.store.shards import shard_rows
from compress_ssl.pipeline.views.augment import ViewSpec
from compress_ssl.pipeline.views.groups import GLOBAL_VIEWS, LOCAL_CROPS


def describe_store(job: Job, embedder: Embedder) -> StoreRecord:
    """The manifest: the settings that define the store, and those that may change later.

    embedder: the teacher of the job. Raises UserError if the teacher does not accept local crops of the requested size.
    """
    identity = _describe_identity(job, embedder)
    return StoreRecord(identity, _describe_about(job, embedder, identity.views))


def _describe_identity(job: Job, embedder: Embedder) -> StoreIdentity:
    flags, dataset = job.flags, job.dataset
    arrays = _array_shapes(flags, embedder)
    local: GroupIdentity | UnsetType = UNSET
    if flags.local_views:
        side = flags.local_size or LOCAL_CROPS.side(embedder.preprocessing.size)
        embedder.require_size(side, "--local-size")
        local = GroupIdentity(flags.local_views, side)
    source = job.begun or job.like
    ratio = source.identity.views.crop_ratio if source else embedder.preprocessing.crop_ratio
    return StoreIdentity(
        data=DataIdentity(dataset.fingerprint, len(dataset)),
        teacher=_describe_teacher(embedder),
        views=ViewSpec(flags.policy, flags.seed, ratio),
        arrays=arrays,
        codec=flags.codec,
        batch_size=flags.batch_size,
        precision=flags.precision,
        shard_rows=flags.shard_size or _choose_shard_rows(flags, len(dataset), arrays),
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


def _describe_about(job: Job, embedder: Embedder, spec: ViewSpec) -> StoreAbout:
    return StoreAbout(
        views=job.flags.views,
        small={},  # `FeatureStore.create` fills it in
        data=DataSource(DATASETS.absolute_spec(job.data), job.flags.limit),
        teacher=MODELS.absolute_spec(job.teacher),
        classes=tuple(job.dataset.classes),
        parameters=sum(p.numel() for p in embedder.backbone.parameters()),
        pixels=probe_digests(job.dataset, spec, embedder.preprocessing),
    )


def _array_shapes(flags: StoreFlags, embedder: Embedder) -> dict[str, tuple[int, ...]]:
    """{array: shape of one (i, v)} of the outputs to store; a group of views keeps some or all of them."""
    groups = [GLOBAL_VIEWS, LOCAL_CROPS] if flags.local_views else [GLOBAL_VIEWS]
    arrays = [array for group in groups for array in group.arrays(flags.outputs).items()]
    return {array: tuple(embedder.shapes[output]) for array, output in arrays}


def _choose_shard_rows(flags: StoreFlags, images: int, arrays: dict[str, tuple[int, ...]]) -> int:
    codec = build_codec(flags.codec)
    stored = {name: codec.shape(shape) for name, shape in arrays.items()}
    return shard_rows(images, flags.batch_size, stored, codec.dtype.itemsize)
