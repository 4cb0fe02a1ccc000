"""Several processes that train together: what torchrun tells each of them, and starting them on this machine."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from compress_ssl.pipeline.runtime.errors import UserError

PROGRAM = ("-m", "compress_ssl.cli")
EXIT_GRACE = 15.0  # seconds that ranks have to notice that one of them failed
ERROR_REPORTED = "said"  # with the attempt's number a key of the common store: who first counts it up says why all end


def launch_ranks(count: int, words: Sequence[str]) -> dict[str, Any]:
    """`compress WORDS` as `count` ranks on this machine -> what rank 0 made.

    Signals are passed on to all. Raises SystemExit with the status of a rank that failed, which has
    said why itself, UserError if one was killed.
    """
    from torch.distributed import TCPStore

    from compress_ssl.pipeline.runtime.device import available_cores

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, available_cores() // count))),
    }  # fmt: skip
    command = [sys.executable, *PROGRAM, *words, "--json"]
    with tempfile.TemporaryFile() as made:
        ranks = [
            subprocess.Popen(
                command,
                env={**os.environ, **shared, "RANK": str(number), "LOCAL_RANK": str(number)},
                stdout=made if number == 0 else 2,  # what else is printed is no result
                start_new_session=True,  # a terminal's Ctrl-C comes once, from here
            )
            for number in range(count)
        ]
        with _forwarding_signals(ranks):
            failed = _first_to_fail(ranks)
            if failed is None:
                made.seek(0)
                return json.loads(made.read().splitlines()[-1])
            status = ranks[failed].returncode
            unheard = status < 0 and store.add(f"{ERROR_REPORTED}0", 1) == 1
            _wait(ranks, time.monotonic() + EXIT_GRACE)
    if unheard:
        name = signal.Signals(-status).name
        raise UserError(f"rank {failed} was killed by {name}; repeat the command to go on from the last checkpoint")
    raise SystemExit(status if status > 0 else 128 - status)


def _first_to_fail(ranks: Sequence[subprocess.Popen]) -> int | None:
    """The number of the first rank that failed; None when all have ended well."""
    while True:
        ended = [rank.poll() for rank in ranks]
        if any(ended):
            return next(number for number, status in enumerate(ended) if status)
        if None not in ended:
            return None
        time.sleep(0.05)


def _wait(ranks: Sequence[subprocess.Popen], until: float) -> None:
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < until:
        time.sleep(0.05)


@contextmanager
def _forwarding_signals(ranks: Sequence[subprocess.Popen]) -> Iterator[None]:
    """SIGINT and SIGTERM go to the ranks, which decide. None of them outlives the block."""

    def pass_on(signum: int, _: Any) -> None:
        for rank in ranks:
            rank.send_signal(signum)

    before = {signum: signal.signal(signum, pass_on) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
        for signum, handler in before.items():
            signal.signal(signum, handler)
