"""Stores in a bucket: training from one gives the same student, and every shard of the local copy is checked."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from object_store import FAULTS, Server

from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.object_store import Bucket
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store import local_cache
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.stages import compare, distill, evaluate, export_teacher, inspect, verify

ROOT = Path(__file__).resolve().parent.parent
TEACHER = "convnet:channels=4+8,pretrained=false"
IMAGES = 60


pytestmark = pytest.mark.usefixtures("one_thread")


def export(out: Path | str, **options: Any) -> dict[str, Any]:
    default = {"views": 6, "image_size": 8, "limit": IMAGES, "batch_size": 10, "shard_size": 20}
    settings = {**default, "workers": 0, "device": "cpu", **options}
    return export_teacher.run(export_teacher.Config("digits", TEACHER, str(out), **settings))


def train(store: Path | str, out: Path, method: str = "compress-1q", **options: Any) -> Path:
    settings = {"steps": 6, "batch_size": 20, "image_size": 8, "lr": 0.2, "workers": 0, "device": "cpu", **options}
    distill.run(distill.Config(str(store), ("convnet:channels=4+8",), method, out, **settings))
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 60 digits and 6 views: 3 row blocks of 2 view blocks."""
    out = tmp_path_factory.mktemp("store") / "store"
    export(out)
    return out


@pytest.fixture
def remote(folder: Path, bucket: str) -> Bucket:
    """The same store in a bucket, copied file by file."""
    there = Bucket(f"{bucket}/deep/teacher")
    for key in Folder(folder).list():
        there.put(key, Folder(folder).get(key))
    return there


def files(folder: Path) -> dict[str, bytes]:
    found = (file for file in folder.rglob("*") if file.is_file() and file.name != "history.jsonl")
    return {str(file.relative_to(folder)): file.read_bytes() for file in found}


def requested_keys(server: Server, method: str) -> list[str]:
    """Keys of the store in the requests that the server received with this HTTP method."""
    marked = [entry.partition("/deep/teacher/") for entry in server.seen if entry.startswith(f"{method} ")]
    return sorted({key for _, sep, key in marked if sep})


# ---------------------------------------------------------------- all commands, end to end


def test_an_export_to_a_bucket_equals_to_the_byte_an_export_to_a_folder(
    folder: Path, server: Server, bucket: str
) -> None:
    some = random.Random(1)
    server.meet(*("" if some.random() < 0.8 else some.choice(FAULTS) for _ in range(100)))
    export(f"{bucket}/teacher")
    server.calm()
    there = Bucket(f"{bucket}/teacher")
    found = {key: there.get(key) for key in there.list() if key != "history.jsonl"}
    assert found == files(folder)
    assert "is complete already" in export(f"{bucket}/teacher")["summary"]


def test_a_student_trained_from_a_bucket_equals_to_the_bit_one_trained_from_the_folder(
    folder: Path, remote: Bucket, tmp_path: Path
) -> None:
    here = train(folder, tmp_path / "here")
    there = train(remote.url, tmp_path / "there", cache=tmp_path / "cache")
    assert (here / "student.safetensors").read_bytes() == (there / "student.safetensors").read_bytes()
    manifest = json.loads((there / "manifest.json").read_bytes())
    assert manifest["about"]["store"] == remote.url
    assert manifest["identity"] == json.loads((here / "manifest.json").read_bytes())["identity"]


def test_local_crops_are_fetched_from_a_remote_store(tmp_path: Path) -> None:
    students = []
    for store in ("memory://crops", str(tmp_path / "crops")):
        export(store, views=2, local_views=2)
        out = tmp_path / f"run-{len(students)}"
        run = train(store, out, "seed:small=true", image_size=16, cache=tmp_path / "cache")
        students.append((run / "student.safetensors").read_bytes())
    assert students[0] == students[1]


def test_the_other_commands_accept_the_url_of_a_store(
    remote: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    shown = inspect.run(inspect.Config(remote.url))
    assert shown["kind"] == "store" and shown["shards"] == "3 of 3 done, 20 rows each"
    assert verify.run(verify.Config(remote.url, sample=0.2, device="cpu"))["damaged"] == []
    made = evaluate.run(
        evaluate.Config(val="digits:split=test", store=remote.url, protocol=("nn",), workers=0, device="cpu")
    )
    assert made["evaluation"] == "teacher-evaluation" and Path("teacher-evaluation/report.html").exists()
    assert made["metrics"]["model"]["store"] == remote.url
    assert len(list(Path("xdg/compress").iterdir())) == 1
    rows = compare.run(compare.Config((remote.url,)))["rows"]
    assert rows == [made["metrics"]]
    for name in ("manifest.json", "metrics.json"):
        Bucket(f"{remote.url}-evaluation").put(name, Path("teacher-evaluation", name).read_bytes())
    assert compare.run(compare.Config((f"{remote.url}-evaluation",)))["rows"] == rows


def test_a_dry_run_to_a_bucket_reports_no_free_disk_and_writes_nothing(bucket: str) -> None:
    made = export(f"{bucket}/new", dry_run=True)
    assert "free_bytes" not in made and made["forwards"] == IMAGES * 6
    assert list(Bucket(f"{bucket}/new").list()) == []


def test_a_dry_run_over_an_existing_store_reports_what_is_pending(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "store")
    next((tmp_path / "store/done").glob("0000001.0004-*")).unlink()
    made = export(tmp_path / "store", dry_run=True)
    assert made["forwards"] == 20 * 2 and made["total_forwards"] == IMAGES * 6
    assert "40 of them pending" in made["summary"] and made["files"] == 5  # array, scales, status, content, done record
    assert export(tmp_path / "store", dry_run=True, views=8)["forwards"] == IMAGES * 2 + 20 * 2


def test_a_store_in_memory_is_available_to_all_commands_of_a_process(tmp_path: Path) -> None:
    export("memory://teacher", views=2)
    assert (train("memory://teacher", tmp_path / "run", cache=tmp_path) / "student.safetensors").exists()
    assert verify.run(verify.Config("memory://teacher", sample=0.2, device="cpu"))["damaged"] == []


def test_a_wrong_url_is_refused_with_one_sentence(server: Server, tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "compress_ssl.cli",
        "distill",
        "--store",
        "s3://nowhere/x",
        "--student",
        "convnet",
        "--method",
    ]
    done = subprocess.run([*words, "seed", "--out", str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: s3://nowhere/x: there is no such bucket; create it or correct the name\n"


# ---------------------------------------------------------------- the local copy


def fetch(remote: Bucket, cache: Path, views: tuple[int, ...] = (0, 1, 2, 3, 4, 5)) -> FeatureStore:
    return local_cache.fetch(FeatureStore(remote), views, cache)


def copy_of(cache: Path) -> Path:
    return next(cache.iterdir())


def test_the_local_copy_holds_only_the_view_blocks_that_are_used(remote: Bucket, tmp_path: Path) -> None:
    local = fetch(remote, tmp_path, views=(1, 2))
    kept = {path.name for path in (copy_of(tmp_path) / "features.zarr/embedding/c/0").iterdir()}
    assert kept == {"0"} and str(local.storage) == remote.url
    np.testing.assert_array_equal(local.read("embedding", 2), FeatureStore(remote).read("embedding", 2))
    with pytest.raises(UserError, match="lacks 3 of 3 shards"):
        local.require_complete([4])
    fetch(remote, tmp_path, views=(4,)).require_complete(range(6))


def test_intact_shards_are_not_fetched_again(remote: Bucket, tmp_path: Path, server: Server) -> None:
    fetch(remote, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("c/*/*") if path.is_file()}
    server.calm()
    fetch(remote, tmp_path)
    assert {key.partition("/")[0] for key in requested_keys(server, "GET")} == {"manifest.json", "done"}
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize("what", ["embedding/c/1/0/0", "embedding_scale/c/2/1", "content/c/1", "sample_id/c/0"])
@pytest.mark.parametrize("kind_of_damage", ["flipped", "short", "gone", "empty"])
def test_only_damaged_shards_of_the_copy_are_fetched_again(
    what: str, kind_of_damage: str, remote: Bucket, tmp_path: Path, server: Server
) -> None:
    fetch(remote, tmp_path)
    whole = files(tmp_path)
    file = copy_of(tmp_path) / "features.zarr" / what
    data = file.read_bytes()
    if kind_of_damage == "gone":
        file.unlink()
    else:
        file.write_bytes(
            {"flipped": data[:3] + bytes([data[3] ^ 4]) + data[4:], "short": data[:-2], "empty": b""}[kind_of_damage]
        )
    server.calm()
    fetch(remote, tmp_path)
    assert files(tmp_path) == whole
    fetched = {key for key in requested_keys(server, "GET") if key.startswith("features.zarr")}
    assert f"features.zarr/{what}" in fetched and len(fetched) <= 6  # files of its row block


def test_an_interrupted_copy_is_continued_and_not_used_before_it_is_complete(
    remote: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = files(copy_of(fetch(remote, tmp_path / "whole") and tmp_path / "whole"))
    monkeypatch.setattr(local_cache, "CONNECTIONS", 1)
    put = Folder.put
    for stop in range(1, len(whole), 9):
        count = iter(range(stop))

        def cut(self: Folder, key: str, data: bytes, count: Any = count) -> None:
            if next(count, None) is None:
                raise KeyboardInterrupt
            put(self, key, data)

        cache = tmp_path / f"cut{stop}"
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Folder, "put", cut)
            fetch(remote, cache)
        fetch(remote, cache)
        assert files(copy_of(cache)) == whole


def test_damage_in_the_remote_store_is_reported_and_not_copied(remote: Bucket, tmp_path: Path) -> None:
    key = "features.zarr/embedding/c/1/1/0"
    data = remote.get(key)
    remote.put(key, data[:7] + bytes([data[7] ^ 1]) + data[8:])
    with pytest.raises(UserError, match=r"deep/teacher is damaged, done/0000001.0004-0006.json.*verify --repair"):
        fetch(remote, tmp_path)
    remote.put(key, data)
    fetch(remote, tmp_path).require_complete()


def test_a_missing_small_file_is_fetched_from_its_second_copy(remote: Bucket, tmp_path: Path) -> None:
    key = "features.zarr/embedding/zarr.json"
    data = remote.get(key)
    remote.put(key, b"junk")
    fetch(remote, tmp_path).require_complete()
    assert (copy_of(tmp_path) / key).read_bytes() == data


def test_the_local_copy_is_updated_when_the_remote_store_has_grown(folder: Path, bucket: str, tmp_path: Path) -> None:
    export(f"{bucket}/grows", views=2)
    there = Bucket(f"{bucket}/grows")
    fetch(there, tmp_path, views=(0, 1))
    export(f"{bucket}/grows", views=6)
    local = fetch(there, tmp_path)
    assert local.views == 6 and len(list(tmp_path.iterdir())) == 1
    want = FeatureStore(Folder(folder))
    for view in range(6):
        np.testing.assert_array_equal(local.read("embedding", view), want.read("embedding", view))
    assert sorted(local.storage.list("done")) == sorted(want.storage.list("done"))


def test_a_shard_that_another_process_has_fetched_meanwhile_is_left_as_it_is(
    remote: Bucket, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, delete, others, deleted = local_cache._fetch_block, Folder.delete, [], []

    def late(*asked: Any) -> int:
        if not others:  # the other process starts after our listing and ends before our first shard
            others.append("began")
            fetch(remote, tmp_path)
            server.calm()
            deleted.clear()
        return block(*asked)

    monkeypatch.setattr(local_cache, "CONNECTIONS", 1)
    monkeypatch.setattr(local_cache, "_fetch_block", late)
    monkeypatch.setattr(Folder, "delete", lambda self, key: (deleted.append(key), delete(self, key))[1])
    fetch(remote, tmp_path).require_complete()
    assert others and not deleted
    assert {key.partition("/")[0] for key in requested_keys(server, "GET")} == {"done"}
