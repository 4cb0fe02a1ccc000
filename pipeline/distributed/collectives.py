"""Ranks: processes that train together. Rank r of N has images r, r + N, ... of every step.

Without torch.distributed there is one rank, and everything here is the identity. Tensors go over
NCCL on CUDA; numbers go over gloo, also between GPUs, because gloo raises an error at once when a rank has ended.
"""

import os
import signal
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar, cast

import torch
from torch import Tensor, distributed, nn

from compress_ssl.pipeline.distributed import launch
from compress_ssl.pipeline.runtime import launch_env
from compress_ssl.pipeline.runtime.device import choose_device
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.formatting import describe_exception
from compress_ssl.pipeline.runtime.signals import Interrupted, StopRequest

M = TypeVar("M", bound=nn.Module)

TIMEOUT = timedelta(hours=2)  # the others wait while rank 0 saves or evaluates --val; gloo detects a lost rank sooner
REPORT_DELAY = 3.0  # seconds that a rank with a lost connection leaves to the rank that failed to report its error


def world_size() -> int:
    """How many processes train together; 1 without torch.distributed."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """The number of this process among them. Only rank 0 writes files."""
    return distributed.get_rank() if distributed.is_initialized() else 0


# ---------------------------------------------------------------- tensors


def gather(rows: Tensor) -> Tensor:
    """The (B, ...) rows of the whole step from each rank's (B / N, ...), in the order of one process, with gradients.

    A gradient is the sum over the ranks' losses. If each of them computes the loss of the whole step,
    averaging the gradients of weights over ranks, as `wrap_ddp` does, gives the gradient of that loss.
    """
    if world_size() == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world_size())]
        distributed.all_gather(parts, rows.contiguous())
        return torch.stack(parts, 1).flatten(0, 1)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        whole = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(whole)
        return whole[rank() :: world_size()]


def wrap_ddp(module: nn.Module) -> nn.Module:
    """The module, wrapped so that its backward pass averages gradients over ranks; buffers are not synchronised.

    A parameter that no rank uses has no gradient, as in one process.
    """
    if world_size() == 1:
        return module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has another name from torch 2.15 on
        return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False, find_unused_parameters=True)


def convert_sync_batchnorm(module: M, device: torch.device) -> M:
    """The module with batch norm over the batches of all ranks. Raises UserError on the CPU."""
    if world_size() == 1:
        return module
    if device.type != "cuda":
        raise UserError("--sync-bn needs CUDA devices: torch has no synchronised batch norm for the CPU; leave it out")
    from timm.layers import convert_sync_batchnorm  # also converts timm's batch norms with an activation

    return cast(M, convert_sync_batchnorm(module))  # another class only for a module that is itself a batch norm


# ---------------------------------------------------------------- numbers


def all_reduce_mean(values: Sequence[float]) -> list[float]:
    """The mean of each number over ranks. If a number is not finite on one rank, its mean is not finite on all."""
    if world_size() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(sums)
    return (sums / world_size()).tolist()


def all_reduce_max(value: int) -> int:
    """The largest number of any rank. All ranks must call this; it raises RuntimeError if one of them has ended."""
    if world_size() == 1:
        return value
    number = torch.tensor([value])
    distributed.all_reduce(number, distributed.ReduceOp.MAX)
    return int(number)


def barrier() -> None:
    """Wait until every rank has come here. Raises RuntimeError if a rank has ended: gloo notices at once."""
    all_reduce_max(0)


def broadcast(value: int) -> int:
    """The number that rank 0 passed; all ranks must call this."""
    if world_size() == 1:
        return value
    number = torch.tensor([value])
    distributed.broadcast(number, 0)
    return int(number)


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Run the block in rank 0, then in the first rank of each other machine, then in the rest: for files they share."""
    turn = 0 if rank() == 0 else 1 if launch_env.local_rank() == 0 else 2
    for _ in range(turn):
        barrier()
    yield
    for _ in range(2 - turn):
        barrier()


class SharedStopRequest:
    """Makes all ranks stop at the same step when any of them received a signal."""

    def __init__(self, request: StopRequest):
        self.request, self.parent = request, os.getppid()

    def signum(self) -> int:
        """The signal's number, the same on all ranks; 0 for none. All ranks must call this at the same step."""
        # When the launcher was killed, its ranks must end, so that the repeated command is the only one that trains.
        is_orphan = world_size() > 1 and os.getppid() != self.parent
        return all_reduce_max(self.request.signum or (signal.SIGTERM if is_orphan else 0))


# ---------------------------------------------------------------- beginning and end


@contextmanager
def process_group() -> Iterator[None]:
    """While the block runs, processes that were started together are ranks. A process started alone is not changed.

    An exception in one rank ends all of them. The rank that fails first raises its exception; the others raise
    SystemExit, so that the error is printed once.
    """
    launched = launch_env.read_launch()
    if launched is None or distributed.is_initialized():
        yield
        return
    number = launched.rank
    store = _join(launched)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, launch.SIGNALS)  # blocked by `launch_ranks` until now
        yield
    except BaseException as end:
        lost = isinstance(end, RuntimeError) and any(word in str(end) for word in ("gloo", "NCCL", "Connection"))
        if lost:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it to the other ranks when one has failed
            time.sleep(REPORT_DELAY)
        if not _claim_report(store):
            signum = end.signum if isinstance(end, Interrupted) else isinstance(end, KeyboardInterrupt) * signal.SIGINT
            raise SystemExit(128 + signum if signum else 2) from None
        if lost:
            raise UserError(
                f"rank {number} lost the connection to another, which ended; repeat the command to go on from the last "
                f"checkpoint ({' '.join(str(end).split())[:120]})"
            ) from None
        raise
    distributed.destroy_process_group()


def _join(launched: launch_env.Launch) -> distributed.Store:
    """Start torch.distributed with the other ranks; returns the store that all of them share.

    Raises UserError if the store cannot be reached, or if a rank ends meanwhile.
    """
    try:
        common, number, count = next(iter(distributed.rendezvous("env://", timeout=TIMEOUT)))
        # The same store, without the prefix that torchrun may put before the names of keys in `common`.
        store = distributed.TCPStore(launched.address, launched.port, is_master=False)
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=distributed.PrefixStore(agree_on_attempt(common, number, count), common),
            rank=number,
            world_size=count,
            timeout=TIMEOUT,
        )
    except RuntimeError as problem:  # torch's DistError is one, and so is gloo's
        raise UserError(
            f"rank {launched.rank} cannot join the others by way of {launched.address}:{launched.port} "
            f"({describe_exception(problem)}); check MASTER_ADDR and MASTER_PORT, and that every rank was started"
        ) from problem
    return store


def agree_on_attempt(common: distributed.Store, number: int, count: int) -> str:
    """A name that is the same on all ranks and that no earlier attempt had.

    When torchrun starts ranks again, it keeps its store, which still has the addresses of the ranks that ended.
    TORCHELASTIC_RESTART_COUNT cannot be the name: it does not change on a machine whose ranks did not fail.
    """
    mine = uuid.uuid4().hex
    common.set(f"here-{number}", mine)
    if number == 0:
        while common.add(mine, 0) < count - 1:  # repeat until each rank found its own entry: others may be old
            common.set("roll", " ".join(common.get(f"here-{n}").decode() for n in range(count)))
            time.sleep(0.02)
        return mine
    roll = common.get("roll").decode().split()
    while mine not in roll:
        time.sleep(0.02)
        roll = common.get("roll").decode().split()
    common.add(roll[0], 1)
    return roll[0]


def _claim_report(store: distributed.Store) -> bool:
    """Whether this rank is the one that prints the error: no other rank has claimed it before."""
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        return store.add(launch.ERROR_REPORTED + restarts, 1) == 1
    except RuntimeError:  # the process with the store has ended: the launcher, or rank 0 after it reported its error
        return launch_env.is_main_process()


def rank_device(name: str) -> torch.device:
    """The device of this rank. Several ranks on a machine have a GPU each, or share the CPU."""
    chosen = choose_device(name, launch_env.local_rank() if world_size() > 1 else None)
    if world_size() > 1 and chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    return chosen
