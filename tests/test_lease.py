"""Of two exports to one store one continues and the other names it in its error; the store stays valid in any case."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from compress_ssl.pipeline.runtime import artifact, lease
from compress_ssl.pipeline.runtime.artifact import LEASE
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.lease import Lease
from compress_ssl.pipeline.runtime.storage import Folder, Storage, open_storage
from compress_ssl.pipeline.store import integrity
from compress_ssl.stages import export_teacher, store_copy, verify

ROOT = Path(__file__).resolve().parent.parent
TEACHER = "convnet:channels=4+8,pretrained=false"


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "store") if request.param == "folder" else request.getfixturevalue("bucket") + "/store"


@pytest.fixture
def storage(place: str) -> Storage:
    return open_storage(place)


def another(storage: Storage, silent: float = 0.0, **changes: Any) -> dict[str, Any]:
    """Write the lease of a process on another machine, last renewed `silent` seconds ago."""
    there = {"host": "far", "pid": 7, "machine": "other", "began": "1", "token": "x", "beat": time.time() - silent}
    storage.put(LEASE, json.dumps(there | changes).encode())
    return there | changes


# ---------------------------------------------------------------- holding, releasing and taking over


def test_one_process_holds_the_lease_and_others_get_its_name(storage: Storage) -> None:
    with Lease(storage) as held:
        assert not held.lost
        with pytest.raises(UserError, match=rf"is being written by process {os.getpid()} on .*stop it first"):
            Lease(storage).__enter__()
        with pytest.raises(UserError, match="is being written by"):
            lease.require_free(storage)
    assert not storage.exists(LEASE)
    with Lease(storage):
        pass


def test_a_lease_is_released_at_the_end_of_the_block_also_after_an_error(storage: Storage) -> None:
    with pytest.raises(ZeroDivisionError), Lease(storage):
        raise ZeroDivisionError
    lease.require_free(storage)
    assert not storage.exists(LEASE)


def test_the_lease_of_an_ended_process_is_taken_without_waiting(storage: Storage) -> None:
    program = "import sys; from compress_ssl.pipeline.runtime.lease import Lease\n"
    program += "from compress_ssl.pipeline.runtime.storage import open_storage\n"
    program += "Lease(open_storage(sys.argv[1])).__enter__(); print('held', flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", program, str(storage)]
    with subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"process {holder.pid} "):
            Lease(storage).__enter__()
        holder.send_signal(signal.SIGKILL)
        while lease.start_time(holder.pid):  # a process that has ended and was not waited for counts as ended
            time.sleep(0.01)
        began = time.monotonic()
        with Lease(storage):
            assert time.monotonic() - began < 5


def test_a_later_process_with_the_same_pid_is_not_the_holder(storage: Storage) -> None:
    another(storage, machine=lease.machine_id(), pid=os.getpid(), began="12345")
    with Lease(storage) as held:
        assert held._is_mine()


def test_a_holder_whose_process_is_hidden_is_not_taken_for_ended(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    another(storage, machine=lease.machine_id(), pid=os.getpid(), began=lease.start_time(os.getpid()))
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))  # no process in it, as with hidepid
    with pytest.raises(UserError, match=f"is being written by process {os.getpid()}"):
        lease.require_free(storage)


def test_a_holder_on_another_machine_keeps_the_lease_while_it_is_not_stale(storage: Storage) -> None:
    for silent in (0, lease.STALE_AFTER / 2, -lease.STALE_AFTER / 2):  # also one whose clock is a little ahead
        another(storage, silent)
        with pytest.raises(UserError, match="process 7 on far"):
            Lease(storage).__enter__()


def test_a_stale_lease_of_another_machine_is_watched_and_then_taken(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(lease.time, "sleep", waited.append)
    another(storage, silent=1000)
    with Lease(storage) as held:
        assert held._is_mine() and waited[0] == lease.WATCH_TIME
    assert "process 7 on far gave no sign of life for 1000 s" in capsys.readouterr().err


def test_an_ended_holder_whose_clock_was_ahead_is_watched_and_then_replaced(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(lease.time, "sleep", waited.append)
    another(storage, silent=-4e6)
    with Lease(storage) as held:
        assert held._is_mine() and waited[0] == lease.WATCH_TIME
    assert "process 7 on far has a clock that is 4000000 s ahead" in capsys.readouterr().err


@pytest.mark.parametrize("silent", [1000, -4e6])
def test_a_holder_whose_clock_is_wrong_keeps_the_lease_by_renewing_it(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, silent: float
) -> None:
    there = another(storage, silent)
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: another(storage, silent - 15))
    with pytest.raises(UserError, match="process 7 on far"):
        Lease(storage).__enter__()
    now = lease.read(storage)
    assert now and now.beat != there["beat"]


def test_a_damaged_lease_is_replaced(storage: Storage) -> None:
    there = another(storage)
    changes: list[dict[str, object]] = [
        {"beat": "soon"},
        {"beat": 10**400},
        {"pid": -1},
        {"pid": 2**70},
        {"began": 3},
        {"machine": None},
    ]
    junk = [json.dumps(there | change).encode() for change in changes]
    for raw in (b"", b"{", b"[]", b'{"pid": 3}', b"[" * 500_000, *junk):
        storage.put(LEASE, raw)
        with Lease(storage) as held:
            assert held._is_mine()


def test_a_holder_renews_its_lease_and_notices_its_successor(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_INTERVAL", 0.05)
    with Lease(storage) as held:
        first, until = lease.read(storage), time.monotonic() + 20
        while lease.read(storage) == first and time.monotonic() < until:
            time.sleep(0.02)
        beat = lease.read(storage)
        assert beat and first and beat.beat > first.beat and beat.token == first.token
        held.check()
        while not held.lost and time.monotonic() < until:
            another(storage)  # repeated, because the holder may overwrite it once
            time.sleep(0.02)
        with pytest.raises(UserError, match="was taken over by process 7 on far"):
            held.check()
    successor = lease.read(storage)
    assert successor and successor.token == "x"  # its lease stays


# ---------------------------------------------------------------- two exports


PROGRAM = """
import contextlib, os, sys, time
import torch
torch.set_num_threads(1)
from compress_ssl.pipeline.runtime import lease
from compress_ssl.pipeline.extraction.feature_extractor import FeatureExtractor
from compress_ssl.stages import export_teacher
out, data, mode, start = sys.argv[1:5]
honest = FeatureExtractor.start
if mode != "leased":  # a lease without effect, and a device whose results differ in the last bits
    class NoLease(lease.Lease):
        def __enter__(self): return self
        def __exit__(self, *_): pass
    lease.Lease, lease.require_free = NoLease, lambda storage: None
    off = 1 + 1e-6 * int(mode)
    FeatureExtractor.start = lambda self, *asked: {name: out * off for name, out in honest(self, *asked).items()}
while time.time() < float(start):
    time.sleep(0.001)
how = dict(views=2, image_size=8, limit=32, batch_size=4, shard_size=4, workers=0, device="cpu", codec="float32")
from compress_ssl.pipeline.runtime.errors import UserError
try:
    export_teacher.run(export_teacher.Config(data, "convnet:channels=4+8,pretrained=false", out, **how))
except UserError as problem:
    sys.exit(f"error: {problem}")
"""


def race(place: str, modes: tuple[str, str]) -> list[tuple[int, str]]:
    """Start two processes that export at the same moment; returns [(exit status, stderr), ...]."""
    start = str(time.time() + 8)
    words = [sys.executable, "-c", PROGRAM, place, "digits"]
    running = [subprocess.Popen([*words, mode, start], cwd=ROOT, stderr=subprocess.PIPE, text=True) for mode in modes]
    return [(process.wait(), process.communicate()[1]) for process in running]


@pytest.fixture(autouse=True)
def no_child_is_left() -> Iterator[None]:
    before = set(psutil.Process().children())  # the S3 server of the session's fixture
    yield
    assert set(psutil.Process().children()) <= before


@pytest.mark.slow
def test_of_two_concurrent_exports_one_finishes_and_the_other_names_it(place: str) -> None:
    ends = sorted(race(place, ("leased", "leased")))
    if ends[1][0]:  # the usual case; a late starter may find a finished store
        assert "is being written by process" in ends[1][1] and ends[1][1].count("error:") == 1
    assert ends[0][0] == 0
    assert verify.run(verify.Config(place, sample=0))["damaged"] == []
    assert not open_storage(place).exists(LEASE)


@pytest.mark.slow
def test_two_exports_without_a_lease_leave_matching_shards_and_done_records(place: str) -> None:
    ends = race(place, ("1", "2"))
    assert [status for status, _ in ends] == [0, 0], ends
    made = verify.run(verify.Config(place, sample=0))
    assert made["damaged"] == [] and made["pending"] == 0


def test_a_killed_export_can_be_repeated_without_waiting(tmp_path: Path) -> None:
    out = str(tmp_path / "store")
    child = subprocess.Popen([sys.executable, "-c", PROGRAM, out, "digits", "leased", "0"], cwd=ROOT)
    while not list(Path(out).glob("done/*")):
        time.sleep(0.01)
        assert child.poll() is None
    child.kill()
    child.wait()
    assert Folder(out).exists(LEASE)
    how = {"views": 2, "image_size": 8, "limit": 32, "batch_size": 4, "shard_size": 4, "workers": 0}
    made = export_teacher.run(export_teacher.Config("digits", TEACHER, out, **how, codec="float32", device="cpu"))  # type: ignore[arg-type]
    assert "images" in made and not Folder(out).exists(LEASE)


def test_overwrite_refuses_a_store_that_is_being_written(tmp_path: Path) -> None:
    out = tmp_path / "store"
    how = {"views": 1, "image_size": 8, "limit": 8, "batch_size": 4, "workers": 0, "device": "cpu"}
    config = export_teacher.Config("digits", TEACHER, str(out), **how)  # type: ignore[arg-type]
    export_teacher.run(config)
    another(Folder(out))
    with pytest.raises(UserError, match="is being written by process 7 on far"):
        export_teacher.run(export_teacher.Config("digits", TEACHER, str(out), **how, overwrite=True))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="is being written by process 7 on far"):
        verify.run(verify.Config(str(out), sample=0, repair=True))
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def export(out: Path) -> Path:
    how = {"views": 1, "image_size": 8, "limit": 24, "batch_size": 4, "shard_size": 4, "workers": 0, "device": "cpu"}
    export_teacher.run(export_teacher.Config("digits", TEACHER, str(out), **how))  # type: ignore[arg-type]
    return out


def test_a_copy_stops_when_its_lease_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, fault, enter = export(tmp_path / "source"), integrity.find_fault, Lease.__enter__
    held: list[Lease] = []
    looked: list[int] = []

    def superseded(*asked: Any) -> str:
        looked.append(asked[1])
        until = time.monotonic() + 20
        while not held[0].lost and time.monotonic() < until:
            another(Folder(tmp_path / "copy"))
            time.sleep(0.01)
        return fault(*asked)

    monkeypatch.setattr(lease, "RENEW_INTERVAL", 0.02)
    monkeypatch.setattr(Lease, "__enter__", lambda self: (held.append(self), enter(self))[1])
    monkeypatch.setattr(integrity, "find_fault", superseded)
    with pytest.raises(UserError, match="was taken over by process 7 on far"):
        store_copy.run(store_copy.Config(str(source), str(tmp_path / "copy")))
    assert looked == [0]


def test_a_users_own_lease_json_outside_a_store_is_not_touched(tmp_path: Path) -> None:
    source, mine = export(tmp_path / "source"), tmp_path / "mine"
    mine.mkdir()
    (mine / "flat.txt").write_text("rent")
    (mine / "lease.json").write_text("of my flat")
    with pytest.raises(UserError, match="is not empty and holds no manifest.json of ours; name another folder"):
        store_copy.run(store_copy.Config(str(source), str(mine)))
    with pytest.raises(UserError, match="is not a store: it holds no manifest.json"):
        verify.run(verify.Config(str(mine), sample=0, repair=True))
    assert {path.name: path.read_text() for path in mine.iterdir()} == {"flat.txt": "rent", "lease.json": "of my flat"}


def test_a_damaged_manifest_is_repaired_from_its_copy_unless_that_is_damaged_too(tmp_path: Path) -> None:
    store = export(tmp_path / "store")
    whole = (store / "manifest.json").read_bytes()
    for junk in (whole[:-9], None):
        (store / "manifest.json").write_bytes(junk) if junk else (store / "manifest.json").unlink()
        verify.run(verify.Config(str(store), sample=0, repair=True))
        assert (store / "manifest.json").read_bytes() == whole
    for place in ("manifest.json", "copy/manifest.json"):
        (store / place).write_bytes(whole[:-9])
    with pytest.raises(UserError, match="the manifest and its copy are both damaged"):
        verify.run(verify.Config(str(store), sample=0, repair=True))


def test_a_store_of_a_later_version_is_not_reported_as_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = export(tmp_path / "store")
    said = artifact.read(Folder(store))
    monkeypatch.setattr(artifact, "FORMAT", 2)
    for place in (store, store / "copy"):
        artifact.write(Folder(place), "store", said.identity, said.about)
    monkeypatch.undo()
    kept = (store / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="has format 2, but this version of compress reads 1"):
        verify.run(verify.Config(str(store), sample=0, repair=True))
    assert (store / "manifest.json").read_bytes() == kept


def test_verify_names_the_kind_of_a_folder_that_is_no_store(tmp_path: Path) -> None:
    artifact.claim(Folder(tmp_path), "run", {})
    with pytest.raises(UserError, match="holds a run, not a store"):
        verify.run(verify.Config(str(tmp_path), sample=0))
