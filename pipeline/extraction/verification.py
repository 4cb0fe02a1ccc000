"""A sample of a store's features, computed again by the live teacher and compared with the stored ones."""

from contextlib import closing
from dataclasses import asdict, dataclass, field

import numpy as np

from compress_ssl.pipeline.datasets.base import Dataset
from compress_ssl.pipeline.datasets.decode import GOOD
from compress_ssl.pipeline.extraction.embed import store_source
from compress_ssl.pipeline.extraction.extract import FeatureBatch, FeatureSource, LoaderSettings, extract
from compress_ssl.pipeline.extraction.feature_extractor import FeatureExtractor
from compress_ssl.pipeline.extraction.teacher import load_live_teacher
from compress_ssl.pipeline.runtime import philox
from compress_ssl.pipeline.runtime.device import choose_device
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.views.groups import group_of, view_name

MAX_COSINE_LOSS = 0.001  # beyond the codec's own loss. Another device or precision loses less, another view loses more
CONTROL_MARGIN = 5.0  # a control's mean cosine gap must be more than this many times the true one's
ROUNDING = 1e-6  # of a cosine in float32: the smallest gap that CONTROL_MARGIN multiplies
MIN_SAMPLE = 16  # images embedded again, or all of a smaller store: a share of 0.001 of few images would be none


@dataclass(frozen=True)
class Arithmetic:
    """How the live teacher computes: what may change the last bits of a feature."""

    batch_size: int  # images per forward pass
    device: str  # "auto", "cpu", "cuda", "cuda:1"
    precision: str  # a key of models.precision.PRECISIONS

    def describe(self, stored_precision: str) -> str:
        """Device and precision in words, with the precision of the stored features where that is another one."""
        text = f"on {choose_device(self.device)} in {self.precision}"
        return text if self.precision == stored_precision else f"{text} (stored in {stored_precision})"


@dataclass
class Comparison:
    """Cosines of live features to stored ones, one (n,) array per view, and to two controls that must be lower."""

    store: FeatureStore
    stored: list[np.ndarray] = field(default_factory=list)  # to the stored feature of the same (i, v)
    ideal: list[np.ndarray] = field(default_factory=list)  # to the live feature itself after the store's codec
    wrong_view: list[np.ndarray] = field(default_factory=list)  # control: to another view of the same image
    wrong_image: list[np.ndarray] = field(default_factory=list)  # control: to the same view of another image
    exact: int = 0  # features that equal the stored ones bit for bit
    place: str = ""  # where in the store the first feature that does not fit was found instead, as a sentence


@dataclass(frozen=True)
class Verdict:
    """What the comparison of a sample found. The numbers are None where nothing was compared."""

    said: str  # the result in words
    cosine: float | None = None  # of a live feature to the stored one: the lowest
    wrong_view: float | None = None  # mean cosine to another view of the same image
    wrong_image: float | None = None  # mean cosine to the same view of another image
    exact: int | None = None  # features that equal the stored ones bit for bit
    how: str | None = None  # the arithmetic in words, see `Arithmetic.describe`

    def record(self) -> dict[str, str | float]:
        """The entries that are known, as `compress verify` returns them."""
        return {name: value for name, value in asdict(self).items() if value is not None}


# ---------------------------------------------------------------- the sample


def select_sample(store: FeatureStore, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows (n,) in ascending order, one view (n,) for each), random by `seed`, of complete row blocks.

    share: of the store's images, from 0 to 1; at least MIN_SAMPLE images are selected if there are as many.
    """
    rows = np.flatnonzero(store.table("status") == GOOD)
    rows = rows[~np.isin(rows // store.rows, [shard.block for shard in store.pending()])]
    count = min(len(rows), max(MIN_SAMPLE, round(share * store.images)))
    if not count:
        return rows, rows
    order = philox.permutation(seed, philox.PICK, 0, len(rows))
    rows = np.sort(rows[order[:count]])
    views = np.array(store.all_views)[philox.words(seed, philox.PICK, rows, 1, 1)[:, 0] % len(store.all_views)]
    for number, group in enumerate(store.groups[1:]):  # at least one view of each group is in the sample
        if not np.any(np.isin(views, group.numbers)):
            views[number % count] = group.numbers[0]
    return rows, views


# ---------------------------------------------------------------- comparing


def compare_view(comparison: Comparison, view: int, rows: np.ndarray, live: np.ndarray) -> None:
    """Add one view: live (n, D) features of these rows (n,), compared with the stored ones and the two controls."""
    store, group = comparison.store, group_of(view, comparison.store.groups)
    array, others = group.array("embedding"), group.numbers
    stored, codec = store.read_rows(array, view, rows), store.codecs[array]
    decoded = codec.decode(*codec.encode(live))  # what a right store would hold
    cosines, ideal = cosine(live, stored), cosine(live, decoded)
    comparison.stored.append(cosines)
    comparison.ideal.append(ideal)
    if len(others) > 1:
        other = others[(others.index(view) + 1) % len(others)]
        comparison.wrong_view.append(cosine(live, store.read_rows(array, other, rows)))
    if len(rows) > 1:
        comparison.wrong_image.append(cosine(live, np.roll(stored, 1, axis=0)))
    worst = int((cosines - ideal).argmin())
    least = ideal[worst] - MAX_COSINE_LOSS
    if cosines[worst] < least and not comparison.place:
        comparison.place = locate_feature(store, int(rows[worst]), view, live[worst], least)
    comparison.exact += int((decoded == stored).all(1).sum())


def locate_feature(store: FeatureStore, row: int, view: int, feature: np.ndarray, least: float) -> str:
    """A sentence about where in its row block a feature (D,) is stored; "" if no stored cosine reaches `least`."""
    start, stop = store.span(row // store.rows)
    group = group_of(view, store.groups)
    array, views = group.array("embedding"), group.numbers
    cosines = [cosine(feature[None], store.read(array, v, slice(start, stop))) for v in views]
    v, i = np.unravel_index(np.argmax(cosines), (len(views), stop - start))
    if cosines[v][i] < least:
        return ""
    there = view_name(views[int(v)])
    return f"that of (row {row}, {view_name(view)}) is stored as (row {start + i}, {there}): rows or views are mixed up"


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n,) cosines of the rows of a (n, D) or (1, D) and b (n, D)."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines: np.ndarray = (a * b).sum(1) / np.maximum(lengths, 1e-12)  # a row of zeros has cosine 0, not NaN
    return cosines


# ---------------------------------------------------------------- the verdict


def judge(comparison: Comparison, how: str) -> Verdict:
    """Say how well the stored features fit. how: the arithmetic in words, see `Arithmetic.describe`.

    Raises UserError if a feature does not fit, or if a control fits nearly as well as the stored features do.
    """
    stored, ideal = np.concatenate(comparison.stored), np.concatenate(comparison.ideal)
    parts = {"wrong_view": comparison.wrong_view, "wrong_image": comparison.wrong_image}
    controls = {name: float(np.concatenate(part).mean()) for name, part in parts.items() if part}
    scores = "".join(f", a {name.replace('_', ' ')} scores {score:.5f}" for name, score in controls.items())
    said = (
        f"{len(stored)} features embedded again {how}: cosine {stored.min():.5f} at least, {stored.mean():.5f} on "
        f"average{scores}; {comparison.exact} equal to the bit"
    )
    _require_fit(comparison, int((stored < ideal - MAX_COSINE_LOSS).sum()), said)
    gap = max(ROUNDING, ideal.mean() - stored.mean())
    for name, score in controls.items():
        if ideal.mean() - score <= CONTROL_MARGIN * gap:
            raise UserError(
                f"{comparison.store.storage}: {said}; a {name.replace('_', ' ')} fits nearly as well, so this proves "
                "nothing: the teacher's features of different images or views are nearly the same; check the teacher "
                "and its weights"
            )
    return Verdict(said, float(stored.min()), exact=comparison.exact, how=how, **controls)


def _require_fit(comparison: Comparison, low: int, said: str) -> None:
    """Raise UserError if `low` features, more than none, do not fit. said: all that was found, in words."""
    if not low:
        return
    store = comparison.store
    arithmetic = "the pixels were checked first, so the arithmetic differs: another device, precision or version?"
    why = f"more than {MAX_COSINE_LOSS} below what {store.identity.codec} keeps it is not this teacher's feature"
    raise UserError(f"{store.storage}: {low} of {said}; {why}: {comparison.place or arithmetic}")


# ---------------------------------------------------------------- live features


@dataclass(frozen=True)
class LiveTeacher:
    """The teacher of a store, built again, over the views that the store holds."""

    store: FeatureStore
    source: FeatureSource
    content: np.ndarray  # (N,) uint64: hashes of the images as exported


def build_live_teacher(
    store: FeatureStore, dataset: Dataset, teacher: str | None, arithmetic: Arithmetic
) -> LiveTeacher:
    """teacher: its spec if its weights have moved since the export. Raises UserError if its weights are others."""
    embedder, device = load_live_teacher(store, teacher), choose_device(arithmetic.device)
    extractor = FeatureExtractor(embedder, device, arithmetic.precision, arithmetic.batch_size)
    return LiveTeacher(store, store_source(store, dataset, extractor, LoaderSettings()), store.table("content"))


def embed_again(live: LiveTeacher, rows: np.ndarray, view: int) -> np.ndarray:
    """(n, D) features of rows (n,) in one view by the live teacher.

    Raises UserError for an image whose content is not the exported one.
    """
    features = []
    with closing(extract(live.source, live.source.batches(rows, [view]))) as feature_batches:
        for batch in feature_batches:
            _require_exported_images(live, batch)
            features.append(batch.features[group_of(view).array("embedding")][:, 0].copy())
    return np.concatenate(features)


def _require_exported_images(live: LiveTeacher, batch: FeatureBatch) -> None:
    changed = np.flatnonzero((batch.content != live.content[batch.rows]) | (batch.status != GOOD))
    if len(changed):
        name = live.source.views.dataset.ids[int(batch.rows[changed[0]])]
        raise UserError(
            f"image {name} changed since {live.store.storage} was made; restore it, or export these images to another "
            "store"
        )
