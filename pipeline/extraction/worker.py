"""Where shards are computed: a store, its images and the teacher, in this process or in each worker of a cluster.

A worker makes a workshop of its own by a function of the command's and keeps it, so the teacher is built once per
worker and lives on that worker's device.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from compress_ssl.pipeline.extraction import cluster
from compress_ssl.pipeline.extraction.cluster import Outcome
from compress_ssl.pipeline.extraction.codebook import train_codebooks
from compress_ssl.pipeline.extraction.embed import Cost, FeatureExtractor, embed
from compress_ssl.pipeline.runtime.device import loader_workers
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.store.shards import Shard
from compress_ssl.pipeline.views.augment import ViewSpec


@dataclass
class ExportWorker:
    """All that computing a shard takes. One is built per process."""

    store: FeatureStore
    dataset: Any
    spec: ViewSpec
    forward: FeatureExtractor
    workers: int | None  # loaders asked for

    def learn(self, stopped: Callable[[], bool] = lambda: False, threads: bool = False) -> None:
        """Train the codecs that need it. threads: decode in threads, as a worker may have no child processes."""
        train_codebooks(
            self.store, self.dataset, self.spec, self.forward, workers=self._loaders(), threads=threads, stopped=stopped
        )

    def compute(
        self,
        shards: Sequence[Shard],
        progress: Callable[[int], None] = lambda _: None,
        stopped: Callable[[], bool] = lambda: False,
        threads: bool = False,
    ) -> Cost:
        """Compute shards and write them."""
        return embed(
            self.store, self.dataset, self.spec, self.forward, shards=shards, workers=self._loaders(), threads=threads,
            progress=progress, stopped=stopped,
        )  # fmt: skip

    def _loaders(self) -> int:
        return loader_workers(self.workers, self.forward.device)


Build = Callable[[], ExportWorker]  # in a worker: makes the workshop the first time


@dataclass(frozen=True)
class DaskExport:
    """Workers of a dask scheduler that do what a `Workshop` does here."""

    scheduler: str
    build: Build
    failed: Callable[[Outcome], None]  # is told of a shard that failed after all tries

    def learn(self, stopped: Callable[[], bool]) -> None:
        """One of them trains the codecs."""
        for outcome in cluster.run_tasks(["codebook"], partial(_learn, self.build), self.scheduler, stopped):
            if outcome.error is not None:
                raise outcome.error

    def compute(self, shards: Sequence[Shard], progress: Callable[[int], None], stopped: Callable[[], bool]) -> Cost:
        """Compute shards on whichever of them is free."""
        total, began = Cost(), time.monotonic()
        for outcome in cluster.run_tasks(shards, partial(_compute, self.build), self.scheduler, stopped):
            if outcome.error is None:
                total += outcome.result
                progress(outcome.task.stop - outcome.task.start)
            else:
                self.failed(outcome)
        total.seconds = time.monotonic() - began
        return total


def _learn(build: Build, _: str) -> None:
    build().learn(threads=True)


def _compute(build: Build, shard: Shard) -> Cost:
    work = build()
    if work.store.is_done(shard):  # by a worker that was lost before it could say so
        return Cost()
    return work.compute([shard], threads=True)
