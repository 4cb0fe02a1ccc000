"""One writer at a time: who writes into a store says so in it, and again every few seconds.

A lease keeps two exports by mistake apart. It is not what keeps the store whole: a writer that was
suspended for long goes on beside its successor until it notices. Therefore every shard is read back
after it was written (`compress_ssl.pipeline.extraction.embed`).
"""

import json
import os
import platform
import secrets
import threading
import time
from typing import Any

from compress_ssl.pipeline.runtime.artifact import LEASE, canonical
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.process import RUNS, began, machine
from compress_ssl.pipeline.runtime.progress import echo
from compress_ssl.pipeline.runtime.storage import Storage

RENEW_INTERVAL = 15.0  # seconds between signs of life
STALE_AFTER = 120.0  # seconds without one after which a holder on another machine counts as gone
WATCH_TIME = 20.0  # seconds to watch such a lease before it is taken: clocks differ between machines
TAKEOVER_DELAY = 0.2  # seconds in which another who takes over the same lease at the same time shows


class Lease:
    """`with Lease(storage) as lease:` the only writer, until `lease.lost`.

    Raises UserError if somebody alive holds it. The lease of a process of this machine that has ended
    is taken at once.
    """

    def __init__(self, storage: Storage):
        self.storage, self.lost = storage, False
        pid = os.getpid()
        self.holder = {"host": platform.node(), "pid": pid, "machine": machine(), "began": began(pid)}
        self.holder["token"] = secrets.token_hex(8)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        self._take()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._is_mine():
            self.storage.delete(LEASE)

    def check(self) -> None:
        """Raises UserError if somebody else has taken over."""
        if self.lost:
            raise UserError(
                f"{self.storage} was taken over by {_who(read(self.storage))} while this process gave no sign of life; "
                "what is stored stays valid, let that one finish"
            )

    def _take(self) -> None:
        taken = False
        for _ in range(5):
            if self.storage.put_new(LEASE, self._to_bytes()):
                if taken:
                    time.sleep(TAKEOVER_DELAY)
                if self._is_mine():
                    return
            elif there := read(self.storage):
                _require_gone(self.storage, there)
                if read(self.storage) == there:
                    self.storage.delete(LEASE)
                    taken = True
        raise UserError(f"{self.storage}: others take it over at the same time; see which of them goes on")

    def _to_bytes(self) -> bytes:
        return canonical({**self.holder, "beat": time.time()}) + b"\n"

    def _is_mine(self) -> bool:
        return (read(self.storage) or {}).get("token") == self.holder["token"]

    def _renew(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(RENEW_INTERVAL):
            try:
                if not self._is_mine():
                    self.lost = True
                    return
                self.storage.put(LEASE, self._to_bytes())
                last = time.monotonic()
            except (UserError, OSError):  # no answer, or no room: the writer meets the same and says so
                if time.monotonic() - last > STALE_AFTER:
                    self.lost = True
                    return


def require_free(storage: Storage) -> None:
    """Raises UserError if somebody alive holds the lease."""
    if there := read(storage):
        _require_gone(storage, there)


def _require_gone(storage: Storage, there: dict[str, Any]) -> None:
    silent = max(0.0, time.time() - there["beat"])
    here = there["machine"] == machine()
    if not here and silent >= STALE_AFTER:
        echo(f"{storage}: {_who(there)} gave no sign of life for {silent:.0f} s; watching for {WATCH_TIME:g} s more")
        time.sleep(WATCH_TIME)
        if read(storage) in (there, None):
            return
    elif here and began(there["pid"]) not in (there["began"], RUNS):
        return
    how = "stop it first" if here else f"stop it there first; if it is gone, repeat this command in {STALE_AFTER:g} s"
    raise UserError(
        f"{storage} is being written by {_who(there)} (last sign of life {silent:.0f} s ago); "
        f"wait until it ends, or {how}"
    )


def _who(there: dict[str, Any] | None) -> str:
    return f"process {there['pid']} on {there['host']}" if there else "another process"


def read(storage: Storage) -> dict[str, Any] | None:
    """The lease that is there; None if there is none, or none that can be read."""
    try:
        there = json.loads(storage.get(LEASE))
        if {"host", "pid", "machine", "began", "token", "beat"} <= set(there):
            return there
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        pass
    storage.delete(LEASE)  # damaged: nobody's
    return None
