"""`compress verify STORE`: every digest, then the live teacher against a sample of what is stored."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.artifact import UserError
from pipeline.config import POSITIVE, flag, one_of, require
from pipeline.progress import meter, say

if TYPE_CHECKING:
    import numpy as np

    from pipeline.datasets.base import Dataset
    from pipeline.store import FeatureStore

LOSS = 0.001  # of cosine to the live feature, beyond the codec's: another device or precision passes, another view not
SHOWN = 10  # damages listed by name


@dataclass(frozen=True)
class Config:
    """Check a store: every digest, then the live teacher against a sample of the stored features.

    --repair restores small files from their second copies and marks damaged shards, so that the
    export command that made the store computes exactly those again.
    """

    store: str = flag(help="a feature store", place=True)
    data: str | None = flag(None, "the images, if they have moved since the export")
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
            f"{config.store} is damaged in {len(damaged)} places ({'; '.join(damaged[:3])}); "
            "compress verify --repair mends small files and marks damaged shards"
        )
    from pipeline.bucket import open_storage
    from pipeline.store import FeatureStore

    store = FeatureStore(open_storage(config.store))
    pending = len(store.pending())
    if mended:
        text = f"{config.store}: {len(mended)} places mended"
        if pending:
            text += f"; {pending} row blocks are to be computed again: repeat the export-teacher command"
        return {"summary": text, "damaged": damaged, "mended": mended, "pending": pending}
    found = {"damaged": [], "mended": [], "pending": pending}
    text = f"{config.store}: every digest is right" + (f", {pending} row blocks are pending" if pending else "")
    if config.sample:
        live = compare(config, store)
        text += f"; {live['said']}"
        found |= live
    return {"summary": text, **found}


def digests(config: Config) -> tuple[list[str], list[str]]:
    """(what is damaged, what was mended), small files first: shards are read by way of them."""
    from pipeline import audit
    from pipeline.bucket import open_storage
    from pipeline.store import FeatureStore

    storage = open_storage(config.store)
    damaged: list[str] = []
    mended: list[str] = []

    def note(damage: audit.Damage) -> None:
        damaged.append(f"{damage.key}: {damage.what}")
        if len(damaged) <= SHOWN:
            say(f"damaged: {damaged[-1]}")
        if config.repair:
            damage.mend()
            mended.append(damage.key)

    for damage in audit.small_files(storage):
        note(damage)
    if damaged and not config.repair:
        return damaged, mended
    store = FeatureStore(storage)
    with meter("digests", len(store.done()), "row blocks") as bar:
        for damage in audit.shards(store, bar.advance):
            note(damage)
    return damaged, mended


def compare(config: Config, store: "FeatureStore") -> dict[str, Any]:
    """Embed a sample of (i, v) again: cosine to the stored row, and to a wrong view as a control.

    Raises UserError if pixels, weights or features are not what the store says.
    """
    import numpy as np

    from pipeline import philox
    from pipeline.images import GOOD

    dataset = open_images(config, store)
    rows = np.flatnonzero(store.table("status") == GOOD)
    count = min(len(rows), max(16, round(config.sample * store.images)))
    order = philox.permutation(config.seed, philox.PICK, 0, len(rows))
    rows = np.sort(rows[order[:count]])
    views = philox.words(config.seed, philox.PICK, rows, 1, 1)[:, 0].astype(np.int64) % store.views
    live = embed_again(config, store, dataset)
    right, wrong, ideal, exact, codec = [], [], [], 0, store.codecs["embedding"]
    with meter("live teacher", count, "images") as bar:
        for view in np.unique(views):
            mine = rows[views == view]
            again = live(mine, int(view))
            stored = store.read("embedding", int(view))[mine]
            other = store.read("embedding", int(view + 1) % store.views)[mine]
            right.append(cosine(again, stored))
            wrong.append(cosine(again, other))
            kept = codec.decode(*codec.encode(again))
            ideal.append(cosine(again, kept))
            exact += int((kept == stored).all(1).sum())
            bar.advance(len(mine))
    low = int((np.concatenate(right) < np.concatenate(ideal) - LOSS).sum())
    return judge(config, store, np.concatenate(right), np.concatenate(wrong), exact, low)


def judge(
    config: Config, store: "FeatureStore", right: "np.ndarray", wrong: "np.ndarray", exact: int, low: int
) -> dict[str, Any]:
    """In words, and as numbers; a control that scores as high as the claim proves nothing and is said."""
    control = f", a wrong view scores {wrong.mean():.4f}" if store.views > 1 else ""
    said = (
        f"{len(right)} features embedded again: cosine {right.min():.5f} at least, {right.mean():.5f} on average"
        f"{control}; {exact} equal to the bit"
    )
    if low:
        raise UserError(
            f"{config.store}: {low} of {said}; more than {LOSS} below what {store.identity['codec']} keeps, it is not "
            "this teacher on these pixels. The pixels were checked first, so the arithmetic differs: another device, "
            "precision or library version?"
        )
    return {"said": said, "cosine": float(right.min()), "wrong_view": float(wrong.mean()), "exact": exact}


def cosine(a: "np.ndarray", b: "np.ndarray") -> "np.ndarray":
    """(n,) cosines of rows."""
    import numpy as np

    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / np.maximum(lengths, 1e-12)


def open_images(config: Config, store: "FeatureStore") -> "Dataset":
    """The images of the store; that they look the same here comes before any arithmetic."""
    from pipeline.datasets import DATASETS
    from pipeline.model import Preprocessing
    from pipeline.pixels import require_same
    from pipeline.views import ViewSpec

    about = store.about["data"]
    dataset = DATASETS.order(config.data or about["spec"])
    dataset = dataset.subset(about["limit"]) if about["limit"] else dataset
    if dataset.fingerprint != store.identity["data"]["fingerprint"]:
        raise UserError(f"the images are not those of {config.store}: {dataset.unlike(store.table('sample_id'))}")
    preprocessing = Preprocessing.of(store.identity["teacher"]["preprocessing"])
    spec, keys = ViewSpec(**store.identity["views"]), store.table("view_key")
    require_same(store.about["pixels"], dataset, spec, preprocessing, keys, allow=False)
    return dataset


def embed_again(
    config: Config, store: "FeatureStore", dataset: "Dataset"
) -> Callable[["np.ndarray", int], "np.ndarray"]:
    """(rows (n,), view) -> (n, D) features by the live teacher, in batches of the exported size."""
    import numpy as np
    import torch

    from pipeline.device import choose
    from pipeline.embed import Forward
    from pipeline.loader import Eyes, Piece
    from pipeline.models import build
    from pipeline.views import ViewSpec

    identity = store.identity
    torch.manual_seed(0)
    size = identity["teacher"]["preprocessing"]["size"]
    embedder = build(store.about["teacher"], image_size=size, pretrained_default=True)
    if embedder.digest() != identity["teacher"]["weights"]:
        raise UserError(f"{store.about['teacher']} has other weights now than when {config.store} was made")
    batch = config.batch_size or identity["batch_size"]
    forward = Forward(embedder, choose(config.device), config.precision or identity["precision"], batch)
    how = embedder.preprocessing.interpolation
    eyes = Eyes(dataset, ViewSpec(**identity["views"]), store.table("view_key"), [(size, how)], [])
    content = store.table("content")

    def live(rows: "np.ndarray", view: int) -> "np.ndarray":
        out = []
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            sight = eyes.look(Piece(part, np.full((len(part), 1), view)))
            changed = np.flatnonzero((sight.content != content[part]) | (sight.status != 0))
            if len(changed):
                raise UserError(f"image {dataset.ids[int(part[changed[0]])]} changed since {config.store} was made")
            out.append(forward(sight.pixels[0][:, 0])["embedding"])
        return np.concatenate(out)

    return live
