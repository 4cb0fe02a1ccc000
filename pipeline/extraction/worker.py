"""Where shards are computed: `ExportWorker` in this process, `DaskExport` on the workers of a dask scheduler.

Both have the methods `train_codebooks` and `compute`, and list `failed` shards. Each dask worker builds an ExportWorker
of its own and keeps it, so the teacher is built once per worker and stays on that worker's device.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from compress_ssl.pipeline.extraction import cluster
from compress_ssl.pipeline.extraction.cluster import Failed
from compress_ssl.pipeline.extraction.codebook import train_codebooks
from compress_ssl.pipeline.extraction.embed import Cost, embed
from compress_ssl.pipeline.extraction.extract import FeatureSource
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.formatting import describe_exception
from compress_ssl.pipeline.runtime.progress import echo
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.store.shards import Shard

# ---------------------------------------------------------------- in one process


@dataclass
class ExportWorker:
    """A store and the source of its features: everything that is needed to compute a shard. One is built per process.

    The two functions that it is given are `progress`, called with numbers of images, and `stopped`, called before each
    batch.
    """

    store: FeatureStore
    source: FeatureSource
    failed: Sequence[Failed[Shard]] = ()  # stays empty: a shard that fails in this process raises its exception

    def train_codebooks(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Train the codecs of the store that have no codebook yet."""
        train_codebooks(self.store, self.source, stopped)

    def compute(
        self,
        shards: Sequence[Shard],
        progress: Callable[[int], None] = lambda _: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Cost:
        """Compute shards and write them."""
        return embed(self.store, self.source, shards, progress, stopped)


# ---------------------------------------------------------------- on a cluster

BuildWorker = Callable[[], ExportWorker]
"""Called in a dask worker for each task: builds an ExportWorker the first time and returns the same one afterwards."""


@dataclass
class DaskExport:
    """The workers of a dask scheduler, with the methods of an ExportWorker."""

    scheduler: str  # as --scheduler
    build: BuildWorker
    failed: list[Failed[Shard]] = field(default_factory=list)  # shards that failed on their last attempt

    def train_codebooks(self, stopped: Callable[[], bool]) -> None:
        """Let one worker train the codecs of the store. Raises that worker's exception."""
        task = partial(_train_codebooks, self.build)
        for outcome in cluster.run_tasks(["codebook"], task, self.scheduler, stopped):
            if isinstance(outcome, Failed):
                raise outcome.error

    def compute(self, shards: Sequence[Shard], progress: Callable[[int], None], stopped: Callable[[], bool]) -> Cost:
        """Compute shards, each on whichever worker is free. Returns the sum of their costs, in real seconds.

        A shard that failed on its last attempt is appended to `failed`; the other shards continue.
        """
        total, began = Cost(), time.monotonic()
        for outcome in cluster.run_tasks(shards, partial(_compute_shard, self.build), self.scheduler, stopped):
            if isinstance(outcome, Failed):
                self.failed.append(outcome)
                echo(f"rows {outcome.task.start} to {outcome.task.stop - 1} failed: {outcome.error}")
            else:
                total += outcome.result
                progress(outcome.task.stop - outcome.task.start)
        total.seconds = time.monotonic() - began
        return total


def _train_codebooks(build: BuildWorker, _: str) -> None:
    """The task that trains codecs; it runs in a dask worker."""
    build().train_codebooks()


def _compute_shard(build: BuildWorker, shard: Shard) -> Cost:
    """The task that computes one shard; it runs in a dask worker."""
    worker = build()
    if worker.store.is_done(shard):  # a worker wrote it and was lost before it could report the result
        return Cost()
    return worker.compute([shard])


# ---------------------------------------------------------------- failed shards


def require_no_failures(failed: Sequence[Failed[Shard]], pending: int) -> None:
    """Raises UserError, with the reason of the first failed shard, if any of `pending` shards failed."""
    if failed:
        first = failed[0]
        rows = f"{first.task.start} to {first.task.stop - 1}"
        raise UserError(
            f"{len(failed)} of {pending} shards failed on every attempt; the first one holds rows {rows} "
            f"({describe_exception(first.error)}); the finished shards are kept, repeat the command to try again"
        )
