"""Running tasks on dask workers, of this machine or of a cluster.

A task must be idempotent. dask runs the tasks of a lost worker on other workers, and a worker that only seemed to be
lost then computes the same task as well.
"""

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.formatting import describe_exception

if TYPE_CHECKING:
    from dask.distributed import Client, Future, LocalCluster

T = TypeVar("T")
R = TypeVar("R")

RETRIES = 2
"""Further attempts at a task that raised an exception, on whichever worker is free."""

POLL_INTERVAL = 0.1
"""Seconds between checks for ended tasks and for a request to stop."""

ALLOWED_FAILURES = 5
"""Workers that may be lost while they compute a task before dask gives that task up."""

CONNECT_TIMEOUT = 15
"""Seconds to wait for an answer of the scheduler."""

SILENT = 50
"""Level of logging.CRITICAL: the only messages of started workers that are shown."""


MAX_PROCESSES = 4096
"""Of processes:N; more than any machine starts."""

_ADDRESS = re.compile(r"(tcp|tls|ws|wss|ucx|ucxx)://(\[[0-9a-fA-F:.]+\]|[^\s:/]+):(?P<port>\d{1,5})", re.ASCII)


@dataclass(frozen=True)
class Done(Generic[T, R]):
    """A task that has ended with a result."""

    task: T
    result: R


@dataclass(frozen=True)
class Failed(Generic[T]):
    """A task that has ended with the exception of its last attempt."""

    task: T
    error: BaseException


def parse_scheduler(text: str) -> tuple[str, str]:
    """`local`, `processes:N` or `tcp://HOST:PORT` -> (kind, argument). Raises UserError for anything else."""
    if text == "local":
        return "local", ""
    kind, _, argument = text.partition(":")
    if kind == "processes" and re.fullmatch("[0-9]{1,9}", argument) and 0 < int(argument) <= MAX_PROCESSES:
        return "processes", argument
    address = _ADDRESS.fullmatch(text)
    if address and 0 < int(address["port"]) < 2**16:
        return "cluster", text
    raise UserError(
        f"--scheduler is {text}, but must be local, processes:N or tcp://HOST:PORT, with N from 1 to {MAX_PROCESSES}"
    )


# ---------------------------------------------------------------- running tasks


def run_tasks(
    tasks: Sequence[T], work: Callable[[T], R], scheduler: str, stopped: Callable[[], bool]
) -> Iterator[Done[T, R] | Failed[T]]:
    """Compute work(task) for all tasks and yield outcomes as they end. If `stopped`, the other tasks are cancelled.

    scheduler: `processes:N` or an address. Raises UserError if the scheduler cannot be reached, if it has no workers,
    or if the connection to it ends.
    """
    from dask.distributed import as_completed

    with _connect(scheduler) as client:
        futures: dict[Future[R], T] = {}
        for number, task in enumerate(tasks):
            key = f"task-{os.getpid()}-{number}"
            future = client.submit(work, task, key=key, pure=False, retries=RETRIES, priority=-number)
            futures[future] = task
        ended = as_completed(list(futures), loop=client.loop)
        left = len(futures)
        while left and not stopped():
            if not ended.has_ready():
                _require_connection(client, scheduler)
                time.sleep(POLL_INTERVAL)
                continue
            future = next(ended)
            if future.status in ("pending", "lost"):  # its worker was lost with the result: dask computes it again
                ended.add(future)
                continue
            left -= 1
            yield _outcome(futures[future], future)
            future.release()
        client.cancel(list(futures))


def _outcome(task: T, future: "Future[R]") -> Done[T, R] | Failed[T]:
    if future.status == "finished":
        return Done(task, future.result())
    error: BaseException | None = future.exception() if future.status == "error" else None
    return Failed(task, error or RuntimeError(f"task {future.status} by the scheduler"))


# ---------------------------------------------------------------- connecting


@contextmanager
def _connect(scheduler: str) -> Iterator["Client"]:
    """A dask client. For `processes:N` a cluster of N processes is started, and ended afterwards."""
    import dask

    kind, argument = parse_scheduler(scheduler)
    dask.config.set({"distributed.scheduler.allowed-failures": ALLOWED_FAILURES})
    connect = _connect_to_cluster if kind == "cluster" else _start_processes
    with connect(argument) as client:
        yield client


@contextmanager
def _connect_to_cluster(address: str) -> Iterator["Client"]:
    from dask.distributed import Client

    try:
        client = Client(address, timeout=CONNECT_TIMEOUT, set_as_default=False)
    except (OSError, TimeoutError) as error:
        raise UserError(f"no dask scheduler answers at {address} ({error}); start one, or check the address") from None
    except Exception as error:  # dask raises many types for an address that it cannot use
        raise UserError(
            f"--scheduler {address} cannot be used ({describe_exception(error)}); name a tcp:// address of a scheduler"
        ) from error
    with client:
        if not client.scheduler_info()["workers"]:
            raise UserError(f"the dask scheduler at {address} has no workers; start some: dask worker {address}")
        yield client


@contextmanager
def _start_processes(count: str) -> Iterator["Client"]:
    from dask.distributed import Client

    with _local_cluster(int(count)) as cluster, Client(cluster, set_as_default=False) as client:
        yield client


def _local_cluster(count: int) -> "LocalCluster":
    """A dask cluster of processes on this machine. Raises UserError if they do not start in RETRIES + 1 attempts."""
    from dask.distributed import LocalCluster

    why = ""
    for _ in range(RETRIES + 1):
        try:
            return LocalCluster(
                n_workers=count,
                threads_per_worker=1,
                processes=True,
                silence_logs=SILENT,
                dashboard_address="127.0.0.1:0",  # any free port, so that two exports on one machine do not collide
            )
        except RuntimeError as error:  # dask's error for a process that ended before it was a worker
            why = str(error.__cause__ or error)
    raise UserError(f"the processes of --scheduler processes:{count} do not start ({why}); is memory short? Try fewer")


def _require_connection(client: "Client", scheduler: str) -> None:
    if client.status != "running":
        raise UserError(
            f"the connection to the dask scheduler {scheduler} has ended; what is done is kept, repeat the command to "
            "continue"
        )


def worker_number() -> int:
    """The number in the name of the dask worker that runs this task, 0 if there is none: it selects the GPU."""
    from dask.distributed import get_worker

    try:
        name = str(get_worker().name)
    except ValueError:  # not in a task
        return 0
    digits = "".join(character for character in name.rpartition("-")[2] if character in "0123456789")
    return int(digits[:9] or 0)
