"""Codebooks: codecs that must be trained are trained once per store, before its first shard, on a sample of the images.

The sample is spread evenly over the rows, because images in folders are sorted by class. Its views are the same for
any number of views of the store, so that a store to which views were added has the same codebook as one made with all
views at once.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from compress_ssl.pipeline.datasets.base import Dataset
from compress_ssl.pipeline.datasets.decode import GOOD
from compress_ssl.pipeline.extraction.embed import embed
from compress_ssl.pipeline.extraction.feature_extractor import FeatureExtractor
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.store.layout import VIEW_BLOCK
from compress_ssl.pipeline.store.records import DataIdentity, StoreAbout, StoreRecord
from compress_ssl.pipeline.store.shards import is_local, shard_rows
from compress_ssl.pipeline.views.augment import ViewSpec

SAMPLE_IMAGES = 4096
"""Images in the sample at most. With four views each these are 64 training vectors per centroid of 256."""

SAMPLE_BYTES = 1_000_000_000
"""Bytes of the sample's float32 features at most: they are held in memory."""


def train_codebooks(
    store: FeatureStore,
    dataset: Dataset,
    spec: ViewSpec,
    extractor: FeatureExtractor,
    *,
    workers: int,
    threads: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Train all untrained codecs of a store on features of the sample, and store the codebooks.

    The features are computed by `embed` into a temporary float32 store. Nothing is stored if `stopped` becomes true.
    """
    if not store.untrained():
        return
    views = 1 if spec.policy == "none" else VIEW_BLOCK
    sample = _choose_sample(store, dataset, views)
    with tempfile.TemporaryDirectory(prefix="compress-codebook-") as folder:
        sample_store = _create_sample_store(folder, store, sample, views, extractor.batch_size)
        embed(sample_store, sample, spec, extractor, workers=workers, threads=threads, stopped=stopped)
        if stopped():
            return
        good = sample_store.table("status") == GOOD
        for name in store.untrained():
            sample_views = sample_store.local if is_local(name) else range(views)
            store.train(name, np.concatenate([sample_store.read(name, view)[good] for view in sample_views]))


def _choose_sample(store: FeatureStore, dataset: Dataset, views: int) -> Dataset:
    """Images spread evenly over the rows, at least one, within SAMPLE_IMAGES and SAMPLE_BYTES."""
    bytes_per_image = 4 * views * sum(int(np.prod(shape)) for shape in store.arrays.values())
    count = min(SAMPLE_IMAGES, len(dataset), SAMPLE_BYTES // bytes_per_image)
    return dataset.subset(max(1, count))


def _create_sample_store(
    folder: str, store: FeatureStore, sample: Dataset, views: int, batch_size: int
) -> FeatureStore:
    """An empty store for the sample, with the arrays of `store` in float32."""
    rows = shard_rows(len(sample), batch_size, store.arrays, 4)
    data = DataIdentity(sample.fingerprint, len(sample))
    identity = replace(store.identity, codec="float32", shard_rows=rows, data=data)
    tables = {"sample_id": sample.ids, "label": sample.label, "view_key": range(len(sample))}
    return FeatureStore.create(Folder(folder), StoreRecord(identity, StoreAbout(views, small={})), tables)
