"""A lease that lets one process at a time write to a folder.

The writer puts lease.json into the folder and renews it every RENEW_INTERVAL seconds. The lease prevents two
exports from writing to one store by mistake. It does not guarantee that the store stays valid: a writer that was
suspended longer than STALE_AFTER continues to write beside its successor until it next reads the lease.
For that reason every shard is read back after it has been written (`compress_ssl.pipeline.extraction.shard_writer`).
"""

import os
import platform
import secrets
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.artifact import LEASE
from compress_ssl.pipeline.runtime.digests import canonical
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.process import RUNNING, machine_id, start_time
from compress_ssl.pipeline.runtime.progress import echo
from compress_ssl.pipeline.runtime.records import InvalidRecord, Meta, parse_json, read_record, to_json
from compress_ssl.pipeline.runtime.storage import Storage, open_storage

RENEW_INTERVAL = 15.0  # seconds between two renewals by the holder
STALE_AFTER = 120.0  # seconds without a renewal (8 are missed) after which a lease of another machine may be stale
WATCH_TIME = 20.0  # seconds to watch a stale lease before a takeover: longer than RENEW_INTERVAL, as clocks may differ
TAKEOVER_DELAY = 0.2  # seconds to wait after a takeover, so that a concurrent takeover becomes visible
TAKE_ATTEMPTS = 5  # attempts to take the lease before concurrent takeovers are reported as an error

Time = Annotated[int, Meta(ge=0, le=10**12)] | Annotated[float, Meta(ge=0, le=1e12)]  # Unix time in seconds


@dataclass(frozen=True)
class LeaseRecord:
    """The contents of lease.json: the process that holds the lease and when it last renewed it."""

    host: str
    pid: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    machine: str  # see `runtime.process.machine_id`
    began: str | None  # see `runtime.process.start_time`
    token: str  # random, so that two leases of one process differ
    beat: Time = 0  # of the last renewal, by the holder's clock


class Lease:
    """The right to write to a storage: `with Lease(storage) as lease:`.

    Within the block this process is the only writer, until `lease.lost` is True. A loop that writes calls
    `lease.check()` before each write. Entering the block raises UserError if a running process holds the lease;
    a lease of an ended process of this machine is taken over without waiting.
    """

    def __init__(self, storage: Storage):
        self.storage, self.lost = storage, False
        pid = os.getpid()
        self.holder = LeaseRecord(platform.node(), pid, machine_id(), start_time(pid), secrets.token_hex(8))
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
        """Raise UserError if another process has taken over the lease."""
        if self.lost:
            raise UserError(
                f"{self.storage} was taken over by {_describe_holder(read(self.storage))} while this process did "
                "not renew its lease; what is stored stays valid, let that one finish"
            )

    def _take(self) -> None:
        """Write lease.json if there is none, or replace one whose holder is gone. Raises UserError."""
        took_over = False
        for _ in range(TAKE_ATTEMPTS):
            if self.storage.put_new(LEASE, self._to_bytes()):
                if took_over:
                    time.sleep(TAKEOVER_DELAY)
                if self._is_mine():
                    return
                continue
            there = read(self.storage)
            if there is None:
                continue  # it was damaged, or its holder has deleted it since
            _require_gone(self.storage, there)
            if read(self.storage) == there:
                self.storage.delete(LEASE)
                took_over = True
        raise UserError(
            f"{self.storage}: other processes take over its lease at the same time; "
            "let the one that continues finish, then repeat this command"
        )

    def _to_bytes(self) -> bytes:
        return canonical(to_json(replace(self.holder, beat=time.time()))) + b"\n"

    def _is_mine(self) -> bool:
        there = read(self.storage)
        return there is not None and there.token == self.holder.token

    def _renew(self) -> None:
        """Renew the lease until the block ends; runs in a thread.

        Sets `lost` when another process holds the lease, or when no renewal succeeded for STALE_AFTER seconds.
        """
        last = time.monotonic()
        while not self._ended.wait(RENEW_INTERVAL):
            try:
                if not self._is_mine():
                    self.lost = True
                    return
                self.storage.put(LEASE, self._to_bytes())
                last = time.monotonic()
            except (UserError, OSError):  # the storage fails: the writer gets the same error and reports it
                if time.monotonic() - last > STALE_AFTER:
                    self.lost = True
                    return


def require_free(storage: Storage) -> None:
    """Raise UserError if a running process holds the lease."""
    there = read(storage)
    if there:
        _require_gone(storage, there)


def set_aside(where: str | Path, kind: str) -> None:
    """For --overwrite: rename the artifact of this kind in a folder and print the new name; nothing if there is none.

    Raises UserError if another process is writing to it, and for what `artifact.move_aside` refuses.
    """
    artifact.replaceable(where, kind)  # first: a file or a foreign folder has no lease to read
    require_free(open_storage(where))
    renamed = artifact.move_aside(where, kind)
    if renamed:
        echo(f"set the earlier {where} aside as {renamed}")


def _require_gone(storage: Storage, there: LeaseRecord) -> None:
    """Raise UserError unless the holder of the lease `there` is known to be gone.

    On this machine the process table decides. On another machine only time can: the lease must be stale by its own
    time stamp, or have one that is as far in the future, which no clock of ours can judge. It must then stay
    unchanged for WATCH_TIME seconds, measured with the clock of this machine.
    """
    age = time.time() - there.beat
    here = there.machine == machine_id()
    if not here and abs(age) >= STALE_AFTER:
        silence = f"gave no sign of life for {age:.0f} s" if age > 0 else f"has a clock that is {-age:.0f} s ahead"
        echo(f"{storage}: {_describe_holder(there)} {silence}; watching its lease for {WATCH_TIME:g} s more")
        time.sleep(WATCH_TIME)
        if read(storage) in (there, None):
            return
    elif here and start_time(there.pid) not in (there.began, RUNNING):
        return
    how = "stop it first" if here else f"stop it there first; if it is gone, repeat this command in {STALE_AFTER:g} s"
    raise UserError(
        f"{storage} is being written by {_describe_holder(there)} (last sign of life {max(0.0, age):.0f} s ago); "
        f"wait until it ends, or {how}"
    )


def _describe_holder(there: LeaseRecord | None) -> str:
    return f"process {there.pid} on {there.host}" if there else "another process"


def read(storage: Storage) -> LeaseRecord | None:
    """The current lease; None if there is none. A damaged lease.json belongs to nobody: it is deleted."""
    where = f"{storage}/{LEASE}"
    try:
        return read_record(LeaseRecord, parse_json(storage.get(LEASE), where), where, ignore_unknown=True)
    except FileNotFoundError:
        return None
    except InvalidRecord:
        storage.delete(LEASE)
        return None
