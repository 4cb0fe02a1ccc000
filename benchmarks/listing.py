"""Seconds to open a store of 10^7 images and 32 views and to list its pending shards.

Only the names of files matter for this, so the data files and done records of this store are empty.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.store_records import plain_record
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.store.shards import Shard, done_key

IMAGES, VIEWS, ROWS, WIDTH, RUNS = 10_000_000, 32, 2048, 512, 3


def measure() -> dict[str, Any]:
    """Median seconds: to open the store and list its pending shards, and to open it and find that it is complete."""
    with tempfile.TemporaryDirectory() as folder:
        store = create_store(Path(folder))
        results: dict[str, float] = {}
        blocks = range(-(-IMAGES // ROWS))
        results["empty: seconds to open and list"], shards = list_pending(folder)
        assert len(shards) == len(blocks) and shards[-1].views == tuple(range(VIEWS))
        names = [done_key(block, first, first + 4) for block in blocks for first in range(0, VIEWS, 4)]
        touch(Path(folder), names)
        for array in ("embedding", "embedding_scale"):
            touch(Path(folder), [store._chunk_key(array, (b, v)) for b in blocks for v in range(VIEWS // 4)])
        for table in ("status", "content"):
            touch(Path(folder), [store._chunk_key(table, (block,)) for block in blocks])
        results["all done: seconds to open and find it complete"] = median_seconds(
            lambda: open_store(folder).require_complete()
        )
        os.unlink(Path(folder) / names[-1])
        results["all but one done: seconds to open and list"], shards = list_pending(folder)
        assert [(s.block, s.views) for s in shards] == [(blocks[-1], (28, 29, 30, 31))]
    files = len(names) + 2 * len(blocks) * (VIEWS // 4 + 1)
    return {"images": IMAGES, "views": VIEWS, "done records": len(names), "files": files, **results}


def create_store(folder: Path) -> FeatureStore:
    """Create an empty store without tables, which this benchmark does not read."""
    return FeatureStore.create(Folder(folder), plain_record(IMAGES, VIEWS, WIDTH, "int8", ROWS), {})


def touch(folder: Path, keys: list[str]) -> None:
    """Create empty files at these keys of the store."""
    for parent in {(folder / key).parent for key in keys}:
        parent.mkdir(parents=True, exist_ok=True)
    for key in keys:
        os.close(os.open(folder / key, os.O_CREAT | os.O_WRONLY))


def open_store(folder: str) -> FeatureStore:
    return FeatureStore(Folder(folder))


def list_pending(folder: str) -> tuple[float, list[Shard]]:
    """(median seconds to open the store and list its pending shards, the pending shards)"""
    return median_seconds(lambda: open_store(folder).pending()), open_store(folder).pending()


def median_seconds(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(RUNS):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return round(statistics.median(seconds), 3)
