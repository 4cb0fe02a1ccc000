"""A sample of a store's features, computed again by the live teacher and compared with the stored ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from compress_ssl.pipeline.datasets.base import Dataset
from compress_ssl.pipeline.datasets.decode import GOOD
from compress_ssl.pipeline.extraction.feature_extractor import FeatureExtractor
from compress_ssl.pipeline.extraction.teacher import load_live_teacher
from compress_ssl.pipeline.runtime import philox
from compress_ssl.pipeline.runtime.device import choose_device
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.views.loader import ViewDataset, ViewRequest
from compress_ssl.pipeline.views.numbering import LOCAL, view_name

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
    location: str  # of the store, as error messages name it
    stored: list[np.ndarray] = field(default_factory=list)  # to the stored feature of the same (i, v)
    ideal: list[np.ndarray] = field(default_factory=list)  # to the live feature itself after the store's codec
    wrong_view: list[np.ndarray] = field(default_factory=list)  # control: to another view of the same image
    wrong_image: list[np.ndarray] = field(default_factory=list)  # control: to the same view of another image
    exact: int = 0  # features that equal the stored ones bit for bit
    place: str = ""  # where in the store the first feature that does not fit was found instead, as a sentence


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
    if store.local and not np.any(views & LOCAL):
        views[0] = store.local[0]  # a store with local crops has at least one of them in the sample
    return rows, views


def compare_view(comparison: Comparison, view: int, rows: np.ndarray, live: np.ndarray) -> None:
    """Add one view: live (n, D) features of these rows (n,), compared with the stored ones and the two controls."""
    store, array = comparison.store, array_name(view)
    stored, codec = store.read_rows(array, view, rows), store.codecs[array]
    decoded = codec.decode(*codec.encode(live))  # what a right store would hold
    cosines, ideal = cosine(live, stored), cosine(live, decoded)
    comparison.stored.append(cosines)
    comparison.ideal.append(ideal)
    group = views_of_group(store, view)
    if len(group) > 1:
        other = group[(group.index(view) + 1) % len(group)]
        comparison.wrong_view.append(cosine(live, store.read_rows(array_name(other), other, rows)))
    if len(rows) > 1:
        comparison.wrong_image.append(cosine(live, np.roll(stored, 1, axis=0)))
    worst = int((cosines - ideal).argmin())
    least = ideal[worst] - MAX_COSINE_LOSS
    if cosines[worst] < least and not comparison.place:
        comparison.place = locate_feature(store, int(rows[worst]), view, live[worst], least)
    comparison.exact += int((decoded == stored).all(1).sum())


def array_name(view: int) -> str:
    """The name of the array that holds a view's embedding."""
    return "local_embedding" if view & LOCAL else "embedding"


def views_of_group(store: FeatureStore, view: int) -> Sequence[int]:
    """The numbers of all stored views of this view's kind: all local crops for a local crop, else all other views."""
    return store.local if view & LOCAL else store.stored_views


def locate_feature(store: FeatureStore, row: int, view: int, feature: np.ndarray, least: float) -> str:
    """A sentence about where in its row block a feature (D,) is stored; "" if no stored cosine reaches `least`."""
    start, stop = store.span(row // store.rows)
    views = views_of_group(store, view)
    cosines = [cosine(feature[None], store.read(array_name(v), v, slice(start, stop))) for v in views]
    v, i = np.unravel_index(np.argmax(cosines), (len(views), stop - start))
    if cosines[v][i] < least:
        return ""
    there = view_name(views[int(v)])
    return f"that of (row {row}, {view_name(view)}) is stored as (row {start + i}, {there}): rows or views are mixed up"


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n,) cosines of the rows of a (n, D) or (1, D) and b (n, D)."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / np.maximum(lengths, 1e-12)  # a row of zeros has cosine 0, not NaN


def judge(comparison: Comparison, how: str) -> dict[str, Any]:
    """{"said": the result in words, "cosine": the lowest, "wrong_view", "wrong_image": means, "exact", "how"}.

    how: the arithmetic in words, see `Arithmetic.describe`.

    Raises UserError if a feature does not fit, or if a control fits nearly as well as the stored features do.
    """
    store = comparison.store
    stored, ideal = np.concatenate(comparison.stored), np.concatenate(comparison.ideal)
    parts = {"wrong_view": comparison.wrong_view, "wrong_image": comparison.wrong_image}
    controls = {name: float(np.concatenate(part).mean()) for name, part in parts.items() if part}
    scores = "".join(f", a {name.replace('_', ' ')} scores {score:.5f}" for name, score in controls.items())
    said = (
        f"{len(stored)} features embedded again {how}: cosine {stored.min():.5f} at least, {stored.mean():.5f} on "
        f"average{scores}; {comparison.exact} equal to the bit"
    )
    low = int((stored < ideal - MAX_COSINE_LOSS).sum())
    if low:
        arithmetic = "the pixels were checked first, so the arithmetic differs: another device, precision or version?"
        why = f"more than {MAX_COSINE_LOSS} below what {store.identity.codec} keeps it is not this teacher's feature"
        raise UserError(f"{comparison.location}: {low} of {said}; {why}: {comparison.place or arithmetic}")
    gap = max(ROUNDING, ideal.mean() - stored.mean())
    for name, score in controls.items():
        if ideal.mean() - score <= CONTROL_MARGIN * gap:
            raise UserError(
                f"{comparison.location}: {said}; a {name.replace('_', ' ')} fits nearly as well, so this proves "
                "nothing: the teacher's features of different images or views are nearly the same; check the teacher "
                "and its weights"
            )
    return {"said": said, "cosine": float(stored.min()), **controls, "exact": comparison.exact, "how": how}


def embed_again(
    store: FeatureStore, location: str, dataset: Dataset, teacher: str | None, arithmetic: Arithmetic
) -> Callable[[np.ndarray, int], np.ndarray]:
    """Build a function (rows (n,), view) -> (n, D) features by the live teacher, in batches of one size.

    location: of the store, as error messages name it. teacher: its spec if its weights have moved since the export.
    A smaller batch is padded, because another size may change the last bits of a feature. The function raises UserError
    for an image whose content is not the exported one.
    """
    embedder = load_live_teacher(store, teacher)
    batch = arithmetic.batch_size
    forward = FeatureExtractor(embedder, choose_device(arithmetic.device), arithmetic.precision, batch)
    size, interpolation = embedder.preprocessing.size, embedder.preprocessing.interpolation
    local_size = store.identity.local_size
    view_dataset = ViewDataset(
        dataset,
        store.identity.views,
        store.table("view_key"),
        [(size, interpolation)],
        [],
        [(local_size, interpolation)],
    )
    content = store.table("content")  # (N,) hashes of the images as exported

    def live(rows: np.ndarray, view: int) -> np.ndarray:
        out = []
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            wanted, none = np.full((len(part), 1), view), np.empty((len(part), 0), np.int64)
            request = ViewRequest(part, none, wanted) if view & LOCAL else ViewRequest(part, wanted)
            view_batch = view_dataset.load(request)
            changed = np.flatnonzero((view_batch.content != content[part]) | (view_batch.status != 0))
            if len(changed):
                raise UserError(
                    f"image {dataset.ids[int(part[changed[0]])]} changed since {location} was made; restore it, or "
                    "export these images to another store"
                )
            pixels = view_batch.local[0] if view & LOCAL else view_batch.pixels[0]  # (B, 1, 3, S, S) uint8
            out.append(forward(pixels[:, 0])["embedding"])
        return np.concatenate(out)

    return live
