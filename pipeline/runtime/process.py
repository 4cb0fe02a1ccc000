"""The identity of this machine, and whether one of its processes is still running."""

import os
import platform
from pathlib import Path

RUNNING = "runs"
"""Result of `start_time` for a running process whose start time cannot be read."""


def machine_id() -> str:
    """An identifier of this boot of this machine and of the process's PID namespace; the host's name off Linux.

    Two processes with the same identifier can look each other up by PID. The namespace is part of it because each
    container numbers its own processes. psutil provides neither.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except (OSError, ValueError):  # no Linux, or a file that is no text
        return platform.node()


def start_time(pid: int) -> str | None:
    """The start time of a process of this machine in clock ticks since the boot; None if the process has ended.

    The start time tells a process from a later one with the same PID. The result is RUNNING if the process is running
    but its start time cannot be read (no Linux, or /proc hides it). Leases store this number, which is field 22 of
    /proc/PID/stat and never changes. psutil adds the boot time, which changes when the clock is set, so it is
    subtracted again.
    """
    import psutil  # inside the function, because `compress --help` must not wait for this import

    if not 0 < pid < 2**31:  # a damaged lease or file name: no process has this number
        return None
    try:
        while True:
            boot = psutil.boot_time()  # read before Process(), which reuses the value in psutil 6
            process = psutil.Process(pid)
            if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                return None
            if not psutil.LINUX:
                return RUNNING
            ticks = round((process.create_time() - boot) * os.sysconf("SC_CLK_TCK"))
            if psutil.boot_time() == boot:  # otherwise the clock was set between the two readings
                return str(ticks)
    except (psutil.Error, OSError, RuntimeError, ValueError, LookupError):
        return _runs(pid)  # the process has ended, or /proc is missing, hides it or holds something unexpected


def _runs(pid: int) -> str | None:
    """RUNNING if a process with this PID is running, else None.

    psutil.pid_exists cannot be used: it returns False where /proc hides the processes of other users.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # the process is running and belongs to another user
    return RUNNING
