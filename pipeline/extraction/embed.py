"""`embed`: features of a source into a store. Every export of features runs this loop."""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass

import numpy as np

from compress_ssl.pipeline.datasets.base import Dataset
from compress_ssl.pipeline.extraction.encoded_rows import encode_rows
from compress_ssl.pipeline.extraction.extract import FeatureSource, LoaderSettings, extract
from compress_ssl.pipeline.extraction.feature_extractor import FeatureExtractor
from compress_ssl.pipeline.extraction.shard_writer import ShardWriter
from compress_ssl.pipeline.extraction.view_batches import Batch, stored_views
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.store.shards import Shard


@dataclass
class Cost:
    """What an export computed and how long it took, for the store's history."""

    images: int = 0
    views: int = 0  # image-view pairs
    seconds: float = 0.0
    waited: float = 0.0  # seconds the main thread waited for pixels from the loader

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class _RowBatch:
    """Consecutive rows of one shard: one forward pass in each view of the shard."""

    shard: Shard
    last: bool  # whether the shard is complete with it
    batch: Batch


def store_source(
    store: FeatureStore, dataset: Dataset, extractor: FeatureExtractor, loader: LoaderSettings
) -> FeatureSource:
    """The source of a store's features: the extractor over the views that the store is made of."""
    return FeatureSource(extractor, stored_views(store, dataset, extractor.embedder), loader)


def embed(
    store: FeatureStore,
    source: FeatureSource,
    shards: Sequence[Shard],
    progress: Callable[[int], None] = lambda images: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Cost:
    """Compute the features of shards and write them to the store.

    A forward batch consists of consecutive rows of one shard in one view. So a feature does not depend on where an
    earlier run was stopped, or on the number of views of the store.

    progress: called with numbers of images that were computed. stopped: called before each batch; if it returns true,
    the shard in progress is not written. Raises UserError if a shard cannot be written.
    """
    plan = _split_into_batches(source, shards)
    cost, began = Cost(), time.monotonic()
    with ShardWriter(store) as writer:

        def proceed(number: int) -> bool:
            if stopped():
                return False
            if plan[number].last:  # so that at most one complete shard is not yet written if the process is killed
                writer.wait()
            else:
                writer.raise_error()
            return True

        with closing(extract(source, [part.batch for part in plan], proceed)) as feature_batches:
            for part, features in zip(plan, feature_batches, strict=False):  # fewer if stopped
                rows = encode_rows(store, features)
                cost += Cost(len(rows.status), len(rows.status) * len(part.shard.views), 0.0, features.waited)
                progress(len(rows.status))
                writer.add(part.shard, rows, last=part.last)
        writer.wait()
    cost.seconds = time.monotonic() - began
    return cost


def _split_into_batches(source: FeatureSource, shards: Sequence[Shard]) -> list[_RowBatch]:
    plan = []
    for shard in shards:
        batches = source.batches(np.arange(shard.start, shard.stop), shard.views)
        plan += [_RowBatch(shard, batch is batches[-1], batch) for batch in batches]
    return plan
