"""Whether a process is running, and its start time: the same results, in the same form, as in version 1."""

import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from compress_ssl.pipeline.runtime import lease
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.process import RUNNING, machine_id, start_time
from compress_ssl.pipeline.runtime.storage import Folder

linux = pytest.mark.skipif(not psutil.LINUX, reason="ticks are Linux's")
ME = os.getpid()


def version_1(pid: int) -> str | None:
    """`start_time` as it was in version 1."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except OSError:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return RUNNING


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    words = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline()
        yield process
        process.kill()


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that psutil takes for /proc: it holds the boot time, and no process."""
    there = tmp_path / "proc"
    there.mkdir()
    shutil.copyfile("/proc/stat", there / "stat")
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(there))
    return there


def show(proc: Path, name: str = "python") -> None:
    """Put this process into the folder, under this name."""
    (proc / str(ME)).mkdir(exist_ok=True)
    ours = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2]
    (proc / str(ME) / "stat").write_text(f"{ME} ({name}){ours}")


def set_clock(proc: Path, seconds: int) -> None:
    lines = (proc / "stat").read_text().splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("btime"))
    lines[at] = f"btime {int(lines[at].split()[1]) + seconds}"
    (proc / "stat").write_text("\n".join(lines))


@linux
def test_the_start_time_of_every_process_equals_that_of_version_1(child: subprocess.Popen[bytes]) -> None:
    compared = 0
    for pid in {*psutil.pids(), ME, child.pid}:
        before, now, after = version_1(pid), start_time(pid), version_1(pid)
        if before == after:  # else it ended meanwhile
            assert now == before, pid
            compared += 1
    assert compared >= 2 and str(start_time(ME)).isdigit()


def test_an_ended_process_has_no_start_time_even_as_a_zombie(child: subprocess.Popen[bytes]) -> None:
    assert start_time(child.pid)
    child.kill()
    until = time.monotonic() + 20
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < until:
        time.sleep(0.01)
    assert start_time(child.pid) is None
    child.wait()
    assert start_time(child.pid) is None


@linux
@pytest.mark.parametrize("seconds", [-1, 1, 86_400, -(10**9)])
def test_setting_the_clock_between_two_calls_changes_nothing(proc: Path, seconds: int) -> None:
    show(proc)
    set_clock(proc, seconds)
    assert start_time(ME) == version_1(ME)


@linux
def test_setting_the_clock_during_a_call_changes_nothing(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def status(self: psutil.Process) -> str:
        if not calls:
            set_clock(proc, 3600)
        calls.append("")
        return psutil.STATUS_RUNNING

    show(proc)
    monkeypatch.setattr(psutil.Process, "status", status)
    assert start_time(ME) == version_1(ME) and len(calls) == 2


@linux
def test_a_process_name_may_contain_spaces_and_brackets(proc: Path) -> None:
    show(proc, "a) Z (b c) X")
    assert start_time(ME) == version_1(ME)


@linux
@pytest.mark.parametrize(
    "content", [b"", b"\0", b"1 (x", b"1 (x) S", b"1 (x) S a b c d", b"\xff\xfe (\xff) R 1", b"9" * 5000]
)
def test_a_running_process_whose_entry_in_proc_is_odd_is_not_taken_for_ended(proc: Path, content: bytes) -> None:
    show(proc)
    (proc / str(ME) / "stat").write_bytes(content)
    assert start_time(ME) == RUNNING


@pytest.mark.parametrize("pid", [-1, 0, 2**31, 10**30])
def test_a_number_that_no_process_has_is_an_ended_process(pid: int) -> None:
    assert start_time(pid) is None


@linux
def test_a_boot_identifier_that_is_no_text_leaves_the_name_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: b"\xff".decode(encoding))
    assert machine_id() == platform.node()


@linux
def test_a_process_hidden_by_proc_is_running_with_unknown_start_time(
    proc: Path, child: subprocess.Popen[bytes]
) -> None:
    assert not psutil.pid_exists(ME)  # why this is not what we ask
    assert start_time(ME) == RUNNING and start_time(child.pid) == RUNNING and start_time(1) == RUNNING
    child.kill()
    child.wait()
    assert start_time(child.pid) is None


@linux
@pytest.mark.parametrize("stat", [None, "cpu 1 2 3\n"])
def test_without_a_boot_time_a_process_is_running_with_unknown_start_time(proc: Path, stat: str | None) -> None:
    show(proc)
    (proc / "stat").unlink() if stat is None else (proc / "stat").write_text(stat)
    assert start_time(ME) == RUNNING


def test_without_clock_ticks_a_process_is_running_with_unknown_start_time(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.LINUX", False)
    assert start_time(ME) == RUNNING and start_time(child.pid) == RUNNING
    child.kill()
    child.wait()
    assert start_time(child.pid) is None


@linux
def test_leases_of_version_1_and_of_this_version_are_treated_alike(
    child: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Folder(tmp_path)
    ticks = {"old": version_1(child.pid), "new": start_time(child.pid)}
    for writer in ("old", "new"):
        for reader in (version_1, start_time):
            monkeypatch.setattr(lease, "start_time", reader)
            there = {"host": "here", "machine": machine_id(), "token": "x", "beat": time.time()}
            for start, pid, alive in ((ticks[writer], child.pid, True), ("12345", ME, False)):  # used again
                storage.put(lease.LEASE, lease.canonical({**there, "pid": pid, "began": start}))
                if alive:
                    with pytest.raises(UserError, match=f"is being written by process {pid}"):
                        lease.require_free(storage)
                else:
                    lease.require_free(storage)
    child.kill()
    child.wait()
    for start in ticks.values():
        storage.put(lease.LEASE, lease.canonical({**there, "pid": child.pid, "began": start}))
        lease.require_free(storage)
