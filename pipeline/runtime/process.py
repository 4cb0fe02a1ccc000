"""Processes of this machine: which machine it is, and whether a process still runs."""

import os
import platform
from pathlib import Path

RUNS = "runs"
"""That a process runs, where nobody may know since when."""


def machine() -> str:
    """This boot of this machine, and what process numbers mean in it: containers have their own.

    psutil tells neither.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def began(pid: int) -> str | None:
    """When a process of this machine began, in ticks, or RUNS; None if it has ended. Numbers are used again.

    Leases hold ticks since the boot, field 22 of /proc/PID/stat, which never change. psutil adds the
    boot time, which changes when the clock is set; it is subtracted again. Only Linux counts ticks.
    """
    import psutil  # not above, so that `compress --help` does not wait for it

    try:
        while True:
            boot = psutil.boot_time()  # before Process(), which reuses it in psutil 6
            process = psutil.Process(pid)
            if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                return None
            if not psutil.LINUX:
                return RUNS
            ticks = round((process.create_time() - boot) * os.sysconf("SC_CLK_TCK"))
            if psutil.boot_time() == boot:  # else the clock was set in between
                return str(ticks)
    except (psutil.Error, OSError, RuntimeError):  # it has ended, or /proc is hidden in part or not there
        return _runs(pid)


def _runs(pid: int) -> str | None:
    """RUNS or None. psutil.pid_exists will not do: it says no where /proc hides other users' processes."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return RUNS
