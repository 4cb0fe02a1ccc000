"""Opening a store of 10^7 images and 32 views and listing what is pending: a store of names, without features."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.store.shards import done_key

IMAGES, VIEWS, ROWS, WIDTH, RUNS = 10_000_000, 32, 2048, 512, 3


def measure() -> dict[str, Any]:
    """Seconds, medians: from nothing to the list of pending shards, and to "it is complete"."""
    with tempfile.TemporaryDirectory() as folder:
        store, out = made(Path(folder)), {}
        blocks = range(-(-IMAGES // ROWS))
        out["empty: seconds to open and list"], shards = listed(folder)
        assert len(shards) == len(blocks) and shards[-1].views == tuple(range(VIEWS))
        names = [done_key(block, first, first + 4) for block in blocks for first in range(0, VIEWS, 4)]
        touch(Path(folder), names)
        for array in ("embedding", "embedding_scale"):
            touch(Path(folder), [store._chunk_key(array, (b, v)) for b in blocks for v in range(VIEWS // 4)])
        for table in ("status", "content"):
            touch(Path(folder), [store._chunk_key(table, (block,)) for block in blocks])
        out["all done: seconds to open and find it complete"] = timed(lambda: opened(folder).require_complete())
        os.unlink(Path(folder) / names[-1])
        out["all but one done: seconds to open and list"], shards = listed(folder)
        assert [(s.block, s.views) for s in shards] == [(blocks[-1], (28, 29, 30, 31))]
    files = len(names) + 2 * len(blocks) * (VIEWS // 4 + 1)
    return {"images": IMAGES, "views": VIEWS, "done records": len(names), "files": files, **out}


def made(folder: Path) -> FeatureStore:
    """A store without tables: this benchmark does not read them."""
    identity = {
        "data": {"images": IMAGES, "fingerprint": "benchmark"},
        "arrays": {"embedding": [WIDTH]},
        "codec": "int8",
        "shard_rows": ROWS,
    }
    return FeatureStore.create(Folder(folder), identity, {"views": VIEWS}, {})


def touch(folder: Path, keys: list[str]) -> None:
    for parent in {(folder / key).parent for key in keys}:
        parent.mkdir(parents=True, exist_ok=True)
    for key in keys:
        os.close(os.open(folder / key, os.O_CREAT | os.O_WRONLY))


def opened(folder: str) -> FeatureStore:
    return FeatureStore(Folder(folder))


def listed(folder: str) -> tuple[float, Any]:
    return timed(lambda: opened(folder).pending()), opened(folder).pending()


def timed(act: Callable[[], object]) -> float:
    times = []
    for _ in range(RUNS):
        began = time.perf_counter()
        act()
        times.append(time.perf_counter() - began)
    return round(statistics.median(times), 3)
