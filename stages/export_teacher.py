"""`compress export-teacher`: embed every view of every image with the frozen teacher and store the features.

Each (i, v), image i in view v, is computed once: running the command again computes only what is missing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from compress_ssl.pipeline.datasets import open_images
from compress_ssl.pipeline.extraction.cluster import parse_scheduler
from compress_ssl.pipeline.extraction.export_job import DEFAULTS, Job, StoreFlags, resolve_flags
from compress_ssl.pipeline.models import MODELS, parse_outputs
from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.choices import Precision
from compress_ssl.pipeline.runtime.config import NOT_NEGATIVE, CommandResult, flag, require
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.storage import open_storage
from compress_ssl.pipeline.store.codecs import KNOWN, build_codec
from compress_ssl.pipeline.views.groups import ROOM
from compress_ssl.pipeline.views.policies import Policy

if TYPE_CHECKING:
    from compress_ssl.pipeline.store.feature_store import FeatureStore

# A store's manifest holds no larger number, see `store.records.MAX_EXTENT`.
STORABLE = (lambda x: 0 < x <= 2**40, "must be from 1 to 2**40")


@dataclass(frozen=True)
class Config:
    """Run the frozen teacher once over every view of a data set and store its features.

    Running the same command again resumes it; a larger --views adds views and recomputes nothing. Where a store has
    begun, a flag that is not given is what the store records.
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
    keep: str | None = flag(
        None,
        "The outputs of the teacher to store, separated by commas: embedding, projection, logits, regions. "
        f"Default: {DEFAULTS.keep}.",
        metavar="OUTPUTS",
    )
    codec: str | None = flag(
        None, f"The codec of the stored features: {KNOWN}. Default: {DEFAULTS.codec}.", metavar="CODEC"
    )
    limit: int | None = flag(
        None, "Use only this many images, evenly spread over the data set. Default: all.", metavar="N"
    )
    like: str | None = flag(
        None,
        "Take the view settings of this store, and require the same images. Default: the settings of this command.",
        metavar="STORE",
    )

    views: int | None = flag(
        None,
        f"Views per image. View 0 is the deterministic centre crop, the others are random. Default: {DEFAULTS.views}.",
        panel="Views",
    )
    policy: Policy | None = flag(
        None, f"The augmentation policy of the random views. Default: {DEFAULTS.policy}.", panel="Views"
    )
    image_size: int | None = flag(
        None, "Side of a view in pixels. Default: the input size of the teacher.", panel="Views", metavar="PIXELS"
    )
    local_views: int | None = flag(
        None,
        f"Small crops per image beside the views, stored in arrays of their own. Default: {DEFAULTS.local_views}.",
        panel="Views",
    )
    local_size: int | None = flag(
        None, "Side of a small crop in pixels. Default: 3/7 of a view's side, as 96 is of 224.", panel="Views",
        metavar="PIXELS",
    )  # fmt: skip
    seed: int | None = flag(None, f"Seed of the random views. Default: {DEFAULTS.seed}.", panel="Views")

    batch_size: int | None = flag(
        None, f"Images per forward pass on a device. Default: {DEFAULTS.batch_size}.", panel="Speed", short="-b"
    )
    workers: int | None = flag(
        None, "Loader processes. Default: one per core, at most 16; at most 4 if the model runs on the CPU.",
        panel="Speed", short="-j",
    )  # fmt: skip
    device: str = flag("auto", "Device of the teacher: auto, cpu, cuda or cuda:1.", panel="Speed", metavar="DEVICE")
    precision: Precision | None = flag(
        None, f"Arithmetic of the forward pass. Default: {DEFAULTS.precision}.", panel="Speed"
    )
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


def run(config: Config) -> CommandResult:
    """Compute the shards that the store lacks.

    Returns {"summary", "store", "fingerprint", "images", "views", "bad_images"}; with --dry-run, the estimate.
    Raises UserError for settings that are refused and for a folder that holds something else.
    """
    job = resolve(config)

    from compress_ssl.pipeline.extraction import export

    plan = export.make_plan(job)
    return export.estimate_cost(plan) if config.dry_run else export.export(plan)


def resolve(config: Config) -> Job:
    """Check the flags, read what an existing store records, and list the images.

    Raises UserError for every wrong setting, before torch is imported where the flags alone show it.
    """
    check(config)
    given = {f.name: getattr(config, f.name) for f in fields(StoreFlags) if getattr(config, f.name) is not None}
    storage = open_storage(config.out)
    anew = config.overwrite and artifact.replaceable(config.out, "store")
    has_begun = not anew and artifact.claimed(storage, "store") is not None
    if not has_begun and not config.like:
        check_together(resolve_flags(given, None))  # before a store or the images are opened
    begun = open_store(config.out) if has_begun else None
    like = open_like(config.like, given) if config.like else None
    flags = resolve_flags(given, begun, like)
    check_together(flags)
    job = Job(
        data=config.data,
        teacher=config.teacher,
        out=config.out,
        flags=flags,
        dataset=open_images(config.data, flags.limit),
        storage=storage,
        begun=begun,
        like=like,
        device=config.device,
        scheduler=config.scheduler,
        workers=config.workers,
        overwrite=config.overwrite,
    )
    if begun:
        from compress_ssl.pipeline.store.compatibility import require_its_images

        require_its_images(begun, job.dataset, config.data)
    return job


def open_store(where: str) -> "FeatureStore":
    """The store in a folder or at a URL."""
    from compress_ssl.pipeline.store.feature_store import FeatureStore

    return FeatureStore(open_storage(where))


def open_like(where: str, given: Mapping[str, object]) -> "FeatureStore":
    """The store of --like. Raises UserError if --views, --policy or --seed were given and differ from that store."""
    from compress_ssl.pipeline.store.compatibility import require_view_settings

    like = open_store(where)
    require_view_settings(like, {name: given[name] for name in ("views", "policy", "seed") if name in given})
    return like


def check(config: Config) -> None:
    """Raises UserError for every wrong flag that can be recognised by itself, before torch is imported."""
    require(
        config,
        {
            "views": (lambda x: 0 < x <= ROOM, f"must be from 1 to {ROOM}"),
            "batch_size": STORABLE,
            "image_size": STORABLE,
            "workers": NOT_NEGATIVE,
            "shard_size": STORABLE,
            "limit": STORABLE,
            "local_views": (lambda x: 0 <= x <= ROOM, f"must be from 0 to {ROOM}"),
            "local_size": STORABLE,
            "seed": (lambda x: 0 <= x < 2**64, "must be from 0 to 2**64 - 1"),
        },
    )
    if config.codec is not None:
        build_codec(config.codec)
    if config.keep is not None:
        parse_outputs(config.keep)
    parse_scheduler(config.scheduler)
    MODELS.parse(config.teacher)


def check_together(flags: StoreFlags) -> None:
    """Raises UserError for flags that contradict each other."""
    if flags.policy == "none" and (flags.views > 1 or flags.local_views):
        value = f"--views is {flags.views}" if flags.views > 1 else f"--local-views is {flags.local_views}"
        remedy = "--views 1" if flags.views > 1 else "--local-views 0"
        raise UserError(f"--policy none defines only view 0, but {value}; use {remedy}")
    if flags.local_size and not flags.local_views:
        raise UserError(f"--local-size is {flags.local_size}, but there are no local views; add --local-views N")
