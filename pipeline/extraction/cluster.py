"""Tasks on this machine or on a cluster: dask schedules, the caller says what a task does.

A task must be idempotent: a worker that is lost has its tasks computed elsewhere, and one that only
seemed lost computes them twice.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from compress_ssl.pipeline.runtime.artifact import UserError

T = TypeVar("T")
RETRIES = 2  # times a failing task is tried again, on whichever worker is free
POLL_INTERVAL = 0.1  # seconds between looks for ended tasks and for a request to stop
ALLOWED_FAILURES = 5  # workers that may die under one task before it is given up


@dataclass(frozen=True)
class Outcome:
    """One task that ended: its result, or why it failed after all tries."""

    task: Any
    result: Any = None
    error: BaseException | None = None


def parse_scheduler(text: str) -> tuple[str, str]:
    """`local`, `processes:N`, `tcp://HOST:PORT` -> (kind, argument). Raises UserError."""
    if text == "local":
        return "local", ""
    if text.startswith("processes:") and text.partition(":")[2].isdecimal() and int(text.partition(":")[2]) > 0:
        return "processes", text.partition(":")[2]
    if text.startswith(("tcp://", "tls://", "ws://", "wss://", "ucx://")):
        return "cluster", text
    raise UserError(f"--scheduler is {text}, but must be local, processes:N or tcp://HOST:PORT")


def run_tasks(
    tasks: Sequence[T], work: Callable[[T], Any], scheduler: str, stopped: Callable[[], bool]
) -> Iterator[Outcome]:
    """Run tasks on a dask cluster, outcomes as they come. When `stopped` the rest is cancelled.

    Raises UserError if the scheduler cannot be reached or every worker is gone.
    """
    from dask.distributed import as_completed

    with _client(scheduler) as client:
        futures = {
            client.submit(work, task, key=f"task-{os.getpid()}-{n}", pure=False, retries=RETRIES, priority=-n): task
            for n, task in enumerate(tasks)
        }
        ended = as_completed(list(futures), loop=client.loop)
        left = len(futures)
        while left and not stopped():
            if not ended.has_ready():
                _require_scheduler(client, scheduler)
                time.sleep(POLL_INTERVAL)
                continue
            future = next(ended)
            if future.status in ("pending", "lost"):  # its worker died with the result: it is computed elsewhere
                ended.add(future)
                continue
            left -= 1
            if future.status == "finished":
                yield Outcome(futures[future], future.result())
            elif future.status == "error":
                yield Outcome(futures[future], error=future.exception())
            else:
                yield Outcome(futures[future], error=RuntimeError(f"task {future.status} by the scheduler"))
            future.release()
        client.cancel(list(futures))


@contextmanager
def _client(scheduler: str) -> Iterator[Any]:
    """A client of the cluster; one of `processes:N` is started here and ends here."""
    import dask
    from dask.distributed import Client

    kind, argument = parse_scheduler(scheduler)
    dask.config.set({"distributed.scheduler.allowed-failures": ALLOWED_FAILURES})
    if kind == "cluster":
        try:
            client = Client(argument, timeout=15, set_as_default=False)
        except (OSError, TimeoutError) as problem:
            why = f"no dask scheduler answers at {argument} ({problem}); start one, or check the address"
            raise UserError(why) from None
        with client:
            if not client.scheduler_info()["workers"]:
                raise UserError(f"the dask scheduler at {argument} has no workers; start some: dask worker {argument}")
            yield client
        return
    with _workers(int(argument)) as cluster, Client(cluster, set_as_default=False) as client:
        yield client


def _workers(count: int) -> Any:
    """A cluster of processes on this machine. Raises UserError if they do not start, tried as often as a task is."""
    from dask.distributed import LocalCluster

    why = ""
    for _ in range(RETRIES + 1):
        try:
            return LocalCluster(
                n_workers=count,
                threads_per_worker=1,
                processes=True,
                silence_logs=50,
                dashboard_address="127.0.0.1:0",  # any free port: two exports on one machine do not meet
            )
        except RuntimeError as problem:  # one of them died before it was a worker
            why = str(problem.__cause__ or problem)
    raise UserError(f"the processes of --scheduler processes:{count} do not start ({why}); is memory short? Try fewer")


def _require_scheduler(client: Any, scheduler: str) -> None:
    if client.status != "running":
        raise UserError(f"the dask scheduler {scheduler} is gone; what is done is kept, repeat the command to continue")


def worker_number() -> int:
    """The number in this worker's name, 0 where there is none: which of the GPUs it sees is its own."""
    from dask.distributed import get_worker

    try:
        digits = "".join(c for c in str(get_worker().name).rpartition("-")[2] if c.isdigit())
    except ValueError:
        return 0
    return int(digits or 0)
