"""Reading one view of a store into memory, as an epoch does, against Zarr and against one plain file of that size."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.store.shards import Shard

IMAGES, VIEWS, WIDTH, ROWS, RUNS = 65_536, 4, 1024, 2048, 5


def measure() -> dict[str, float]:
    """MB/s from a warm local disk, checksums checked in the first two; medians."""
    with tempfile.TemporaryDirectory() as folder:
        store = made(Path(folder) / "store")
        size = IMAGES * WIDTH / 1e6
        ours = _median(lambda: store.stored("embedding", 1))
        by_zarr = _median(lambda: store.array("embedding")[:, 1])
        flat = Path(folder) / "flat"
        flat.write_bytes(bytes(IMAGES * WIDTH))
        plain = _median(lambda: np.fromfile(flat, np.int8))
    return {
        "MB": size,
        "hydrate MB/s": round(size / ours, 1),
        "Zarr MB/s": round(size / by_zarr, 1),
        "plain file MB/s": round(size / plain, 1),
        "of Zarr": round(by_zarr / ours, 3),
        "of the plain file": round(plain / ours, 3),
    }


def made(folder: Path, images: int = IMAGES, views: int = VIEWS, width: int = WIDTH) -> FeatureStore:
    """A store of random int8 features; `images` is a multiple of ROWS."""
    identity = {
        "data": {"images": images, "fingerprint": "benchmark"},
        "arrays": {"embedding": [width]},
        "codec": "int8",
        "shard_rows": ROWS,
    }
    tables = {"sample_id": [str(i) for i in range(images)], "label": np.zeros(images), "view_key": range(images)}
    store = FeatureStore.create(Folder(folder), identity, {"views": views}, tables)
    random = np.random.default_rng(0)
    for block in range(images // ROWS):
        start, stop = store.span(block)
        stored = random.integers(-127, 128, (ROWS, views, width), dtype=np.int8)
        features: dict[str, Any] = {"embedding": (stored, np.ones((ROWS, views), np.float32))}
        shard = Shard(block, start, stop, tuple(range(views)))
        store.write(shard, features, np.zeros(ROWS, np.uint8), np.zeros(ROWS, np.uint64), {})
    return store


def _median(act: Callable[[], object]) -> float:
    times = []
    for _ in range(RUNS + 1):
        began = time.perf_counter()
        act()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])
