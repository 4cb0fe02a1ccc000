"""A local copy of the part of a remote store that a command reads, checked against the store's done records.

The remote done record says what a shard's content is. A shard of the copy that fits it is used as it
is; any other, be it missing, half there, damaged or of an older state, is fetched again.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.formatting import format_bytes
from compress_ssl.pipeline.runtime.progress import echo, progress_bar
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store.copy import copy_shard
from compress_ssl.pipeline.store.feature_store import COPY, FeatureStore
from compress_ssl.pipeline.store.shards import done_key

Spans = Sequence[tuple[int, int]]  # of views: (first, one past the last)
CONNECTIONS = 16


class CachedFolder(Folder):
    """A folder that goes by the name of the store it is a copy of."""

    def __init__(self, path: Path, name: str):
        super().__init__(path)
        self.name = name

    def __str__(self) -> str:
        return self.name


def cache_home() -> Path:
    """Where copies lie unless the user says otherwise: compress/ in the XDG cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "compress"


def fetch(remote: FeatureStore, views: Sequence[int], cache: Path | None = None) -> FeatureStore:
    """Copy what reading these views takes, as far as it is not here already -> the store over the copy.

    Whole shards are copied: their digests cover all arrays. Raises UserError if the remote store lacks
    some of these views or is damaged.
    """
    remote.require_complete(views)
    here = CachedFolder((cache or cache_home()).expanduser() / remote.fingerprint, str(remote.storage))
    here.sweep()
    here.put(artifact.MANIFEST, artifact.to_bytes(remote.manifest))
    local, wanted = FeatureStore(here), set(views)
    for key in local.about["small"]:
        if local.read_if_intact(key) is None:
            here.put(key, _small(remote, key))
    there, fetched = remote.done(), 0
    for block, spans in local.done().items():
        for span in set(spans) - set(there.get(block, [])):  # the store grew, and wider records took their place
            here.delete(done_key(block, *span))
    blocks = {b: [s for s in sorted(spans) if wanted & set(range(*s))] for b, spans in there.items()}
    pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="fetch")
    try:
        tasks = [pool.submit(_block, remote, local, b, spans) for b, spans in blocks.items()]
        with progress_bar("hydrate", len(tasks), "row blocks") as bar:
            for task in tasks:
                fetched += task.result()
                bar.advance(1, format_bytes(fetched))
    finally:
        pool.shutdown(cancel_futures=True)
    echo(f"{remote.storage}: {format_bytes(fetched)} fetched to {here.path}, the rest was there")
    return FeatureStore(here)


def _block(remote: FeatureStore, local: FeatureStore, block: int, spans: Spans) -> int:
    """Bring one row block of the copy up to date, one span after the other: they share files -> bytes fetched."""
    return sum(copy_shard(remote.storage, local, block, span) for span in spans)


def _small(remote: FeatureStore, key: str) -> bytes:
    """A small file of the remote store, else its second copy. Raises UserError if neither is whole."""
    for place in (key, f"{COPY}/{key}"):
        if (data := remote.read_if_intact(key, place)) is not None:
            return data
    raise UserError(f"{remote.storage}/{key} is damaged, and so is its copy; they cannot be mended")
