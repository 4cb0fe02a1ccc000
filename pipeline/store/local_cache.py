"""A local copy of those shards of a remote store that a command reads.

Each shard of the copy is checked against the done record of the remote store. A shard that fits is used; a shard that
is missing, incomplete, damaged or older than the remote one is fetched again.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.formatting import format_bytes
from compress_ssl.pipeline.runtime.progress import echo, progress_bar
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store.copy import copy_shard
from compress_ssl.pipeline.store.feature_store import COPY, FeatureStore
from compress_ssl.pipeline.store.shards import ShardIndex, Span, done_key

CONNECTIONS = 16  # row blocks that are fetched in parallel


class CachedFolder(Folder):
    """A folder whose name in messages is that of the remote store, not its own path."""

    def __init__(self, path: Path, name: str):
        super().__init__(path)
        self.name = name

    def __str__(self) -> str:
        return self.name


def cache_home() -> Path:
    """Default folder of the copies: compress/ in the XDG cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "compress"


def fetch(remote: FeatureStore, views: Sequence[int], cache: Path | None = None) -> FeatureStore:
    """Copy what is needed to read these views and is not in the copy yet; return the store opened over the copy.

    cache: folder of the copies; each has a subfolder with the fingerprint of its store.
    Whole shards are copied, because their digests cover all arrays. Raises UserError if the remote store lacks some
    of these views or is damaged.
    """
    # The done records alone: the metadata of the arrays is that of the copy, which is checked when it is read.
    ShardIndex.require_complete(remote, views)
    folder = CachedFolder((cache or cache_home()).expanduser() / remote.fingerprint, str(remote.storage))
    folder.sweep()
    folder.put(artifact.MANIFEST, artifact.to_bytes(remote.manifest))
    local, wanted = FeatureStore(folder), set(views)
    for key in local.about.small:
        if local.read_if_intact(key) is None:
            folder.put(key, _read_small_file(remote, key))
    remote_done, fetched = remote.done(), 0
    for block, spans in local.done().items():
        # records that the remote store has replaced by wider ones when it got more views
        for span in set(spans) - set(remote_done.get(block, [])):
            folder.delete(done_key(block, *span))
    blocks = {b: [s for s in sorted(spans) if wanted & set(range(*s))] for b, spans in remote_done.items()}
    pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="fetch")
    try:
        tasks = [pool.submit(_fetch_block, remote, local, b, spans) for b, spans in blocks.items()]
        with progress_bar("fetch", len(tasks), "row blocks") as bar:
            for task in tasks:
                fetched += task.result()
                bar.advance(1, format_bytes(fetched))
    finally:
        pool.shutdown(cancel_futures=True)
    echo(f"{remote.storage}: {format_bytes(fetched)} fetched to {folder.path}, the rest was there")
    return FeatureStore(folder)


def _fetch_block(remote: FeatureStore, local: FeatureStore, block: int, spans: Sequence[Span]) -> int:
    """Update one row block of the copy; return the number of bytes fetched.

    The spans are copied one after the other, because they share the files of `status` and `content`.
    """
    return sum(copy_shard(remote.storage, local, block, span) for span in spans)


def _read_small_file(remote: FeatureStore, key: str) -> bytes:
    """A small file of the remote store, or its second copy. Raises UserError if neither is intact."""
    for read_from in (key, f"{COPY}/{key}"):
        data = remote.read_if_intact(key, read_from)
        if data is not None:
            return data
    raise UserError(f"{remote.storage}/{key} is damaged, and so is its copy; they cannot be mended")
