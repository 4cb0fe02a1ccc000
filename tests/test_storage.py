"""A put is atomic; a manifest identifies its folder, and a folder of another kind or identity is refused."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress_ssl.pipeline.runtime import artifact, digests, storage
from compress_ssl.pipeline.runtime.artifact import Mismatch
from compress_ssl.pipeline.runtime.errors import UserError, describe_disk_error
from compress_ssl.pipeline.runtime.storage import INTERRUPTED, PART, Folder, open_storage


class PowerCut(BaseException):
    """Simulates a crash of the machine at this place."""


def cut(*_: Any, **__: Any) -> None:
    raise PowerCut


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# ---------------------------------------------------------------- put and get


def test_get_returns_what_put_wrote(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "new")
    folder.put("deep/er/key.bin", b"one")
    assert folder.get("deep/er/key.bin") == b"one" == (tmp_path / "new/deep/er/key.bin").read_bytes()
    folder.put("deep/er/key.bin", b"")
    assert folder.get("deep/er/key.bin") == b""
    assert folder.exists("deep/er/key.bin") and not folder.exists("deep/er/other")


def test_a_missing_key_raises_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Folder(tmp_path).get("nothing")
    Folder(tmp_path).delete("nothing")


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_crash_before_the_rename_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    folder = Folder(tmp_path)
    folder.put("key", b"old")
    monkeypatch.setattr(os, at, cut)
    with pytest.raises(PowerCut):
        folder.put("key", b"new, and longer")
    with pytest.raises(PowerCut):
        folder.put("other", b"new")
    monkeypatch.undo()
    assert folder.get("key") == b"old"
    assert not folder.exists("other")
    assert list(folder.list()) == ["key"]


def test_data_is_synced_before_the_file_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    replace, fsync = os.replace, os.fsync
    kind = lambda fd: "folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "file"  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(f"fsync {kind(fd)}"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    Folder(tmp_path).put("key", b"data")
    assert calls == ["fsync file", "rename", "fsync folder"]


def test_a_failed_write_leaves_no_part_file_and_names_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as caught:
        Folder(tmp_path).put("deep/key", b"data")
    assert caught.value.filename == str(tmp_path / "deep/key")
    assert files(tmp_path) == {}


@pytest.mark.parametrize("number", sorted(INTERRUPTED))
@pytest.mark.parametrize("done", [False, True])
def test_a_rename_that_the_file_system_interrupts_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, done: bool
) -> None:
    """`done`: the file is renamed, and the call reports an error all the same."""
    replace, failures = os.replace, [number, number]

    def interrupted(part: Path, target: Path) -> None:
        if failures:
            code = failures.pop()
            if done:
                replace(part, target)
            raise OSError(code, os.strerror(code))
        replace(part, target)

    monkeypatch.setattr(os, "replace", interrupted)
    monkeypatch.setattr(storage, "PAUSES", (0.0, 0.0))
    Folder(tmp_path).put("key", b"data")
    assert files(tmp_path) == {"key": b"data"}


@pytest.mark.parametrize("number", sorted(INTERRUPTED))
def test_a_file_system_that_interrupts_every_rename_ends_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def interrupted(part: Path, target: Path) -> None:
        raise OSError(number, os.strerror(number), str(part), None, str(target))

    monkeypatch.setattr(storage, "PAUSES", (0.0,))
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(OSError) as caught:
        Folder(tmp_path).put("key", b"data")
    assert describe_disk_error(caught.value).startswith(f"{tmp_path / 'key'}: the file system")
    assert "key" not in files(tmp_path)


def test_a_home_folder_that_is_unknown_is_refused() -> None:
    with pytest.raises(UserError, match="~nobody-has-this-name/x: the home folder is unknown"):
        open_storage("~nobody-has-this-name/x")


def test_readers_get_complete_values_while_others_write(tmp_path: Path) -> None:
    folder, stop, seen = Folder(tmp_path), threading.Event(), set()
    folder.put("key", b"a" * 5000)

    def read() -> None:
        while not stop.is_set():
            seen.add(folder.get("key"))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for letter in b"abcdef" * 5:
        folder.put("key", bytes([letter]) * 5000)
    stop.set()
    for reader in readers:
        reader.join()
    assert seen <= {bytes([letter]) * 5000 for letter in b"abcdef"}


def test_only_one_of_many_concurrent_put_new_calls_succeeds(tmp_path: Path) -> None:
    folder, won = Folder(tmp_path), []

    def claim(number: int) -> None:
        if folder.put_new("key", str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=claim, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert folder.get("key") == str(won[0]).encode()
    assert list(files(tmp_path)) == ["key"]


def test_list_yields_keys_below_a_prefix_and_no_part_files(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for key in ("a", "done/1", "done/deep/2", "done2/3"):
        folder.put(key, b"")
    (tmp_path / f"done/.4.abc{PART}").write_bytes(b"half")
    assert sorted(folder.list("done")) == ["done/1", "done/deep/2"]
    assert sorted(folder.list()) == ["a", "done/1", "done/deep/2", "done2/3"]
    assert list(folder.list("nowhere")) == []


# ---------------------------------------------------------------- what killed writers leave

KILLED = """
import os, sys
from compress_ssl.pipeline.runtime.storage import Folder
os.replace = lambda a, b: os._exit(9)
Folder(sys.argv[1]).put("deep/key", b"half")
"""


def test_sweep_deletes_only_part_files_of_ended_writers(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.put("deep/whole", b"")
    left = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=Path(__file__).parents[1])
    assert left.returncode == 9
    assert [name for name in files(tmp_path) if name.endswith(PART)]
    assert folder.sweep() == 1
    assert list(files(tmp_path)) == ["deep/whole"]
    assert folder.sweep() == 0


def test_sweep_counts_a_zombie_process_as_ended(tmp_path: Path) -> None:
    left = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=Path(__file__).parents[1])
    os.waitid(os.P_PID, left.pid, os.WEXITED | os.WNOWAIT)  # a zombie: containers without an init keep them for good
    assert Folder(tmp_path).sweep() == 1
    assert left.wait() == 9


def test_sweep_keeps_part_files_of_running_writers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, replace = Folder(tmp_path), os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (folder.sweep(), replace(a, b)))
    folder.put("key", b"whole")
    assert folder.get("key") == b"whole"


def test_sweep_deletes_part_files_of_another_machine_after_a_day(tmp_path: Path) -> None:
    part = tmp_path / f".key.01234567.1.not-{socket.gethostname()}{PART}"
    part.write_bytes(b"")
    assert Folder(tmp_path).sweep() == 0
    os.utime(part, (0, os.stat(part).st_mtime - 2 * 86_400))
    assert Folder(tmp_path).sweep() == 1


# ---------------------------------------------------------------- claiming a folder

IDENTITY = {"lr": 0.1, "model": {"name": "x", "sizes": (1, 2)}, "views": None}


def test_the_first_claim_writes_the_manifest_and_an_equal_claim_continues(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run")
    manifest, new = artifact.claim(folder, "run", IDENTITY, {"path": "/a"})
    assert new
    assert manifest.identity == {"lr": 0.1, "model": {"name": "x", "sizes": [1, 2]}, "views": None}
    before = files(tmp_path)
    assert artifact.claim(folder, "run", IDENTITY, {"path": "/b"}) == (manifest, False)
    assert artifact.claim(folder, "run", {**IDENTITY, "model": {"sizes": [1, 2], "name": "x"}})[1] is False
    assert files(tmp_path) == before


def test_a_claim_with_other_settings_names_each_with_both_values(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    artifact.claim(folder, "run", IDENTITY)
    with pytest.raises(Mismatch) as caught:
        artifact.claim(folder, "run", {"lr": 0.2, "model": {"name": "x", "sizes": [1]}, "seed": 3})
    assert str(caught.value) == (
        f"{tmp_path} was made with other settings: lr is 0.1 there, 0.2 asked; "
        "model.sizes is [1, 2] there, [1] asked; seed is null there, 3 asked. "
        "Repeat them, name another folder, or start anew (with --overwrite, where the command has it)"
    )


def test_a_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    artifact.claim(Folder(tmp_path), "store", IDENTITY)
    with pytest.raises(UserError, match=f"{tmp_path} holds a store, not a run"):
        artifact.claim(Folder(tmp_path), "run", IDENTITY)


def test_a_folder_with_foreign_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(UserError, match="is not empty and holds no manifest.json of ours; name another folder"):
        artifact.claim(Folder(tmp_path), "run", IDENTITY)
    assert list(files(tmp_path)) == ["thesis.tex"]


def test_a_claim_that_was_killed_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(PowerCut):
        artifact.claim(Folder(tmp_path), "run", IDENTITY)
    monkeypatch.undo()
    assert artifact.claim(Folder(tmp_path), "run", IDENTITY)[1]


def test_a_missing_manifest_raises_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a store: it holds no manifest.json"):
        artifact.read(Folder(tmp_path), "store")
    with pytest.raises(UserError, match="is not an evaluation: there is no such folder"):
        artifact.read(Folder(tmp_path / "nowhere"), "evaluation")


def test_every_flipped_bit_of_a_manifest_is_noticed(tmp_path: Path) -> None:
    artifact.claim(Folder(tmp_path), "run", IDENTITY, {"note": "ü"})
    file = tmp_path / artifact.MANIFEST
    whole = file.read_bytes()
    manifest = artifact.read(Folder(tmp_path))
    for place in range(len(whole)):
        for bit in (0, 3, 5):
            data = bytearray(whole)
            data[place] ^= 1 << bit
            file.write_bytes(data)
            try:
                assert artifact.read(Folder(tmp_path)) == manifest  # white space may change
            except UserError as damage:
                assert "damaged" in str(damage)


@pytest.mark.parametrize("junk", [b"", b"{", b"[]", b"null", b"{}", b'{"digest": 1}', b"\xff\xfe", b'"digest"'])
def test_an_invalid_manifest_is_reported_as_damaged(tmp_path: Path, junk: bytes) -> None:
    (tmp_path / artifact.MANIFEST).write_bytes(junk)
    with pytest.raises(UserError, match=r"manifest.json is damaged"):
        artifact.read(Folder(tmp_path))


def test_a_later_format_raises_other_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "FORMAT", 2)
    artifact.claim(Folder(tmp_path), "run", IDENTITY)
    monkeypatch.undo()
    with pytest.raises(UserError, match="has format 2, but this version of compress reads 1"):
        artifact.read(Folder(tmp_path))


def test_a_changed_record_does_not_match_its_seal() -> None:
    record = digests.sealed({"a": 1})
    assert digests.sealed(record) == record
    assert digests.sealed({**record, "a": 2}) != {**record, "a": 2}


# ---------------------------------------------------------------- setting aside


def test_move_aside_renames_an_artifact_to_the_first_free_name(tmp_path: Path) -> None:
    for number in (1, 2):
        artifact.claim(Folder(tmp_path / "run"), "run", {"number": number})
        assert artifact.move_aside(tmp_path / "run", "run") == tmp_path / f"run.old-{number}"
        assert not (tmp_path / "run").exists()
    assert artifact.read(Folder(tmp_path / "run.old-2")).identity == {"number": 2}


def test_move_aside_of_an_empty_or_missing_folder_does_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert artifact.move_aside(tmp_path / "nowhere", "run") is None
    assert artifact.move_aside(tmp_path / "empty", "run") is None


def test_move_aside_refuses_a_folder_without_a_manifest(tmp_path: Path) -> None:
    foreign = tmp_path / "home"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("...")
    with pytest.raises(UserError, match="--overwrite touches only what compress made"):
        artifact.move_aside(foreign, "run")
    (foreign / artifact.MANIFEST).write_text('{"name": "a web page", "start_url": "/"}')
    with pytest.raises(UserError, match="damaged, or was not made by compress"):
        artifact.move_aside(foreign, "run")
    assert sorted(files(tmp_path)) == ["home/manifest.json", "home/thesis.tex"]


def test_move_aside_refuses_an_artifact_of_another_kind(tmp_path: Path) -> None:
    artifact.claim(Folder(tmp_path / "store"), "store", IDENTITY)
    with pytest.raises(UserError, match="holds a store, not a run"):
        artifact.move_aside(tmp_path / "store", "run")
    assert (tmp_path / "store").exists()


# ---------------------------------------------------------------- fingerprints

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_a_fingerprint_does_not_depend_on_storage_or_key_order(record: dict[str, Any]) -> None:
    back = json.loads(json.dumps(dict(reversed(record.items())), indent=2))
    assert digests.fingerprint(back) == digests.fingerprint(record)
    assert artifact.differences(record, back) == []


@given(JSON, JSON)
def test_records_have_the_same_fingerprint_only_if_they_are_equal(a: Any, b: Any) -> None:
    same = digests.fingerprint(a) == digests.fingerprint(b)
    assert same == (digests.canonical(a) == digests.canonical(b))
    assert bool(artifact.differences({"x": a}, {"x": b})) != same


def test_golden_fingerprint_and_manifest(tmp_path: Path) -> None:
    record = {"b": [1, 2.5, None, True], "a": "ü"}
    assert digests.canonical(record) == b'{"a":"\\u00fc","b":[1,2.5,null,true]}'
    assert digests.fingerprint(record) == GOLDEN_FINGERPRINT
    artifact.claim(Folder(tmp_path), "run", {"lr": 0.1}, {"steps": 3})
    assert (tmp_path / artifact.MANIFEST).read_text() == GOLDEN_MANIFEST


GOLDEN_FINGERPRINT = "4f4854757726f3591bad0aa2d00e1fa9"
GOLDEN_MANIFEST = """\
{
 "about": {
  "steps": 3
 },
 "digest": "7e1126540a7f16b588752f0ca9c22b02",
 "format": 1,
 "identity": {
  "lr": 0.1
 },
 "kind": "run"
}
"""


def test_a_folder_on_a_file_system_without_fsync_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unable(_: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", unable)
    storage.sync(tmp_path)


@pytest.mark.parametrize("kind", ["", "\x1b]0;x", "Store", 5, None, "a" * 5 + "\n"])
def test_a_manifest_of_an_impossible_kind_is_refused_in_words(kind: object, tmp_path: Path) -> None:
    entries = {"format": artifact.FORMAT, "kind": kind, "identity": {}, "about": {}}
    content = json.dumps({**entries, "digest": digests.fingerprint(entries)})
    with pytest.raises(UserError, match="manifest.json is not valid: kind"):
        artifact.parse(content.encode(), "S/manifest.json")
