"""`EncodedRows`: features of consecutive rows as a store keeps them, with the rows that cannot be used marked."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compress_ssl.pipeline.datasets.decode import GOOD, NOT_FINITE, REASONS
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.views.groups import group_of_array, view_name
from compress_ssl.pipeline.views.loader import ViewBatch, ViewRequest

Stored = tuple[np.ndarray, np.ndarray | None]
"""(values (n, V, ...) in the codec's type, their scales or None)."""


@dataclass
class EncodedRows:
    """n consecutive rows in all views of one shard."""

    stored: dict[str, Stored]  # by array
    status: np.ndarray  # (n,) uint8: datasets.decode.GOOD or a key of REASONS
    content: np.ndarray  # (n,) uint64: hashes of the images as stored
    bad: dict[int, str]  # {row of the store: why it cannot be used}


def encode_rows(
    store: FeatureStore,
    requests: Sequence[ViewRequest],
    view_batches: Sequence[ViewBatch],
    features: dict[str, np.ndarray],
) -> EncodedRows:
    """Encode features {array: float32 (n, V, ...)} of the requested rows.

    A row is marked as bad if one of its features is not finite or too large for the codec. Features of bad rows are
    set to 0, in `features` too.
    """
    status = np.concatenate([batch.status for batch in view_batches])
    content = np.concatenate([batch.content for batch in view_batches])
    bad: dict[int, str] = {}
    for batch in view_batches:
        bad |= batch.bad
    for name, values in features.items():
        _mark_not_finite(store, name, values, requests, status, bad)
    stored: dict[str, Stored] = {}
    for name, values in features.items():
        values[status != GOOD] = 0
        stored[name] = store.codecs[name].encode(values)
    return EncodedRows(stored, status, content, bad)


def _mark_not_finite(
    store: FeatureStore,
    name: str,
    values: np.ndarray,
    requests: Sequence[ViewRequest],
    status: np.ndarray,
    bad: dict[int, str],
) -> None:
    """Set `status` and `bad` of rows whose features (n, V, ...) in one array the codec cannot hold."""
    codec = store.codecs[name]
    views = requests[0].views[group_of_array(name).name]
    rows = np.concatenate([request.rows for request in requests])
    fits = (np.abs(values) <= codec.limit) & np.isfinite(values)  # the comparison alone lets infinity pass in float32
    fits = fits.all(tuple(range(2, values.ndim)))  # (n, V)
    for j in np.flatnonzero((status == GOOD) & ~fits.all(-1)):
        status[j] = NOT_FINITE
        view = views[0][np.flatnonzero(~fits[j])[0]]
        bad[int(rows[j])] = f"{REASONS[NOT_FINITE]} ({name}, {view_name(view)}, as {codec.name})"
