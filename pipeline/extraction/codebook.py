"""Codebooks: codecs that must be trained are trained once per store, before its first shard, on a sample of the images.

The sample is spread evenly over the rows, because images in folders are sorted by class. Its views are the same for
any number of views of the store, so that a store to which views were added has the same codebook as one made with all
views at once.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np

from compress_ssl.pipeline.datasets.decode import GOOD
from compress_ssl.pipeline.extraction.encoded_rows import mark_not_finite
from compress_ssl.pipeline.extraction.extract import FeatureBatch, FeatureSource, extract
from compress_ssl.pipeline.extraction.shard_writer import require_readable
from compress_ssl.pipeline.store.codecs import build_codec
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.store.layout import VIEW_BLOCK
from compress_ssl.pipeline.store.shards import shard_rows
from compress_ssl.pipeline.views.loader import ViewDataset

SAMPLE_IMAGES = 4096
"""Images in the sample at most. With four views each these are 64 training vectors per centroid of 256."""

SAMPLE_BYTES = 1_000_000_000
"""Bytes of the sample's float32 features at most: they are held in memory."""


def train_codebooks(store: FeatureStore, source: FeatureSource, stopped: Callable[[], bool] = lambda: False) -> None:
    """Train all untrained codecs of a store on features of the sample, and store the codebooks.

    source: of the store's features. Nothing is stored if `stopped` becomes true.
    """
    if not store.untrained():
        return
    views = 1 if source.views.spec.policy == "none" else VIEW_BLOCK
    sample = replace(source, views=_choose_sample(store, source.views, views))
    batches = _embed_sample(sample, [*range(views), *store.other_views], stopped)
    if stopped():
        return
    _require_readable_blocks(store, sample.extractor.batch_size, batches)
    for name in store.untrained():
        store.train(name, _usable_features(batches, name))


def _choose_sample(store: FeatureStore, view_dataset: ViewDataset, views: int) -> ViewDataset:
    """Images spread evenly over the rows, at least one, within SAMPLE_IMAGES and SAMPLE_BYTES."""
    images = len(view_dataset.dataset)
    bytes_per_image = 4 * views * sum(int(np.prod(shape)) for shape in store.arrays.values())
    count = min(SAMPLE_IMAGES, images, SAMPLE_BYTES // bytes_per_image)
    return view_dataset.with_images(view_dataset.dataset.subset(max(1, count)))


def _embed_sample(sample: FeatureSource, views: Sequence[int], stopped: Callable[[], bool]) -> list[FeatureBatch]:
    """The features of all images of the sample, with those marked as bad that are not finite; fewer if stopped."""
    rows, float32 = np.arange(len(sample.views.dataset)), build_codec("float32")
    batches = []
    with closing(extract(sample, sample.batches(rows, views), lambda _: not stopped())) as feature_batches:
        for batch in feature_batches:
            mark_not_finite(batch, dict.fromkeys(batch.features, float32))
            batches.append(replace(batch, features={name: part.copy() for name, part in batch.features.items()}))
    return batches


def _require_readable_blocks(store: FeatureStore, batch_size: int, batches: Sequence[FeatureBatch]) -> None:
    """Raise UserError if all images of as many rows as a shard of the sample would have cannot be read."""
    status = np.concatenate([batch.status for batch in batches])
    bad = {row: why for batch in batches for row, why in batch.bad.items()}
    rows = shard_rows(len(status), batch_size, store.arrays, 4)
    for start in range(0, len(status), rows):
        require_readable(start, status[start : start + rows], bad)


def _usable_features(batches: Sequence[FeatureBatch], name: str) -> np.ndarray:
    """(V * n, ...) float32: an array of the n usable images, view after view."""
    views = batches[0].views[name].shape[1]
    return np.concatenate(
        [batch.features[name][batch.status == GOOD, view] for view in range(views) for batch in batches]
    )
