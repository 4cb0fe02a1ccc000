"""Ranks: processes that train together. Rank r of N has images r, r + N, ... of every step.

Without torch.distributed there is one rank, and everything here is the identity. Tensors go over
NCCL on CUDA; numbers go over gloo, also between GPUs, because gloo notices at once when a rank is gone.
"""

import os
import signal
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn

from compress_ssl.pipeline.distributed import launch
from compress_ssl.pipeline.runtime import launch_env
from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.device import choose_device
from compress_ssl.pipeline.runtime.signals import Interrupted, StopRequest

TIMEOUT = timedelta(hours=2)  # others wait while rank 0 saves or looks at --val; who is gone is noticed otherwise
ERROR_GRACE = 3.0  # seconds for the rank that failed to say why, before another says that it is gone


def world_size() -> int:
    """Processes that train together; 1 without torch.distributed."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """The number of this process among them. Rank 0 is the one that writes."""
    return distributed.get_rank() if distributed.is_initialized() else 0


# ---------------------------------------------------------------- tensors


def gather(rows: Tensor) -> Tensor:
    """The (B, ...) rows of the whole step from each rank's (B / N, ...), in the order of one process, with gradients.

    A gradient is the sum over the ranks' losses. If each of them computes the loss of the whole step,
    averaging the gradients of weights over ranks, as `averaged` does, makes it that loss's.
    """
    if world_size() == 1:
        return rows
    return _Gather.apply(rows)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world_size())]
        distributed.all_gather(parts, rows.contiguous())
        return torch.stack(parts, 1).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        whole = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(whole)
        return whole[rank() :: world_size()]


def wrap_ddp(module: nn.Module) -> nn.Module:
    """The module, whose backward pass leaves the mean gradient over ranks; buffers are each rank's own.

    A parameter that no rank uses has no gradient, as in one process.
    """
    if world_size() == 1:
        return module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has another name from torch 2.15 on
        return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False, find_unused_parameters=True)


def convert_sync_batchnorm(module: nn.Module, device: torch.device) -> Any:
    """The module with batch norm over the batches of all ranks. Raises UserError on the CPU."""
    if world_size() == 1:
        return module
    if device.type != "cuda":
        raise UserError("--sync-bn needs CUDA devices: torch has no synchronised batch norm for the CPU; leave it out")
    from timm.layers import convert_sync_batchnorm  # knows batch norms that hold an activation, too

    return convert_sync_batchnorm(module)


# ---------------------------------------------------------------- numbers


def all_reduce_mean(values: Sequence[float]) -> list[float]:
    """The mean of each number over ranks; not finite on all of them if it is not on one."""
    if world_size() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(sums)
    return (sums / world_size()).tolist()


def all_reduce_max(value: int) -> int:
    """Maximum over ranks. Also a barrier: fails if a rank has ended."""
    if world_size() == 1:
        return value
    told = torch.tensor([value])
    distributed.all_reduce(told, distributed.ReduceOp.MAX)
    return int(told)


def barrier() -> None:
    """Wait until every rank has come here. Raises RuntimeError if a rank has ended: gloo notices at once."""
    all_reduce_max(0)


def broadcast(value: int) -> int:
    """Rank 0's number."""
    if world_size() == 1:
        return value
    said = torch.tensor([value])
    distributed.broadcast(said, 0)
    return int(said)


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """For files that ranks share: the block runs in rank 0, then in the first of each other machine, then in all."""
    turn = 0 if rank() == 0 else 1 if launch_env.local_rank() == 0 else 2
    for _ in range(turn):
        barrier()
    yield
    for _ in range(2 - turn):
        barrier()


class StopOfAnyRank:
    """What a signal to any of the ranks asks of all."""

    def __init__(self, interrupt: StopRequest):
        self.interrupt, self.parent = interrupt, os.getppid()

    def asked(self) -> int:
        """The signal's number, on all ranks the same; 0 for none. To be asked by all at the same step."""
        orphan = world_size() > 1 and os.getppid() != self.parent  # the next to repeat the command must be alone
        return all_reduce_max(self.interrupt.signum or (signal.SIGTERM if orphan else 0))


# ---------------------------------------------------------------- beginning and end


@contextmanager
def process_group() -> Iterator[None]:
    """The processes that were started together are ranks while the block runs; one alone stays alone.

    What ends one of them ends all. The first to fail raises what it is; the others raise SystemExit,
    so that it is said once.
    """
    if not launch_env.is_launched() or distributed.is_initialized():
        yield
        return
    common, number, count = next(iter(distributed.rendezvous("env://", timeout=TIMEOUT)))
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    voice = distributed.TCPStore(address, port, is_master=False)  # the same store; torchrun may put its own names on it
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=distributed.PrefixStore(agree_on_attempt(common, number, count), common), rank=number, world_size=count,
        timeout=TIMEOUT,
    )  # fmt: skip
    try:
        yield
    except BaseException as end:
        lost = isinstance(end, RuntimeError) and any(word in str(end) for word in ("gloo", "NCCL", "Connection"))
        if lost:
            time.sleep(ERROR_GRACE)
        if not _first(voice):
            raise SystemExit(128 + end.signum if isinstance(end, Interrupted) else 2) from None
        if lost:
            raise UserError(
                f"rank {number} lost the connection to another, which ended; repeat the command to go on from the last "
                f"checkpoint ({' '.join(str(end).split())[:120]})"
            ) from None
        raise
    distributed.destroy_process_group()


def agree_on_attempt(common: distributed.Store, number: int, count: int) -> str:
    """A name that all ranks agree on and no earlier attempt had.

    torchrun's store outlives the ranks that it starts again, with the addresses of the dead in it. Its count of
    restarts will not do: on a machine that lost no rank it stays.
    """
    mine = uuid.uuid4().hex
    common.set(f"here-{number}", mine)
    if number == 0:
        while common.add(mine, 0) < count - 1:  # an entry may be a dead one's: until each has found itself
            common.set("roll", " ".join(common.get(f"here-{n}").decode() for n in range(count)))
            time.sleep(0.02)
        return mine
    while mine not in (roll := common.get("roll").decode().split()):
        time.sleep(0.02)
    common.add(roll[0], 1)
    return roll[0]


def _first(voice: distributed.Store) -> bool:
    """Whether no other rank has said why it ends."""
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        return voice.add(launch.ERROR_REPORTED + restarts, 1) == 1
    except RuntimeError:  # its host was killed, or is rank 0, which was heard
        return launch_env.is_main_process()


def rank_device(name: str) -> torch.device:
    """The device of this rank: of several on a machine each has its own GPU, or they share the CPU."""
    chosen = choose_device(name, launch_env.local_rank() if world_size() > 1 else None)
    if world_size() > 1 and chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    return chosen
