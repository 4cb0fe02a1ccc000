"""`compress export-teacher`: embed every view of every image with the frozen teacher and store the features.

Each (i, v), image i in view v, is computed once: running the command again computes only what is missing.
"""

import secrets
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from compress_ssl.pipeline.datasets import open_images
from compress_ssl.pipeline.extraction.cluster import parse_scheduler
from compress_ssl.pipeline.models import parse_outputs
from compress_ssl.pipeline.models.choices import Precision
from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.config import NOT_NEGATIVE, POSITIVE, flag, require
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.formatting import format_duration
from compress_ssl.pipeline.runtime.progress import echo, progress_bar
from compress_ssl.pipeline.runtime.records import to_json
from compress_ssl.pipeline.runtime.signals import StopRequest
from compress_ssl.pipeline.runtime.storage import Folder, absolute, open_storage
from compress_ssl.pipeline.store.codecs import KNOWN, build_codec
from compress_ssl.pipeline.views.augment import Policy

if TYPE_CHECKING:
    from compress_ssl.pipeline.datasets.base import Dataset
    from compress_ssl.pipeline.extraction.dask_worker import WorkerSettings
    from compress_ssl.pipeline.extraction.store_record import StoreSettings
    from compress_ssl.pipeline.extraction.worker import DaskExport, ExportWorker
    from compress_ssl.pipeline.models.embedder import Embedder
    from compress_ssl.pipeline.runtime.lease import Lease
    from compress_ssl.pipeline.store.feature_store import FeatureStore


@dataclass(frozen=True)
class Config:
    """Run the frozen teacher once over every view of a data set and store its features.

    Running the same command again resumes it; a larger --views adds views and recomputes nothing.
    """

    data: str = flag(
        help="The data set: folder:PATH, digits or torchvision:NAME,root=DIR; a path alone means folder:PATH.",
        metavar="SPEC",
    )
    teacher: str = flag(
        help="The teacher: timm:NAME, torchvision:NAME, python:module:factory, torchscript:FILE, ... (compress models "
        "lists the kinds).",
        metavar="SPEC",
    )
    out: str = flag(
        help="Where the store is written: a folder, or s3://BUCKET/PREFIX, gs:// or az://.", metavar="STORE"
    )
    keep: str = flag(
        "embedding",
        "The outputs of the teacher to store, separated by commas: embedding, projection, logits, regions.",
        metavar="OUTPUTS",
    )
    codec: str = flag("int8", f"The codec of the stored features: {KNOWN}.", metavar="CODEC")
    limit: int | None = flag(
        None, "Use only this many images, evenly spread over the data set. Default: all.", metavar="N"
    )
    like: str | None = flag(
        None,
        "Take the view settings of this store, and require the same images. Default: the settings of this command.",
        metavar="STORE",
    )

    views: int = flag(
        8, "Views per image. View 0 is the deterministic centre crop, the others are random.", panel="Views"
    )
    policy: Policy = flag("crop-flip", "The augmentation policy of the random views.", panel="Views")
    image_size: int | None = flag(
        None, "Side of a view in pixels. Default: the input size of the teacher.", panel="Views", metavar="PIXELS"
    )
    local_views: int = flag(0, "Small crops per image beside the views, stored in arrays of their own.", panel="Views")
    local_size: int | None = flag(
        None, "Side of a small crop in pixels. Default: 3/7 of a view's side, as 96 is of 224.", panel="Views",
        metavar="PIXELS",
    )  # fmt: skip
    seed: int = flag(0, "Seed of the random views.", panel="Views")

    batch_size: int = flag(64, "Images per forward pass on a device.", panel="Speed", short="-b")
    workers: int | None = flag(
        None, "Loader processes. Default: one per core, at most 16; at most 4 if the model runs on the CPU.",
        panel="Speed", short="-j",
    )  # fmt: skip
    device: str = flag("auto", "Device of the teacher: auto, cpu, cuda or cuda:1.", panel="Speed", metavar="DEVICE")
    precision: Precision = flag("fp32", "Arithmetic of the forward pass.", panel="Speed")
    scheduler: str = flag(
        "local",
        "Where shards are computed: local, processes:N, or a dask scheduler at tcp://HOST:PORT.",
        panel="Speed",
        metavar="SCHEDULER",
    )
    shard_size: int | None = flag(
        None, "Images per shard. Default: up to 2048, fewer for a small data set.", panel="Speed", metavar="N"
    )

    dry_run: bool = flag(
        False, "Print what would be computed and an estimate of its cost, and write nothing.", panel="Output"
    )
    overwrite: bool = flag(False, "Start from scratch. An existing store is moved aside, not deleted.", panel="Output")


def run(config: Config) -> dict[str, Any]:
    """Compute the shards that the store lacks.

    Returns {"summary", "store", "fingerprint", "images", "views", "bad_images"}; with --dry-run, the estimate.
    Raises UserError for settings that are refused and for a folder that holds something else.
    """
    check(config)
    from compress_ssl.pipeline.models import MODELS

    MODELS.parse(config.teacher)
    config, other = adopt_view_settings(config)
    check(config)
    storage = open_storage(config.out)
    anew = config.overwrite and artifact.replaceable(config.out, "store")
    earlier = None if anew else artifact.claimed(storage, "store")
    dataset = open_images(config.data, config.limit)
    if earlier:
        require_its_images(config, dataset)

    from compress_ssl.pipeline.extraction.dask_worker import build_worker
    from compress_ssl.pipeline.extraction.feature_extractor import FeatureExtractor
    from compress_ssl.pipeline.extraction.store_record import describe_store
    from compress_ssl.pipeline.extraction.worker import DaskExport, ExportWorker
    from compress_ssl.pipeline.runtime import lease
    from compress_ssl.pipeline.runtime.device import choose_device, device_name
    from compress_ssl.pipeline.store import teacher_heads
    from compress_ssl.pipeline.store.compatibility import (
        require_recorded_rendering,
        require_same_views,
        require_unchanged,
    )
    from compress_ssl.pipeline.store.feature_store import FeatureStore
    from compress_ssl.pipeline.views.augment import ViewSpec

    local = config.scheduler == "local"
    device = choose_device(config.device if local else "cpu")  # each worker of a scheduler chooses its own
    embedder = build_teacher(config)
    ratio = other.identity.views.crop_ratio if other else embedder.preprocessing.crop_ratio
    spec = ViewSpec(config.policy, config.seed, ratio)
    record = describe_store(store_settings(config), dataset, embedder, spec)
    if other:
        require_same_views(record.identity, dataset, other)
        record = replace(record, about=replace(record.about, like=other.fingerprint))
    if earlier:
        artifact.claim(storage, "store", to_json(record.identity))
    if config.dry_run:
        from compress_ssl.pipeline.store.estimate import estimate

        pending = FeatureStore(storage).pending(config.views) if earlier else None
        return estimate(record.identity, config.views, config.out, pending)

    if earlier:
        require_recorded_rendering(FeatureStore(storage), dataset)
    elif config.overwrite:  # only after all checks have passed
        lease.set_aside(config.out, "store")
    tables = {"sample_id": dataset.ids, "label": dataset.label, "view_key": range(len(dataset))}
    with lease.Lease(storage) as held:
        if earlier:
            require_unchanged(FeatureStore(storage), dataset)
        store = FeatureStore.create(storage, record, tables, teacher_heads.head_files(embedder.head_tensors()))
        if not store.pending():
            return finish(store, f"{config.out} is complete already: {store.images} images, {store.views} views", other)
        if not local:
            remote = DaskExport(config.scheduler, partial(build_worker, worker_settings(config, store)))
            return fill(config, store, remote, config.scheduler, held, other)
        forward = FeatureExtractor(embedder, device, config.precision, config.batch_size, parse_outputs(config.keep))
        work = ExportWorker(store, dataset, spec, forward, config.workers)
        return fill(config, store, work, device_name(device), held, other)


def build_teacher(config: Config) -> "Embedder":
    """The teacher with the outputs that the store keeps. Seeds torch's default generator."""
    import torch

    from compress_ssl.pipeline.models import build

    torch.manual_seed(0)  # so that a teacher with random weights has the same weights in every run
    embedder = build(config.teacher, image_size=config.image_size, pretrained_default=True)
    return embedder.enable_outputs(parse_outputs(config.keep))


def fill(
    config: Config,
    store: "FeatureStore",
    work: "ExportWorker | DaskExport",
    device: str,
    lease: "Lease",
    other: "FeatureStore | None",
) -> dict[str, Any]:
    """Compute the pending shards of the store, then verify that the images did not change meanwhile.

    Args:
        work: What computes shards.
        device: Name of the device, or the scheduler, for the log and the history of the store.
        lease: The lease on the store; losing it stops the computation.
        other: The store given by --like, or None.

    Returns the result of `finish`. Raises Interrupted after a signal, UserError if shards failed or images changed.
    """
    from compress_ssl.pipeline.extraction.provenance import history_event
    from compress_ssl.pipeline.extraction.worker import require_no_failures
    from compress_ssl.pipeline.store.compatibility import require_unchanged

    width, pending = store.export.width, store.pending()
    rows = sum(shard.stop - shard.start for shard in pending)
    echo(f"{rows} of {store.images} images to embed, {store.views} views, on {device}, {width} dimensions")
    with StopRequest() as stop, progress_bar("export", store.images, "images", store.images - rows) as bar:

        def should_stop() -> bool:
            return stop.requested or lease.lost

        if store.untrained():
            echo(f"training {config.codec} on a sample of the images")
            work.train_codebooks(should_stop)
        cost = work.compute(pending, bar.advance, should_stop)
        lease.check()
        store.append_history(history_event(cost, device))
        left = len(store.pending())
        stop.check(f"{len(pending) - left} of {len(pending)} pending shards are kept; repeat the command to continue")
    require_no_failures(work.failed, len(pending))
    made = finish(
        store,
        f"{config.out}: {store.images} images x {store.views} views x {width} {config.codec}, "
        f"{format_duration(cost.seconds)}, {cost.views / max(cost.seconds, 1e-9):.0f} views/s",
        other,
    )
    if isinstance(store.storage, Folder):
        store.storage.sweep()  # unfinished files of workers that were killed
    now = open_images(config.data, config.limit)
    require_its_images(config, now)
    require_unchanged(store, now)
    return made


def store_settings(config: Config) -> "StoreSettings":
    """The settings that the manifest of the store records."""
    from compress_ssl.pipeline.extraction.store_record import StoreSettings

    return StoreSettings(
        data=config.data,
        limit=config.limit,
        teacher=config.teacher,
        outputs=parse_outputs(config.keep),
        views=config.views,
        local_views=config.local_views,
        local_size=config.local_size,
        codec=config.codec,
        batch_size=config.batch_size,
        precision=config.precision,
        shard_rows=config.shard_size,
    )


def worker_settings(config: Config, store: "FeatureStore") -> "WorkerSettings":
    """The settings of the dask workers of this command. The store names images and teacher by absolute specs."""
    from compress_ssl.pipeline.extraction.dask_worker import WorkerSettings, worker_threads

    return WorkerSettings(
        data=store.export.data.spec,
        limit=config.limit,
        teacher=store.export.teacher,
        store=absolute(config.out),
        outputs=parse_outputs(config.keep),
        device=config.device,
        precision=config.precision,
        batch_size=config.batch_size,
        workers=config.workers,
        threads=worker_threads(config.scheduler),
        command=secrets.token_hex(8),
    )


def adopt_view_settings(config: Config) -> tuple[Config, "FeatureStore | None"]:
    """With --like: the Config with the view settings of that store, and that store; otherwise (config, None).

    Raises UserError if --views, --policy or --seed were given and differ from that store.
    """
    if not config.like:
        return config, None
    from compress_ssl.pipeline.store.compatibility import view_settings_of
    from compress_ssl.pipeline.store.feature_store import FeatureStore

    other = FeatureStore(open_storage(config.like))
    defaults = {f.name: f.default for f in fields(Config)}
    given = {name: (getattr(config, name), defaults[name]) for name in ("views", "policy", "seed")}
    return replace(config, **view_settings_of(other, given)), other


def check(config: Config) -> None:
    """Raises UserError for every wrong setting that can be recognised before torch is imported."""
    require(
        config,
        {
            "views": POSITIVE,
            "batch_size": POSITIVE,
            "image_size": POSITIVE,
            "workers": NOT_NEGATIVE,
            "shard_size": POSITIVE,
            "limit": POSITIVE,
            "local_views": NOT_NEGATIVE,
            "local_size": POSITIVE,
            "seed": (lambda x: 0 <= x < 2**64, "must be from 0 to 2**64 - 1"),
        },
    )
    build_codec(config.codec)
    parse_scheduler(config.scheduler)
    parse_outputs(config.keep)
    if config.policy == "none" and (config.views > 1 or config.local_views):
        given = f"--views {config.views}" if config.views > 1 else f"--local-views {config.local_views}"
        remedy = "--views 1" if config.views > 1 else "--local-views 0"
        raise UserError(f"--policy none defines only view 0, but {given} was given; use {remedy}")
    if config.local_size and not config.local_views:
        raise UserError(f"--local-size {config.local_size} was given without --local-views; add --local-views N")


def require_its_images(config: Config, dataset: "Dataset") -> None:
    """Raises Mismatch, with the difference, if the existing store was made from other images."""
    from compress_ssl.pipeline.store.feature_store import FeatureStore

    store = FeatureStore(open_storage(config.out))
    if dataset.fingerprint != store.identity.data.fingerprint:
        difference = dataset.describe_difference(store.table("sample_id"))
        raise artifact.Mismatch(
            f"{config.out} was made from other images than --data {config.data}: {difference}. "
            "Give the same images, choose another --out, or start from scratch with --overwrite"
        )


def finish(store: "FeatureStore", text: str, other: "FeatureStore | None") -> dict[str, Any]:
    """Check that the store is complete and agrees with `other`, write bad-images.tsv, and return the summary.

    Raises UserError if the store is incomplete, differs from `other`, or if no image could be decoded.
    """
    from compress_ssl.pipeline.extraction.provenance import report_bad_images

    store.require_complete()
    if other:
        from compress_ssl.pipeline.store.compatibility import require_same_contents

        require_same_contents(store, other)
        text += f"; the same pixels as {other.storage}"
    bad = report_bad_images(store)
    return {
        "summary": text + (f"; {bad} bad images" if bad else ""),
        "store": str(store.storage),
        "fingerprint": store.fingerprint,
        "images": store.images,
        "views": store.views,
        "bad_images": bad,
    }
