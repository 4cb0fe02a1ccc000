"""Codebooks of trained codecs: learnt once per store, before its first shard, from a sample of the data set.

The sample is spread evenly over the rows, as folders come sorted by class, and its views are the same
however many the store has, so that a grown store has the codebook of one made large at once.
"""

import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from compress_ssl.pipeline.datasets.decode import GOOD
from compress_ssl.pipeline.extraction.embed import FeatureExtractor, embed
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.store.layout import VIEW_BLOCK
from compress_ssl.pipeline.store.shards import is_local, shard_rows
from compress_ssl.pipeline.views.augment import ViewSpec

SAMPLE_IMAGES = 4096  # of the sample; with four views each, 64 vectors per centroid
SAMPLE_BYTES = 1_000_000_000  # of the sample's features at most


def train_codebooks(
    store: FeatureStore,
    dataset: Any,
    spec: ViewSpec,
    forward: FeatureExtractor,
    *,
    workers: int,
    threads: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Train the codecs that await it, each on what the teacher says of the sample. Nothing is kept if stopped."""
    if not store.untrained():
        return
    views = 1 if spec.policy == "none" else VIEW_BLOCK
    each = 4 * views * sum(int(np.prod(shape)) for shape in store.arrays.values())
    sample = dataset.subset(max(1, min(SAMPLE_IMAGES, len(dataset), SAMPLE_BYTES // each)))
    rows = shard_rows(len(sample), forward.batch_size, store.arrays, 4)
    identity = {**store.identity, "codec": "float32", "shard_rows": rows}
    identity["data"] = {"images": len(sample), "fingerprint": sample.fingerprint}
    tables = {"sample_id": sample.ids, "label": sample.label, "view_key": range(len(sample))}
    with tempfile.TemporaryDirectory(prefix="compress-codebook-") as folder:
        seen = FeatureStore.create(Folder(folder), identity, {"views": views}, tables)
        embed(seen, sample, spec, forward, workers=workers, threads=threads, stopped=stopped)
        if stopped():
            return
        good = seen.table("status") == GOOD
        for name in store.untrained():
            shown = seen.local if is_local(name) else range(views)
            store.train(name, np.concatenate([seen.read(name, view)[good] for view in shown]))
