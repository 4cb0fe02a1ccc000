"""A Bucket behaves like a Folder despite network faults; permanent errors become a UserError with a remedy."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from object_store import FAULTS, Server

from compress_ssl.benchmarks.store_records import plain_record
from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.object_store import Bucket
from compress_ssl.pipeline.runtime.storage import Folder, Storage, absolute, is_url, open_storage
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.store.shards import Shard

PROMPT = 10.0  # seconds in which what is wrong must have been said


@pytest.fixture
def place(bucket: str) -> Bucket:
    return Bucket(f"{bucket}/some/prefix")


# ---------------------------------------------------------------- what is put is got


@pytest.mark.parametrize("scheme", ["s3", "memory"])
def test_a_bucket_behaves_like_a_folder(scheme: str, bucket: str, tmp_path: Any, request: Any) -> None:
    def deeds(storage: Storage) -> Iterator[Any]:
        storage.put("a/b.json", b"one")
        storage.put("a/b.json", b"two")
        storage.put("a/c/d", b"")
        storage.put("top", bytes(7))
        yield storage.get("a/b.json")
        yield storage.get("a/c/d")
        for prefix in ("", "a", "a/c", "a/b", "none"):
            yield sorted(storage.list(prefix))
        yield storage.size()
        yield storage.put_new("new", b"mine"), storage.put_new("new", b"yours"), storage.get("new")
        yield storage.exists("new"), storage.exists("none")
        storage.delete("new")
        storage.delete("new")
        yield storage.exists("new")
        with pytest.raises(FileNotFoundError):
            storage.get("new")

    where = {"s3": f"{bucket}/x", "memory": f"memory://{request.node.name}"}[scheme]
    there, here = list(deeds(open_storage(where))), list(deeds(Folder(tmp_path)))
    assert there == here
    assert sorted(open_storage(where).list()) == ["a/b.json", "a/c/d", "top"]


def test_prefixes_of_one_bucket_are_separate(bucket: str) -> None:
    Bucket(f"{bucket}/a").put("key", b"a")
    Bucket(f"{bucket}/ab").put("key", b"ab")
    assert list(Bucket(f"{bucket}/a").list()) == ["key"] and Bucket(f"{bucket}/a").get("key") == b"a"


def test_a_large_value_is_read_back_unchanged(place: Bucket) -> None:
    data = np.random.default_rng(0).bytes(17_000_001)
    place.put("large", data)
    assert place.get("large") == data and place.size() == len(data)


def test_a_listing_of_several_pages_is_complete_also_after_a_cut_response(
    server: Server, place: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")  # of a page
    keys = [f"done/{n:04d}" for n in range(25)]
    for key in keys:
        place.put(key, b"x")
    for faults in ((), ("cut",), ("", "cut"), ("", "500"), ("", "cut", "cut", "drop")):
        server.meet(*faults)
        assert list(place.list("done")) == keys
        assert not server.faults


# ---------------------------------------------------------------- networks err


@pytest.mark.parametrize("fault", FAULTS)
def test_a_request_succeeds_after_temporary_errors(fault: str, server: Server, place: Bucket) -> None:
    data = bytes(range(256)) * 8
    deeds = {
        "put": lambda: place.put("key", data) or place.get("key") == data,
        "get": lambda: place.get("key") == data,
        "list": lambda: list(place.list()) == ["key"],
        "exists": lambda: place.exists("key") and not place.exists("none"),
        "put_new": lambda: place.put_new("new", data) and not place.put_new("new", b"other"),
        "delete": lambda: place.delete("new") or not place.exists("new"),
        "large": lambda: place.put("large", data * 3000) or place.get("large") == data * 3000,
    }
    for what, deed in deeds.items():
        server.meet(fault)
        assert deed(), what
        assert not server.faults, f"{what} met no fault"


@pytest.mark.parametrize("place_in_row", range(4))
def test_put_new_succeeds_when_the_response_is_lost(place_in_row: int, server: Server, place: Bucket) -> None:
    server.meet(*[""] * place_in_row, "lost")
    assert place.put_new("lease", b"mine") is True
    server.meet(*[""] * place_in_row, "lost")
    assert place.put_new("lease", b"yours") is False


def test_only_one_of_many_concurrent_put_new_calls_succeeds(place: Bucket) -> None:
    won: list[int] = []
    threads = [
        threading.Thread(target=lambda n=n: won.append(n) if place.put_new("key", b"%d" % n) else None)
        for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and place.get("key") == b"%d" % won[0]


def test_sequential_put_new_calls_work_on_a_server_that_ignores_the_condition(server: Server, place: Bucket) -> None:
    server.unconditional = True
    assert place.put_new("key", b"mine") and not place.put_new("key", b"yours")
    assert place.get("key") == b"mine"


# ---------------------------------------------------------------- what does not pass is said


def said(where: str, within: float = PROMPT) -> str:
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        open_storage(where)
    assert time.monotonic() - began < within
    return str(caught.value)


def test_a_missing_bucket_is_named(server: Server) -> None:
    assert "s3://nowhere/x: there is no such bucket" in said("s3://nowhere/x")
    for deed in (lambda b: b.get("key"), lambda b: b.put("key", b""), lambda b: list(b.list())):
        with pytest.raises(UserError, match="no such bucket"):
            deed(Bucket("s3://nowhere/x"))


def test_an_error_about_wrong_credentials_quotes_the_server(server: Server, bucket: str) -> None:
    place = Bucket(bucket)
    place.put("key", b"")
    server.check_keys(after=0)
    try:
        assert "refuses these credentials (The AWS Access Key Id you provided does not exist" in said(bucket)
        for deed in (lambda: place.get("key"), lambda: place.put("key", b""), lambda: place.exists("key")):
            with pytest.raises(UserError, match="refuses these credentials"):
                deed()
    finally:
        server.check_keys(after=float("inf"))


def test_missing_credentials_are_reported(server: Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")  # no machine of the provider
    assert "no credentials were found" in said(bucket, within=30)


def test_an_unreachable_address_is_reported_within_seconds(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "a request to s3://bucket/x failed" in said("s3://bucket/x")


def test_a_server_that_always_fails_is_an_error(server: Server, bucket: str) -> None:
    server.meet(*["500"] * 50)
    assert " failed: We erred." in said(bucket)


def test_an_unknown_scheme_is_refused() -> None:
    assert "cannot be opened" in said("what://bucket/x")


# ---------------------------------------------------------------- Zarr reads through it


def small_store(where: str) -> FeatureStore:
    """Six images, two views, four dimensions, one shard."""
    tables = {"sample_id": list("abcdef"), "label": range(6), "view_key": range(6)}
    store = FeatureStore.create(open_storage(where), plain_record(6, 2, 4, "float32", rows=6), tables)
    features = np.arange(48, dtype="<f4").reshape(6, 2, 4)
    store.write(
        Shard(0, 0, 6, (0, 1)), {"embedding": (features, None)}, np.zeros(6, "u1"), np.arange(6, dtype="<u8"), {}
    )
    return FeatureStore(open_storage(where))


def test_features_are_read_from_a_bucket_despite_temporary_errors(server: Server, bucket: str) -> None:
    store = small_store(f"{bucket}/store")
    store.require_complete()
    for fault in FAULTS:
        server.meet("", fault)
        again = FeatureStore(Bucket(f"{bucket}/store"))
        np.testing.assert_array_equal(again.read("embedding", 1), np.arange(48).reshape(6, 2, 4)[:, 1])
        assert again.table("sample_id").tolist() == list("abcdef")


def test_reading_features_without_permission_raises_the_same_error(server: Server, bucket: str) -> None:
    store = small_store(f"{bucket}/store")
    server.check_keys(after=0)
    try:
        with pytest.raises(UserError, match="refuses these credentials"):
            store.read("embedding", 0)
    finally:
        server.check_keys(after=float("inf"))


def test_a_damaged_shard_in_a_bucket_is_reported_as_damaged(server: Server, bucket: str) -> None:
    store = small_store(f"{bucket}/store")
    key = next(key for key in store.storage.list("features.zarr/embedding/c"))
    data = bytearray(store.storage.get(key))
    data[5] ^= 1
    store.storage.put(key, bytes(data))
    with pytest.raises(UserError, match="array 'embedding' is damaged"):
        store.read("embedding", 0)


# ---------------------------------------------------------------- names of places


@pytest.mark.parametrize(
    ("where", "url"), [("s3://b/p", True), ("memory://x", True), ("a/b", False), ("file:///a", False)]
)
def test_absolute_keeps_a_url_and_makes_a_folder_absolute(where: str, url: bool, tmp_path: Any) -> None:
    assert is_url(where) is url
    assert absolute(where) == where if url else absolute(where).startswith("/")
    assert isinstance(open_storage(str(tmp_path)), Folder) and isinstance(open_storage(f"file://{tmp_path}"), Folder)


def test_the_sibling_of_a_url_is_in_the_working_directory() -> None:
    assert str(artifact.sibling("s3://bucket/deep/teacher/", "-evaluation")) == "teacher-evaluation"


def test_overwrite_refuses_a_location_in_an_object_store(bucket: str) -> None:
    small_store(f"{bucket}/store")
    assert artifact.replaceable(f"{bucket}/empty", "store") is False
    with pytest.raises(UserError, match="moves a folder aside by renaming"):
        artifact.move_aside(f"{bucket}/store", "store")
    FeatureStore(open_storage(f"{bucket}/store")).require_complete()
