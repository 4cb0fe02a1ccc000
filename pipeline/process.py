"""Processes of this machine: which machine it is, and whether a process still runs."""

import os
import platform
from pathlib import Path


def machine() -> str:
    """This boot of this machine, and what process numbers mean in it: containers have their own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def began(pid: int) -> str | None:
    """When a process of this machine began, as the kernel counts; None if it has ended. Numbers are used again."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        fields = stat.rpartition(")")[2].split()  # from the third on: the second is a name, with any characters
        return None if fields[0] in "ZX" else fields[19]
    except FileNotFoundError:
        return None if Path("/proc/self/stat").exists() else _runs(pid)
    except ProcessLookupError:
        return None


def _runs(pid: int) -> str | None:
    """`began` where there is no /proc: only whether it runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "runs"
