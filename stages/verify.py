"""`compress verify STORE`: every digest, then the live teacher against a sample of what is stored."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.config import POSITIVE, flag, one_of, require
from compress_ssl.pipeline.runtime.formatting import pluralize
from compress_ssl.pipeline.runtime.lease import require_free
from compress_ssl.pipeline.runtime.progress import echo, progress_bar
from compress_ssl.pipeline.runtime.storage import open_storage
from compress_ssl.pipeline.views import numbering
from compress_ssl.pipeline.views.numbering import LOCAL, view_name

if TYPE_CHECKING:
    import numpy as np

    from compress_ssl.pipeline.datasets.base import Dataset
    from compress_ssl.pipeline.store.feature_store import FeatureStore

LOSS = 0.001  # of cosine to the live feature, beyond the codec's: another device or precision passes, another view not
CONTROL_MARGIN = 5.0  # times as much below what the codec keeps as the right one, on average: a control's cosine
ROUNDING = 1e-6  # of a cosine in single precision
MIN_SAMPLE = 16  # images embedded again, if there are so many
SHOWN = 10  # damages listed by name


@dataclass(frozen=True)
class Config:
    """Check a store: every digest, then the live teacher against a sample of the stored features.

    --repair restores small files from their second copies and marks damaged shards, so that the
    command that made the store makes exactly those again.
    """

    store: str = flag(help="a feature store", place=True)
    data: str | None = flag(None, "the images, if they have moved since the export")
    teacher: str | None = flag(None, "the teacher, if its weights have moved since the export")
    sample: float = flag(0.001, "share of the images to embed again, at least 16 of them; 0 checks digests only")
    repair: bool = flag(False, "mend what can be mended")
    batch_size: int | None = flag(None, "images per forward (default: as exported)", short="-b")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1")
    precision: str | None = flag(None, "fp32, bf16, fp16 (default: as exported)")
    seed: int = flag(0, "of the sample")


def run(config: Config) -> dict[str, Any]:
    """Returns {"summary", "damaged", "mended", "cosine", ...}. Raises UserError if something is wrong."""
    require(config, {"batch_size": POSITIVE, "sample": (lambda x: 0 <= x <= 1, "must be from 0 to 1")})
    require(config, {"precision": one_of("fp32", "bf16", "fp16")})
    damaged, mended = digests(config)
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
    text = f"{config.store}: every digest is right" + (
        f", {pluralize(pending, 'row block')} pending" if pending else ""
    )
    if config.sample:
        live = compare(config, store)
        text += f"; {live['said']}"
        found |= live
    return {"summary": text, **found}


def digests(config: Config) -> tuple[list[str], list[str]]:
    """(what is damaged, what was mended), small files first: shards are read by way of them."""
    from compress_ssl.pipeline.store import integrity
    from compress_ssl.pipeline.store.feature_store import FeatureStore

    storage = open_storage(config.store)
    if config.repair:
        integrity.read_manifest(storage)  # first: only a store has a lease
        require_free(storage)
    damaged: list[str] = []
    mended: list[str] = []

    def note(damage: integrity.Damage) -> None:
        damaged.append(f"{damage.key}: {damage.what}")
        if len(damaged) <= SHOWN:
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


def compare(config: Config, store: "FeatureStore") -> dict[str, Any]:
    """Embed a sample of (i, v) again: cosine to the stored row, and to those of a wrong view and a wrong image.

    Raises UserError if pixels, weights or features are not what the store says.
    """
    import numpy as np

    from compress_ssl.pipeline.datasets.decode import GOOD
    from compress_ssl.pipeline.runtime import philox
    from compress_ssl.pipeline.store import source_images

    dataset, _ = source_images.open_store_images(store, config.data)  # the same pixels, before any arithmetic
    rows = np.flatnonzero(store.table("status") == GOOD)
    rows = rows[~np.isin(rows // store.rows, [shard.block for shard in store.pending()])]
    count = min(len(rows), max(MIN_SAMPLE, round(config.sample * store.images)))
    if not count:
        return {"said": "no row block is complete, so no feature was embedded again"}
    order = philox.permutation(config.seed, philox.PICK, 0, len(rows))
    rows = np.sort(rows[order[:count]])
    views = np.array(store.all_views)[philox.words(config.seed, philox.PICK, rows, 1, 1)[:, 0] % len(store.all_views)]
    if store.local and not np.any(views & numbering.LOCAL):
        views[0] = store.local[0]
    live, found = embed_again(config, store, dataset), Likeness(config, store)
    with progress_bar("live teacher", count, "images") as bar:
        for view in np.unique(views):
            mine = rows[views == view]
            again, stored = live(mine, int(view)), store.read_rows(array_of(int(view)), int(view), mine)
            kind, alike = store.codecs[array_of(int(view))], views_like(store, int(view))
            kept = kind.decode(*kind.encode(again))
            right, ideal = cosine(again, stored), cosine(again, kept)
            found.right.append(right)
            found.ideal.append(ideal)
            if len(alike) > 1:
                other = alike[(alike.index(view) + 1) % len(alike)]
                found.wrong_view.append(cosine(again, store.read_rows(array_of(other), other, mine)))
            if len(mine) > 1:
                found.wrong_image.append(cosine(again, np.roll(stored, 1, axis=0)))
            worst = int((right - ideal).argmin())
            if right[worst] < ideal[worst] - LOSS and not found.place:
                found.place = whereabouts(store, int(mine[worst]), int(view), again[worst], ideal[worst] - LOSS)
            found.exact += int((kept == stored).all(1).sum())
            bar.advance(len(mine))
    return judge(found)


@dataclass
class Likeness:
    """Cosines of live features to stored ones, an array per view: the claim, and two controls that must not fit."""

    config: Config
    store: "FeatureStore"
    right: list["np.ndarray"] = field(default_factory=list)
    ideal: list["np.ndarray"] = field(default_factory=list)  # of what the codec keeps of the live feature itself
    wrong_view: list["np.ndarray"] = field(default_factory=list)
    wrong_image: list["np.ndarray"] = field(default_factory=list)
    exact: int = 0  # rows equal to the bit
    place: str = ""  # where the first feature that does not fit lies instead


def array_of(view: int) -> str:
    """The array that holds a view's embedding."""
    return "local_embedding" if view & LOCAL else "embedding"


def views_like(store: "FeatureStore", view: int) -> Sequence[int]:
    """Numbers of all views, or of all local crops."""
    return store.local if view & LOCAL else store.stored_views


def whereabouts(store: "FeatureStore", row: int, view: int, feature: "np.ndarray", least: float) -> str:
    """Where in its row block a feature lies that is not where it should be; nothing if no cosine reaches `least`."""
    import numpy as np

    start, stop = store.span(row // store.rows)
    numbers = views_like(store, view)
    found = [cosine(feature[None], store.read(array_of(v), v, slice(start, stop))) for v in numbers]
    v, i = np.unravel_index(np.argmax(found), (len(numbers), stop - start))
    if found[v][i] < least:
        return ""
    there = view_name(numbers[int(v)])
    return f"that of (row {row}, {view_name(view)}) is stored as (row {start + i}, {there}): rows or views are mixed up"


def judge(found: Likeness) -> dict[str, Any]:
    """In words, and as numbers. Raises UserError if a row does not fit, or if the controls fit as well."""
    import numpy as np

    from compress_ssl.pipeline.runtime.device import choose_device

    config, right, ideal = found.config, np.concatenate(found.right), np.concatenate(found.ideal)
    parts = {"wrong_view": found.wrong_view, "wrong_image": found.wrong_image}
    controls = {name: float(np.concatenate(part).mean()) for name, part in parts.items() if part}
    stored_in = found.store.identity["precision"]
    now_in = config.precision or stored_in
    how = f"on {choose_device(config.device)} in {now_in}" + (
        "" if now_in == stored_in else f" (stored in {stored_in})"
    )
    scores = "".join(f", a {name.replace('_', ' ')} scores {score:.5f}" for name, score in controls.items())
    said = (
        f"{len(right)} features embedded again {how}: cosine {right.min():.5f} at least, {right.mean():.5f} on average"
        f"{scores}; {found.exact} equal to the bit"
    )
    if low := int((right < ideal - LOSS).sum()):
        arithmetic = "the pixels were checked first, so the arithmetic differs: another device, precision or version?"
        why = f"more than {LOSS} below what {found.store.identity['codec']} keeps it is not this teacher's feature"
        raise UserError(f"{config.store}: {low} of {said}; {why}: {found.place or arithmetic}")
    for name, score in controls.items():
        if ideal.mean() - score <= CONTROL_MARGIN * max(ROUNDING, ideal.mean() - right.mean()):
            raise UserError(
                f"{config.store}: {said}; a {name.replace('_', ' ')} fits nearly as well, so this proves nothing: the "
                "teacher hardly tells the images apart"
            )
    return {"said": said, "cosine": float(right.min()), **controls, "exact": found.exact, "how": how}


def cosine(a: "np.ndarray", b: "np.ndarray") -> "np.ndarray":
    """(n,) cosines of rows."""
    import numpy as np

    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / np.maximum(lengths, 1e-12)


def embed_again(
    config: Config, store: "FeatureStore", dataset: "Dataset"
) -> Callable[["np.ndarray", int], "np.ndarray"]:
    """(rows (n,), view) -> (n, D) features by the live teacher, in batches of the exported size."""
    import numpy as np

    from compress_ssl.pipeline.extraction.feature_extractor import FeatureExtractor
    from compress_ssl.pipeline.extraction.teacher import load_live_teacher
    from compress_ssl.pipeline.runtime.device import choose_device
    from compress_ssl.pipeline.views.augment import ViewSpec
    from compress_ssl.pipeline.views.loader import ViewDataset, ViewRequest

    identity, embedder = store.identity, load_live_teacher(store, config.teacher)
    batch = config.batch_size or identity["batch_size"]
    forward = FeatureExtractor(embedder, choose_device(config.device), config.precision or identity["precision"], batch)
    size, how = embedder.preprocessing.size, embedder.preprocessing.interpolation
    small = identity.get("local", {}).get("size", 0)
    view_dataset = ViewDataset(
        dataset, ViewSpec(**identity["views"]), store.table("view_key"), [(size, how)], [], [(small, how)]
    )
    content = store.table("content")

    def live(rows: "np.ndarray", view: int) -> "np.ndarray":
        out = []
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            wanted, none = np.full((len(part), 1), view), np.empty((len(part), 0), np.int64)
            view_batch = view_dataset.load(
                ViewRequest(part, none, wanted) if view & LOCAL else ViewRequest(part, wanted)
            )
            changed = np.flatnonzero((view_batch.content != content[part]) | (view_batch.status != 0))
            if len(changed):
                raise UserError(f"image {dataset.ids[int(part[changed[0]])]} changed since {config.store} was made")
            pixels = view_batch.local[0] if view & LOCAL else view_batch.pixels[0]
            out.append(forward(pixels[:, 0])["embedding"])
        return np.concatenate(out)

    return live
