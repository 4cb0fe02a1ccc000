"""Processes of this machine: which machine it is, and whether a process still runs."""

import os
import platform
from pathlib import Path

RUNS = "runs"
"""That a process runs, where nobody may know since when."""


def machine() -> str:
    """This boot of this machine, and what process numbers mean in it: containers have their own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def began(pid: int) -> str | None:
    """When a process of this machine began, in ticks, or RUNS; None if it has ended. Numbers are used again."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        fields = stat.rpartition(")")[2].split()  # from the third on: the second is a name, with any characters
        return None if fields[0] in "ZX" else fields[19]
    except OSError:  # there is no /proc, or it hides other users' processes
        return _runs(pid)


def _runs(pid: int) -> str | None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return RUNS
