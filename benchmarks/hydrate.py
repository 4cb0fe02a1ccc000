"""MB/s of reading one view of a store into memory, against Zarr and against reading one plain file of the same size.

`distill` reads one view in this way for every epoch.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.store_records import plain_record
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.store.layout import Column
from compress_ssl.pipeline.store.shards import Shard

IMAGES, VIEWS, WIDTH, ROWS, RUNS = 65_536, 4, 1024, 2048, 5


def measure() -> dict[str, float]:
    """Medians, from files that are in the page cache. Our reader and Zarr check checksums; the plain file has none.

    "of Zarr" and "of the plain file" are our speed divided by theirs.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = create_store(Path(folder) / "store")
        megabytes = IMAGES * WIDTH / 1e6
        our_seconds = _median_seconds(lambda: store.stored("embedding", 1))
        zarr_seconds = _median_seconds(lambda: store.array("embedding")[:, 1])
        plain_file = Path(folder) / "plain"
        plain_file.write_bytes(bytes(IMAGES * WIDTH))
        plain_seconds = _median_seconds(lambda: np.fromfile(plain_file, np.int8))
    return {
        "MB": megabytes,
        "hydrate MB/s": round(megabytes / our_seconds, 1),
        "Zarr MB/s": round(megabytes / zarr_seconds, 1),
        "plain file MB/s": round(megabytes / plain_seconds, 1),
        "of Zarr": round(zarr_seconds / our_seconds, 3),
        "of the plain file": round(plain_seconds / our_seconds, 3),
    }


def create_store(folder: Path, images: int = IMAGES, views: int = VIEWS, width: int = WIDTH) -> FeatureStore:
    """Create a complete store of random int8 features; `images` must be a multiple of ROWS."""
    ids = [str(i) for i in range(images)]
    tables: dict[str, Column] = {"sample_id": ids, "label": np.zeros(images), "view_key": range(images)}
    store = FeatureStore.create(Folder(folder), plain_record(images, views, width, "int8", ROWS), tables)
    random = np.random.default_rng(0)
    for block in range(images // ROWS):
        start, stop = store.span(block)
        stored = random.integers(-127, 128, (ROWS, views, width), dtype=np.int8)
        features: dict[str, Any] = {"embedding": (stored, np.ones((ROWS, views), np.float32))}
        shard = Shard(block, start, stop, tuple(range(views)))
        store.write(shard, features, np.zeros(ROWS, np.uint8), np.zeros(ROWS, np.uint64), {})
    return store


def _median_seconds(read: Callable[[], object]) -> float:
    seconds = []
    for _ in range(RUNS + 1):
        began = time.perf_counter()
        read()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])  # the first run is a warm-up
