"""Ranks, the processes that train together: the variables torchrun sets for each; starting ranks on this machine."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import IO

from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.records import JsonObject

PROGRAM = ("-P", "-m", "compress_ssl.cli")
"""Arguments of Python that run a rank. -P keeps the current folder off the front of sys.path, where a user's typer.py
would come before the installed one."""
EXIT_GRACE = 15.0  # seconds that the other ranks have to end by themselves after one has failed
ERROR_REPORTED = "error-reported"  # counter in the TCPStore; the rank that raises it to 1 prints the error
SIGNALS = (signal.SIGINT, signal.SIGTERM)  # `launch_ranks` passes these on to the ranks


def launch_ranks(count: int, words: Sequence[str]) -> JsonObject:
    """Run `compress WORDS` as `count` ranks on this machine; returns the JSON result of rank 0.

    SIGINT and SIGTERM are passed on to all ranks. Raises SystemExit with the status of the rank that failed
    first if a rank has printed the error; raises UserError if that rank was killed by a signal.
    """
    # torch's elastic launcher sends SIGTERM to the other ranks before this process sees which rank failed, so that
    # one of them may report a lost connection instead. docs/distributed.md: "Why not torch's elastic launcher".
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryFile() as output, _forwarding_signals(ranks):
        _spawn(ranks, count, [sys.executable, *PROGRAM, *words, "--json"], store.port, output)
        failed = _first_to_fail(ranks)
        if failed is None:
            output.seek(0)
            result: JsonObject = json.loads(output.read().splitlines()[-1])
            return result
        status = ranks[failed].returncode
        unreported = status < 0 and store.add(f"{ERROR_REPORTED}0", 1) == 1
        _wait(ranks, time.monotonic() + EXIT_GRACE)
    if unreported:
        raise UserError(
            f"rank {failed} was killed by {_signal_name(-status)}; repeat the command to go on from the last checkpoint"
        )
    raise SystemExit(status if status > 0 else 128 - status)


def _spawn(
    ranks: list[subprocess.Popen[bytes]], count: int, command: Sequence[str], port: int, output: IO[bytes]
) -> None:
    """Start `count` processes and append them to `ranks`; the standard output of rank 0 goes to `output`."""
    from compress_ssl.pipeline.runtime.device import available_cores

    shared = {
        "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, available_cores() // count))),
    }  # fmt: skip
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # ranks inherit this; `collectives.process_group` unblocks
    for number in range(count):
        ranks.append(
            subprocess.Popen(
                command,
                env={**os.environ, **shared, "RANK": str(number), "LOCAL_RANK": str(number)},
                stdout=output if number == 0 else 2,  # only rank 0 has a result; other output goes to stderr
                start_new_session=True,  # a terminal's Ctrl-C must reach ranks only once, through this process
            )
        )
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _first_to_fail(ranks: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait until a rank fails, and return its number; None when all ranks have ended with status 0."""
    while True:
        statuses = [rank.poll() for rank in ranks]
        if any(statuses):
            return next(number for number, status in enumerate(statuses) if status)
        if None not in statuses:
            return None
        time.sleep(0.05)


def _wait(ranks: Sequence[subprocess.Popen[bytes]], until: float) -> None:
    """Return when all ranks have ended, or when time.monotonic() is `until`."""
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < until:
        time.sleep(0.05)


def _signal_name(signum: int) -> str:
    """`SIGKILL`; real-time signals have only a number."""
    return signal.Signals(signum).name if signum in set(signal.Signals) else f"signal {signum}"


@contextmanager
def _forwarding_signals(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """While the block runs, pass SIGINT and SIGTERM on to the ranks; at its end, kill the ranks that still run."""

    def pass_on(signum: int, _: FrameType | None) -> None:
        for rank in ranks:
            rank.send_signal(signum)

    before = {signum: signal.signal(signum, pass_on) for signum in SIGNALS}
    try:
        yield
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
        for signum, handler in before.items():
            signal.signal(signum, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # still blocked if a process could not be started
