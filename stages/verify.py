"""`compress verify STORE`: checks every digest, then embeds a sample again and compares it with the stored features."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress_ssl.pipeline.runtime.choices import Precision
from compress_ssl.pipeline.runtime.config import POSITIVE, CommandResult, flag, require
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.formatting import pluralize
from compress_ssl.pipeline.runtime.lease import require_free
from compress_ssl.pipeline.runtime.progress import echo, progress_bar
from compress_ssl.pipeline.runtime.storage import open_storage

if TYPE_CHECKING:
    from compress_ssl.pipeline.extraction.verification import Verdict
    from compress_ssl.pipeline.store.feature_store import FeatureStore

MAX_LISTED = 10  # damaged places that are printed by name


@dataclass(frozen=True)
class Config:
    """Check a store: every digest, then the live teacher against a sample of the stored features.

    --repair restores small files from their second copies and marks damaged shards as missing, so that
    repeating the command that made the store computes exactly those again.
    """

    store: str = flag(help="A feature store: a folder or a URL.", metavar="STORE", place=True)
    data: str | None = flag(
        None, "The images, if they have moved since the export. Default: where the store says they are.", metavar="SPEC"
    )
    teacher: str | None = flag(
        None, "The teacher, if its weights have moved since the export. Default: as the store says.", metavar="SPEC"
    )
    sample: float = flag(
        0.001, "The share of the images to embed again, at least 16 of them; 0 checks digests only.", metavar="SHARE"
    )
    seed: int = flag(0, "Seed that selects the sample.")
    repair: bool = flag(False, "Restore small files, and mark damaged shards to be computed again.")

    batch_size: int | None = flag(None, "Images per forward pass. Default: as exported.", panel="Speed", short="-b")
    device: str = flag("auto", "Device of the teacher: auto, cpu, cuda or cuda:1.", panel="Speed", metavar="DEVICE")
    precision: Precision | None = flag(None, "Arithmetic of the teacher. Default: as exported.", panel="Speed")


def run(config: Config) -> CommandResult:
    """Returns {"summary", "damaged", "mended", "pending"}, and with a sample the record of `verification.Verdict`.

    Raises UserError if the store is damaged and --repair is not given, or if stored features do not fit the teacher.
    """
    require(config, {"batch_size": POSITIVE, "sample": (lambda x: 0 <= x <= 1, "must be from 0 to 1")})
    damaged, mended = check_digests(config)
    if damaged and not config.repair:
        raise UserError(
            f"{config.store} is damaged in {pluralize(len(damaged), 'place')} ({'; '.join(damaged[:3])}); "
            "compress verify --repair mends small files and marks damaged shards"
        )
    from compress_ssl.pipeline.store.feature_store import FeatureStore

    store = FeatureStore(open_storage(config.store))
    pending = len(store.pending())
    if mended:
        text = f"{config.store}: {pluralize(len(mended), 'place')} mended"
        if pending:
            text += f"; {pluralize(pending, 'row block')} to be computed again: repeat the command that made it"
        return {"summary": text, "damaged": damaged, "mended": mended, "pending": pending}
    found = {"damaged": [], "mended": [], "pending": pending}
    text = f"{config.store}: every digest is right"
    if pending:
        text += f", {pluralize(pending, 'row block')} pending"
    if config.sample:
        verdict = compare_sample(config, store)
        text += f"; {verdict.said}"
        found |= verdict.record()
    return {"summary": text, **found}


# ---------------------------------------------------------------- digests


def check_digests(config: Config) -> tuple[list[str], list[str]]:
    """(damaged places, repaired places). Small files are checked first, because they are needed to find the shards.

    Without --repair the shards are not checked if a small file is damaged.
    """
    from compress_ssl.pipeline.store import integrity
    from compress_ssl.pipeline.store.feature_store import FeatureStore

    storage = open_storage(config.store)
    if config.repair:
        integrity.read_manifest(storage)  # before the lease: another kind of folder has none, and is refused here
        require_free(storage)
    damaged: list[str] = []
    mended: list[str] = []

    def note(damage: integrity.Damage) -> None:
        damaged.append(f"{damage.key}: {damage.what}")
        if len(damaged) <= MAX_LISTED:
            echo(f"damaged: {damaged[-1]}")
        if config.repair:
            damage.repair()
            mended.append(damage.key)

    for damage in integrity.check_small_files(storage):
        note(damage)
    if damaged and not config.repair:
        return damaged, mended
    store = FeatureStore(storage)
    with progress_bar("digests", len(store.done()), "row blocks") as bar:
        for damage in integrity.check_shards(store, bar.advance):
            note(damage)
    return damaged, mended


# ---------------------------------------------------------------- the live teacher


def compare_sample(config: Config, store: "FeatureStore") -> "Verdict":
    """Embed a sample of (i, v) again and compare it with the store.

    Raises UserError if the pixels, the weights or the features are not those of the export.
    """
    import numpy as np

    from compress_ssl.pipeline.extraction import verification
    from compress_ssl.pipeline.store import source_images

    # The pixels are checked before any arithmetic, so that `judge` may name the arithmetic as the cause.
    dataset = source_images.open_store_images(store, config.data)
    rows, views = verification.select_sample(store, config.sample, config.seed)
    if not len(rows):
        return verification.Verdict("no row block is complete, so no feature was embedded again")
    exported = store.identity
    # Those of the export by default: another batch size or precision may change the last bits of a feature.
    arithmetic = verification.Arithmetic(
        config.batch_size or exported.batch_size, config.device, config.precision or exported.precision
    )
    live = verification.build_live_teacher(store, dataset, config.teacher, arithmetic)
    comparison = verification.Comparison(store)
    with progress_bar("live teacher", len(rows), "images") as bar:
        for view in np.unique(views).tolist():
            of_view = rows[views == view]
            features = verification.embed_again(live, of_view, view)
            verification.compare_view(comparison, view, of_view, features)
            bar.advance(len(of_view))
    return verification.judge(comparison, arithmetic.describe(exported.precision))
