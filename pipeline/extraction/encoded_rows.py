"""`EncodedRows`: features of consecutive rows as a store keeps them, with the rows that cannot be used marked."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from compress_ssl.pipeline.datasets.decode import GOOD, NOT_FINITE, REASONS
from compress_ssl.pipeline.extraction.extract import FeatureBatch
from compress_ssl.pipeline.store.codecs import Codec, Stored
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.views.groups import group_of_array, view_name


@dataclass
class EncodedRows:
    """n consecutive rows in all views of one shard."""

    stored: dict[str, Stored]  # by array
    status: np.ndarray  # (n,) uint8: datasets.decode.GOOD or a key of REASONS
    content: np.ndarray  # (n,) uint64: hashes of the images as stored
    bad: dict[int, str]  # {row of the store: why it cannot be used}


def encode_rows(store: FeatureStore, batch: FeatureBatch) -> EncodedRows:
    """Encode the features of a batch with the codecs of a store.

    A row is marked as bad if one of its features is not finite or too large for the codec. Features of bad rows are
    set to 0, in `batch` too.
    """
    # Global views first: the first array that does not fit is named in the done record.
    names = sorted(store.arrays, key=lambda name: group_of_array(name).first)
    codecs = {name: store.codecs[name] for name in names if name in batch.features}
    mark_not_finite(batch, codecs)
    stored: dict[str, Stored] = {}
    for name, codec in codecs.items():
        values = batch.features[name]
        values[batch.status != GOOD] = 0
        stored[name] = codec.encode(values)
    return EncodedRows(stored, batch.status, batch.content, batch.bad)


def mark_not_finite(batch: FeatureBatch, codecs: Mapping[str, Codec]) -> None:
    """Set `status` and `bad` of rows whose features in an array its codec cannot hold. codecs: {array: its codec}"""
    for name, codec in codecs.items():
        values = batch.features[name]
        fits = (np.abs(values) <= codec.limit) & np.isfinite(values)  # the comparison alone lets infinity pass
        fits = fits.all(tuple(range(2, values.ndim)))  # (n, V)
        for j in np.flatnonzero((batch.status == GOOD) & ~fits.all(-1)):
            batch.status[j] = NOT_FINITE
            view = int(batch.views[name][j][np.flatnonzero(~fits[j])[0]])
            batch.bad[int(batch.rows[j])] = f"{REASONS[NOT_FINITE]} ({name}, {view_name(view)}, as {codec.name})"
