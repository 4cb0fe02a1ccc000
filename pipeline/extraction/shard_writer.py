"""Writing shards: collect the rows of a shard, write it, read it back and compare."""

import random
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np

from compress_ssl.pipeline.datasets.decode import UNREADABLE
from compress_ssl.pipeline.extraction.encoded_rows import EncodedRows
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.store import integrity
from compress_ssl.pipeline.store.codecs import Stored
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.store.shards import Shard, done_key

MIN_UNREADABLE = 8
"""Images. A shard of at least so many, all of which cannot be read, is an error and not a shard of bad images."""

WRITE_ATTEMPTS = 6
"""Attempts before a shard that fails its read-back check is an error."""

MAX_FIRST_DELAY = 0.05
"""Seconds; upper bound of the random delay after the first failed attempt, doubled after each further one."""


class ShardWriter:
    """Collects encoded rows and writes each complete shard in a thread, while the next shard is computed.

    At most one shard is being written. A context manager: leaving it waits for the thread. Call `wait` before, since
    errors of the thread are raised only by `wait` and `raise_error`.
    """

    def __init__(self, store: FeatureStore):
        self._store = store
        self._rows: list[EncodedRows] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._writing: Future[None] | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.shutdown()

    def add(self, shard: Shard, rows: EncodedRows, *, last: bool) -> None:
        """Append rows of a shard; with the last ones, wait for the shard before it and start writing this one."""
        self._rows.append(rows)
        if last:
            self.wait()  # else the error of the shard before would be lost
            self._writing = self._thread.submit(write_shard, self._store, shard, self._rows)
            self._rows = []

    def raise_error(self) -> None:
        """Raise the error of a write that has ended, without waiting for one that has not."""
        if self._writing and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the write in progress and raise its error."""
        if self._writing:
            self._writing.result()
            self._writing = None


def write_shard(store: FeatureStore, shard: Shard, rows: list[EncodedRows]) -> None:
    """Store a shard and read it back. If two writers collide, the last one to finish leaves a valid shard.

    Raises UserError if none of its images can be read, or if WRITE_ATTEMPTS times it does not read back as written.
    """
    whole = _concatenate(rows)
    require_readable(shard.start, whole.status, whole.bad)
    fault = ""
    for attempt in range(WRITE_ATTEMPTS):
        spans = store.write(shard, whole.stored, whole.status, whole.content, whole.bad)
        fault = next(filter(None, (integrity.find_fault(store, shard.block, span) for span in spans)), "")
        if not fault:
            return
        for span in spans:  # the shard is pending again, even if this process is killed now
            store.storage.delete(done_key(shard.block, *span))
        time.sleep(random.uniform(0, MAX_FIRST_DELAY * 2**attempt))  # random: two writers must not stay in step
    raise UserError(
        f"{store.storage}: rows {shard.start} to {shard.stop - 1} read back otherwise than they were written, "
        f"{WRITE_ATTEMPTS} times ({fault}); end whatever else writes there, check the disk, and repeat the command"
    )


def _concatenate(rows: list[EncodedRows]) -> EncodedRows:
    stored: dict[str, Stored] = {}
    for name in rows[0].stored:
        values = [part.stored[name][0] for part in rows]
        scales = [scale for _, scale in (part.stored[name] for part in rows) if scale is not None]
        stored[name] = np.concatenate(values), np.concatenate(scales) if scales else None
    status = np.concatenate([part.status for part in rows])
    content = np.concatenate([part.content for part in rows])
    bad: dict[int, str] = {}
    for part in rows:
        bad |= part.bad
    return EncodedRows(stored, status, content, bad)


def require_readable(start: int, status: np.ndarray, bad: Mapping[int, str]) -> None:
    """Raise UserError if all images of a shard are unreadable: the disk is probably gone, the images are not bad.

    start: its first row; status: (n,) of its rows; bad: {row: why it cannot be used}.
    """
    if len(status) >= MIN_UNREADABLE and (status == UNREADABLE).all():
        raise UserError(
            f"none of the images of rows {start} to {start + len(status) - 1} can be read, the first: "
            f"{bad[start]}; is their disk still there? What is done is kept, repeat the command to continue"
        )
