"""Carry out the `Job` of an export: build the teacher, describe the store, compute what it lacks, check the result."""

import secrets
from dataclasses import dataclass, replace
from functools import partial

import torch

from compress_ssl.pipeline.datasets import open_images
from compress_ssl.pipeline.extraction.dask_worker import WorkerSettings, build_worker, worker_threads
from compress_ssl.pipeline.extraction.embed import store_source
from compress_ssl.pipeline.extraction.export_job import Job
from compress_ssl.pipeline.extraction.extract import LoaderSettings
from compress_ssl.pipeline.extraction.feature_extractor import FeatureExtractor
from compress_ssl.pipeline.extraction.provenance import history_event, report_bad_images
from compress_ssl.pipeline.extraction.store_record import describe_store
from compress_ssl.pipeline.extraction.teacher import build_teacher
from compress_ssl.pipeline.extraction.worker import DaskExport, ExportWorker, require_no_failures
from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.config import CommandResult
from compress_ssl.pipeline.runtime.device import choose_device, device_name, loader_workers
from compress_ssl.pipeline.runtime.formatting import format_duration
from compress_ssl.pipeline.runtime.lease import Lease, set_aside
from compress_ssl.pipeline.runtime.progress import echo, progress_bar
from compress_ssl.pipeline.runtime.records import to_json
from compress_ssl.pipeline.runtime.signals import StopRequest
from compress_ssl.pipeline.runtime.storage import Folder, absolute
from compress_ssl.pipeline.store import teacher_heads
from compress_ssl.pipeline.store.compatibility import (
    require_its_images,
    require_recorded_rendering,
    require_same_contents,
    require_same_views,
    require_unchanged,
)
from compress_ssl.pipeline.store.estimate import estimate
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.store.layout import Column
from compress_ssl.pipeline.store.records import StoreRecord

FLAGS = {
    "teacher.weights": "--teacher", "teacher.name": "--teacher", "teacher.width": "--teacher",
    "teacher.preprocessing.size": "--image-size", "views.policy": "--policy", "views.seed": "--seed",
    "codec": "--codec", "batch_size": "--batch-size", "precision": "--precision", "shard_rows": "--shard-size",
    "local.views": "--local-views", "local.size": "--local-size",
}  # fmt: skip
"""{entry of a store's identity: the flag that it comes from}."""


@dataclass(frozen=True)
class Plan:
    """A job with its teacher and the manifest of its store. Nothing is written yet."""

    job: Job
    device: torch.device  # of the teacher in this process
    embedder: Embedder
    record: StoreRecord

    @property
    def local(self) -> bool:
        """Whether shards are computed in this process."""
        return self.job.scheduler == "local"


def make_plan(job: Job) -> Plan:
    """Build the teacher and describe the store.

    Raises UserError for a device or teacher that cannot be had, and for a store that was begun with other settings.
    """
    device = choose_device(job.device if job.scheduler == "local" else "cpu")  # workers choose their own
    recorded = job.begun.identity.teacher.preprocessing if job.begun else None
    embedder = build_teacher(job.teacher, job.flags.image_size, recorded).enable_outputs(job.flags.outputs)
    record = describe_store(job, embedder)
    if job.like:
        require_same_views(record.identity, job.dataset, job.like)
        record = replace(record, about=replace(record.about, like=job.like.fingerprint))
    if job.begun:
        artifact.claim(job.storage, "store", to_json(record.identity), flags=FLAGS)
    return Plan(job, device, embedder, record)


def estimate_cost(plan: Plan) -> CommandResult:
    """The estimate that --dry-run prints."""
    views = plan.job.flags.views
    pending = plan.job.begun.pending(views) if plan.job.begun else None
    return estimate(plan.record.identity, views, plan.job.out, pending)


def export(plan: Plan) -> CommandResult:
    """Create or continue the store: compute the shards that it lacks. Returns the result of `finish`."""
    job, embedder, dataset = plan.job, plan.embedder, plan.job.dataset
    if job.begun:
        require_recorded_rendering(job.begun, dataset)
    elif job.overwrite:  # only after all checks have passed
        set_aside(job.out, "store")
    tables: dict[str, Column] = {"sample_id": dataset.ids, "label": dataset.label, "view_key": range(len(dataset))}
    with Lease(job.storage) as held:
        if job.begun:
            require_unchanged(FeatureStore(job.storage), dataset)  # as it is now that no other process writes
        heads = teacher_heads.head_files(embedder.head_tensors())
        store = FeatureStore.create(job.storage, plan.record, tables, heads)
        if store.pending():
            return fill(plan, store, held)
        return finish(job, store, f"{job.out} is complete already: {store.images} images, {store.views} views")


def make_worker(plan: Plan, store: FeatureStore) -> ExportWorker | DaskExport:
    """What computes shards: this process, or the workers of the scheduler."""
    job = plan.job
    if not plan.local:
        return DaskExport(job.scheduler, partial(build_worker, worker_settings(job, store)))
    flags = job.flags
    forward = FeatureExtractor(plan.embedder, plan.device, flags.precision, flags.batch_size, flags.outputs)
    loader = LoaderSettings(loader_workers(job.workers, plan.device))
    return ExportWorker(store, store_source(store, job.dataset, forward, loader))


def worker_settings(job: Job, store: FeatureStore) -> WorkerSettings:
    """The settings of the dask workers of this command. The store names images and teacher by absolute specs."""
    return WorkerSettings(
        data=store.export.data.spec,
        teacher=store.export.teacher,
        store=absolute(job.out),
        flags=job.flags,
        device=job.device,
        workers=job.workers,
        threads=worker_threads(job.scheduler),
        command=secrets.token_hex(8),
    )


def fill(plan: Plan, store: FeatureStore, lease: Lease) -> CommandResult:
    """Compute the pending shards of the store, then verify that the images did not change meanwhile.

    lease: that on the store; losing it stops the computation. Returns the result of `finish`. Raises Interrupted after
    a signal, UserError if shards failed or images changed.
    """
    job, work = plan.job, make_worker(plan, store)
    place = device_name(plan.device) if plan.local else job.scheduler
    width, pending = store.export.width, store.pending()
    rows = sum(shard.stop - shard.start for shard in pending)
    echo(f"{rows} of {store.images} images to embed, {store.views} views, on {place}, {width} dimensions")
    with StopRequest() as stop, progress_bar("export", store.images, "images", store.images - rows) as bar:

        def should_stop() -> bool:
            return stop.requested or lease.lost

        if store.untrained():
            echo(f"training {store.identity.codec} on a sample of the images")
            work.train_codebooks(should_stop)
        cost = work.compute(pending, bar.advance, should_stop)
        lease.check()
        store.append_history(history_event(cost, place))
        left = len(store.pending())
        stop.check(f"{len(pending) - left} of {len(pending)} pending shards are kept; repeat the command to continue")
    require_no_failures(work.failed, len(pending))
    made = finish(
        job,
        store,
        f"{job.out}: {store.images} images x {store.views} views x {width} {store.identity.codec}, "
        f"{format_duration(cost.seconds)}, {cost.views / max(cost.seconds, 1e-9):.0f} views/s",
    )
    if isinstance(store.storage, Folder):
        store.storage.sweep()  # unfinished files of workers that were killed
    now = open_images(job.data, job.flags.limit)
    require_its_images(store, now, job.data)
    require_unchanged(store, now)
    return made


def finish(job: Job, store: FeatureStore, text: str) -> CommandResult:
    """Check that the store is complete and agrees with that of --like, write bad-images.tsv, return the summary.

    Raises UserError if the store is incomplete, differs from the other one, or if no image could be decoded.
    """
    store.require_complete()
    if job.like:
        require_same_contents(store, job.like)
        text += f"; the same pixels as {job.like.storage}"
    bad = report_bad_images(store)
    return {
        "summary": text + (f"; {bad} bad images" if bad else ""),
        "store": str(store.storage),
        "fingerprint": store.fingerprint,
        "images": store.images,
        "views": store.views,
        "bad_images": bad,
    }
