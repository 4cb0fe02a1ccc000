"""Dataset -> views -> frozen teacher -> feature store: each (i, v) once, ever."""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from compress_ssl.pipeline.extraction.cluster import parse_scheduler
from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.config import NOT_NEGATIVE, POSITIVE, flag, one_of, require
from compress_ssl.pipeline.runtime.formatting import format_duration
from compress_ssl.pipeline.runtime.progress import echo, progress_bar
from compress_ssl.pipeline.runtime.registry import did_you_mean
from compress_ssl.pipeline.runtime.signals import StopRequest
from compress_ssl.pipeline.runtime.storage import Folder, absolute, open_storage
from compress_ssl.pipeline.store.codecs import KNOWN, build_codec

if TYPE_CHECKING:
    from compress_ssl.pipeline.datasets.base import Dataset
    from compress_ssl.pipeline.extraction.cluster import Outcome
    from compress_ssl.pipeline.extraction.worker import DaskExport, ExportWorker
    from compress_ssl.pipeline.models.embedder import Embedder
    from compress_ssl.pipeline.runtime.lease import Lease
    from compress_ssl.pipeline.store.feature_store import FeatureStore
    from compress_ssl.pipeline.views.augment import ViewSpec


@dataclass(frozen=True)
class Config:
    """Run the frozen teacher once over every view of a data set and keep its embeddings.

    The same command again continues; a larger --views adds views and recomputes nothing.
    """

    data: str = flag(help="images: folder:PATH, digits, torchvision:NAME,root=DIR")
    teacher: str = flag(help="timm:NAME, torchvision:NAME, python:module:factory, torchscript:FILE, ...")
    out: str = flag(help="folder of the store, or s3://BUCKET/PREFIX, gs://, az://")
    views: int = flag(8, "views per image; view 0 is the plain one, the others are random")
    policy: str = flag("crop-flip", "what random views are: crop-flip, moco-v2, dino, none")
    image_size: int | None = flag(None, "side in pixels (default: the teacher's own)")
    local_views: int = flag(0, "small crops per image besides, kept in arrays of their own")
    local_size: int | None = flag(None, "their side in pixels (default: 3/7 of the views', as 96 is of 224)")
    seed: int = flag(0, "of the views")
    keep: str = flag("embedding", "what to keep of the teacher: embedding,projection,logits,regions")
    codec: str = flag("int8", f"how features are stored: {KNOWN}")
    batch_size: int = flag(64, "images per forward on a device", short="-b")
    workers: int | None = flag(None, "loader processes (default: one per core up to 16; 4 on CPU)", short="-j")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1")
    precision: str = flag("fp32", "fp32, bf16, fp16")
    scheduler: str = flag("local", "local, processes:N, or a dask scheduler at tcp://HOST:PORT")
    shard_size: int | None = flag(None, "rows per shard (default: up to 2048, fewer in small sets)")
    limit: int | None = flag(None, "only this many images, evenly spread")
    like: str | None = flag(None, "a store to agree with: its views, and checked to be of the same images")
    dry_run: bool = flag(False, "say what would be done and what it would cost")
    overwrite: bool = flag(False, "start anew; an earlier store is set aside, not deleted")


def run(config: Config) -> dict[str, Any]:
    """Export what is pending. Returns {"summary", "store", "fingerprint", ...}."""
    check(config)
    from compress_ssl.pipeline.models import MODELS

    MODELS.parse(config.teacher)
    config, other = adopt_view_settings(config)
    check(config)
    storage = open_storage(config.out)
    anew = config.overwrite and artifact.replaceable(config.out, "store")
    earlier = None if anew else artifact.claimed(storage, "store")
    dataset = open_images(config)
    if earlier:
        require_its_images(config, earlier, dataset)

    import torch

    from compress_ssl.pipeline.extraction.feature_extractor import FeatureExtractor
    from compress_ssl.pipeline.extraction.worker import ExportWorker
    from compress_ssl.pipeline.models import build
    from compress_ssl.pipeline.runtime import lease
    from compress_ssl.pipeline.runtime.device import choose_device, device_name
    from compress_ssl.pipeline.store import teacher_heads
    from compress_ssl.pipeline.store.compatibility import require_same_views, require_unchanged
    from compress_ssl.pipeline.store.feature_store import FeatureStore
    from compress_ssl.pipeline.store.render_probe import require_same_rendering
    from compress_ssl.pipeline.views.augment import ViewSpec

    local = config.scheduler == "local"
    device = choose_device(config.device if local else "cpu")  # of a cluster's workers each one chooses
    torch.manual_seed(0)  # a teacher with random weights is the same one every time
    embedder = build(config.teacher, image_size=config.image_size, pretrained_default=True).enable_outputs(
        outputs_to_keep(config)
    )
    ratio = other.identity["views"]["crop_ratio"] if other else embedder.preprocessing.crop_ratio
    spec = ViewSpec(config.policy, config.seed, ratio)
    identity, about = describe(config, dataset, embedder, spec)
    if other:
        require_same_views(identity, dataset, other)
        about["like"] = other.fingerprint
    if earlier:
        artifact.claim(storage, "store", identity)
    if config.dry_run:
        from compress_ssl.pipeline.store.estimate import estimate

        pending = FeatureStore(storage).pending(config.views) if earlier else None
        return estimate(identity, config.views, config.out, pending)

    if earlier:  # refuse before anything grows
        require_same_rendering(
            earlier["about"]["pixels"], dataset, spec, embedder.preprocessing, range(len(dataset)), allow=None
        )
    elif config.overwrite:  # only now, when nothing is refused
        lease.require_free(storage)
        if aside := artifact.move_aside(config.out, "store"):
            echo(f"set the earlier {config.out} aside as {aside}")
    tables = {"sample_id": dataset.ids, "label": dataset.label, "view_key": range(len(dataset))}
    with lease.Lease(storage) as held:
        if earlier:
            require_unchanged(FeatureStore(storage), dataset)
        store = FeatureStore.create(storage, identity, about, tables, teacher_heads.head_files(embedder.head_tensors()))
        if not store.pending():
            return finish(store, f"{config.out} is complete already: {store.images} images, {store.views} views", other)
        if not local:
            return fill(config, store, partial(dask_export, config, about), config.scheduler, held, other)
        forward = FeatureExtractor(embedder, device, config.precision, config.batch_size, outputs_to_keep(config))
        work = ExportWorker(store, dataset, spec, forward, config.workers)
        return fill(config, store, lambda _: work, device_name(device), held, other)


def fill(
    config: Config,
    store: "FeatureStore",
    place: Callable[[list["Outcome"]], "ExportWorker | DaskExport"],
    device: str,
    lease: "Lease",
    other: "FeatureStore | None",
) -> dict[str, Any]:
    """Compute what the store lacks, and say what was made. place: where, given the list that failed shards go to."""
    from compress_ssl.pipeline.extraction.provenance import history_event
    from compress_ssl.pipeline.store.compatibility import require_unchanged

    failed: list[Outcome] = []
    work, width, pending = place(failed), store.identity["teacher"]["width"], store.pending()
    rows = sum(shard.stop - shard.start for shard in pending)
    echo(f"{rows} of {store.images} images to embed, {store.views} views, on {device}, {width} dimensions")
    with StopRequest() as stop, progress_bar("export", store.images, "images", store.images - rows) as bar:

        def stopped() -> bool:
            return stop.requested or lease.lost

        if store.untrained():
            echo(f"training {config.codec} on a sample of the images")
            work.train_codebooks(stopped)
        cost = work.compute(pending, bar.advance, stopped)
        lease.check()
        store.append_history(history_event(cost, device))
        left = len(store.pending())
        stop.check(f"{len(pending) - left} of {len(pending)} pending shards are kept; repeat the command to continue")
    require_none(failed, len(pending))
    made = finish(
        store,
        f"{config.out}: {store.images} images x {store.views} views x {width} {config.codec}, "
        f"{format_duration(cost.seconds)}, {cost.views / max(cost.seconds, 1e-9):.0f} views/s",
        other,
    )
    if isinstance(store.storage, Folder):
        store.storage.sweep()  # what a lost worker left
    now = open_images(config)
    require_its_images(config, store.manifest, now)
    require_unchanged(store, now)
    return made


def dask_export(config: Config, about: Mapping[str, Any], failed: list["Outcome"]) -> "DaskExport":
    """The workers of --scheduler, each with a workshop of its own, made anew for every command."""
    from compress_ssl.pipeline.extraction.worker import DaskExport

    there = replace(config, data=about["data"]["spec"], teacher=about["teacher"], out=absolute(config.out))
    build = partial(build_worker, there, threads(config), secrets.token_hex(8))
    return DaskExport(config.scheduler, build, partial(record_failure, failed))


def record_failure(failed: list["Outcome"], outcome: "Outcome") -> None:
    """Remember a shard that failed after all tries; the others go on."""
    failed.append(outcome)
    echo(f"rows {outcome.task.start} to {outcome.task.stop - 1} failed: {outcome.error}")


def require_none(failed: list["Outcome"], pending: int) -> None:
    """Raises UserError, with the first one's reason, if shards failed."""
    if failed:
        first = failed[0]
        why = f"{type(first.error).__name__}: {' '.join(str(first.error).split())[:300]}"
        raise UserError(
            f"{len(failed)} of {pending} shards failed after all tries, the first is that of rows {first.task.start} "
            f"to {first.task.stop - 1} ({why}); the others are kept, repeat the command to try again"
        )


def threads(config: Config) -> int | None:
    """Of a model on this machine's CPU: workers take as many as `local`, for they decide its last bits."""
    import torch

    return torch.get_num_threads() if config.scheduler.startswith("processes") else None


@lru_cache(maxsize=1)
def build_worker(config: Config, threads: int | None, command: str) -> "ExportWorker":
    """The images, the store and the teacher, in this process and on its device; kept for one command's tasks."""
    import torch

    from compress_ssl.pipeline.extraction import cluster as scheduler
    from compress_ssl.pipeline.extraction.feature_extractor import FeatureExtractor
    from compress_ssl.pipeline.extraction.teacher import load_live_teacher
    from compress_ssl.pipeline.extraction.worker import ExportWorker
    from compress_ssl.pipeline.runtime.device import choose_device
    from compress_ssl.pipeline.store.feature_store import FeatureStore
    from compress_ssl.pipeline.views.augment import ViewSpec

    if threads:
        torch.set_num_threads(threads)
    dataset = open_images(config)
    store = FeatureStore(open_storage(config.out))
    device = choose_device(config.device)
    if device == torch.device("cuda"):  # worker k takes GPU k of those it sees
        device = torch.device("cuda", scheduler.worker_number() % torch.cuda.device_count())
    embedder = load_live_teacher(store, config.teacher)
    if dataset.fingerprint != store.identity["data"]["fingerprint"]:
        raise UserError(f"{config.data} holds other images on this worker than where the command was given")
    forward = FeatureExtractor(embedder, device, config.precision, config.batch_size, outputs_to_keep(config))
    return ExportWorker(store, dataset, ViewSpec(**store.identity["views"]), forward, config.workers)


def adopt_view_settings(config: Config) -> tuple[Config, "FeatureStore | None"]:
    """With --like: the Config with the other store's views, and that store."""
    if not config.like:
        return config, None
    from compress_ssl.pipeline.store.compatibility import view_settings_of
    from compress_ssl.pipeline.store.feature_store import FeatureStore

    other = FeatureStore(open_storage(config.like))
    usual = {f.name: f.default for f in fields(Config)}
    given = {name: (getattr(config, name), usual[name]) for name in ("views", "policy", "seed")}
    return replace(config, **view_settings_of(other, given)), other


def check(config: Config) -> None:
    """All that can be refused before torch is imported."""
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
            "precision": one_of("fp32", "bf16", "fp16"),
            "policy": one_of("crop-flip", "moco-v2", "dino", "none"),
        },
    )
    build_codec(config.codec)
    parse_scheduler(config.scheduler)
    outputs_to_keep(config)
    if config.policy == "none" and (config.views > 1 or config.local_views):
        asked = f"--views {config.views}" if config.views > 1 else f"--local-views {config.local_views}"
        raise UserError(f"--policy none has one view, the plain one, but {asked} was asked; use --views 1 alone")
    if config.local_size and not config.local_views:
        raise UserError(f"--local-size {config.local_size} is that of local views; say how many with --local-views")


def outputs_to_keep(config: Config) -> tuple[str, ...]:
    """The teacher's outputs to keep, the embedding first. Raises UserError for an unknown one."""
    from compress_ssl.pipeline.models.embedder import OUTPUTS

    names = [name.strip() for name in config.keep.split(",") if name.strip()]
    for name in names:
        if name not in OUTPUTS:
            hint = did_you_mean(name, OUTPUTS) or "."
            raise UserError(f"--keep {config.keep}: there is no output {name!r}{hint} Known: {', '.join(OUTPUTS)}")
    return tuple(dict.fromkeys(["embedding", *names]))


def arrays_of(config: Config, embedder: "Embedder") -> dict[str, list[int]]:
    """{array: shape of one (i, v)}: what is kept, and of local crops what is a vector."""
    arrays = {name: list(embedder.shapes[name]) for name in outputs_to_keep(config)}
    if config.local_views:
        arrays |= {f"local_{n}": arrays[n] for n in ("embedding", "projection") if n in arrays}
    return arrays


def open_images(config: Config) -> "Dataset":
    """The images as they are listed now."""
    from compress_ssl.pipeline.datasets import DATASETS

    dataset = DATASETS.build(config.data)
    return dataset.subset(config.limit) if config.limit else dataset


def require_its_images(config: Config, earlier: Mapping[str, Any], dataset: "Dataset") -> None:
    """Raises UserError, with what differs, if the store that is there was made from other images."""
    if dataset.fingerprint != earlier["identity"]["data"]["fingerprint"]:
        from compress_ssl.pipeline.store.feature_store import FeatureStore

        unlike = dataset.describe_difference(FeatureStore(open_storage(config.out)).table("sample_id"))
        raise artifact.Mismatch(
            f"{config.out} was made from other images than --data {config.data}: {unlike}. "
            "Give the same images, choose another --out, or start anew with --overwrite"
        )


def describe(
    config: Config, dataset: "Dataset", embedder: "Embedder", spec: "ViewSpec"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(identity, about) of the store's manifest: what it is, and what may change."""
    from compress_ssl.pipeline.datasets import DATASETS
    from compress_ssl.pipeline.models import MODELS
    from compress_ssl.pipeline.models.embedder import state_digest
    from compress_ssl.pipeline.store.render_probe import probe_digests
    from compress_ssl.pipeline.store.shards import shard_rows
    from compress_ssl.pipeline.views.render import default_local_size

    arrays, heads = arrays_of(config, embedder), embedder.head_tensors()
    kind = build_codec(config.codec)
    stored = {name: kind.shape(tuple(shape)) for name, shape in arrays.items()}
    rows = config.shard_size or shard_rows(len(dataset), config.batch_size, stored, kind.dtype.itemsize)
    identity: dict[str, Any] = {
        "data": {"fingerprint": dataset.fingerprint, "images": len(dataset)},
        "teacher": {
            "name": embedder.name,
            "weights": embedder.digest(),
            "width": embedder.width,
            "preprocessing": embedder.preprocessing.record(),
            **({"heads": state_digest(heads)} if heads else {}),
        },
        "views": spec.record(),
        "arrays": arrays,
        "codec": config.codec,
        "batch_size": config.batch_size,
        "precision": config.precision,
        "shard_rows": rows,
    }
    if config.local_views:
        side = config.local_size or default_local_size(embedder.preprocessing.size)
        embedder.require_size(side, "--local-size")
        identity["local"] = {"views": config.local_views, "size": side}
    about = {
        "data": {"spec": DATASETS.absolute_spec(config.data), "limit": config.limit},
        "teacher": MODELS.absolute_spec(config.teacher),
        "classes": list(dataset.classes),
        "views": config.views,
        "parameters": sum(p.numel() for p in embedder.backbone.parameters()),
        "pixels": probe_digests(dataset, spec, embedder.preprocessing),
    }
    return identity, about


def finish(store: "FeatureStore", text: str, other: "FeatureStore | None") -> dict[str, Any]:
    """Check that all is there and agrees with `other`, list what could not be used, and say what was made."""
    from compress_ssl.pipeline.extraction.provenance import write_bad_images

    store.require_complete()
    if other:
        from compress_ssl.pipeline.store.compatibility import require_same_contents

        require_same_contents(store, other)
        text += f"; the same pixels as {other.storage}"
    if bad := write_bad_images(store):
        first = "; ".join(f"{name}: {why}" for _, name, why in bad[:3])
        echo(f"{len(bad)} of {store.images} images could not be used (bad-images.tsv): {first}")
    if len(bad) == store.images:
        raise UserError(
            f"none of the {store.images} images could be used; the first is {bad[0][1]}: {bad[0][2]}. "
            "Mend the cause, then export again with --overwrite"
        )
    return {
        "summary": text + (f"; {len(bad)} bad images" if bad else ""),
        "store": str(store.storage),
        "fingerprint": store.fingerprint,
        "images": store.images,
        "views": store.views,
        "bad_images": len(bad),
    }
