"""The feature store: it reads what was written, a killed writer costs one shard at most, growth leaves no trace."""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from compress_ssl.benchmarks.store_records import plain_record
from compress_ssl.pipeline.datasets.decode import BROKEN, GOOD, NOT_FINITE, REASONS
from compress_ssl.pipeline.runtime import digests
from compress_ssl.pipeline.runtime.artifact import Mismatch
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store import integrity
from compress_ssl.pipeline.store.codecs import CODECS
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.store.records import HistoryEvent, StoreAbout
from compress_ssl.pipeline.store.shards import Shard, done_key, shard_rows, view_digest

ROOT = Path(__file__).parents[1]
N, D, ROWS = 10, 3, 4
Bad = dict[tuple[int, int], tuple[int, str]]
"""{(i, v): (status, reason)}: image i is found bad in view v."""


class PowerFailure(BaseException):
    """Raised where the machine is to stop."""


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync to save time; tests/test_storage.py checks that data are synced."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class FailingFolder(Folder):
    """A folder whose machine stops before the n-th change of a file."""

    def __init__(self, path: Path, changes: int):
        super().__init__(path)
        self.left = changes

    def _spend(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise PowerFailure

    def put(self, key: str, data: bytes) -> None:
        self._spend()
        super().put(key, data)

    def put_new(self, key: str, data: bytes) -> bool:
        self._spend()
        return super().put_new(key, data)

    def delete(self, key: str) -> None:
        self._spend()
        super().delete(key)


def tables(images: int = N) -> dict[str, Any]:
    ids, labels = [f"ä/{i:02d}.jpg" for i in range(images)], np.arange(images) % 3 - 1
    return {"sample_id": ids, "label": labels, "view_key": range(images)}


def make(
    where: Path | Folder, views: int, codec: str = "int8", images: int = N, rows: int = ROWS, **more: Any
) -> FeatureStore:
    storage = where if isinstance(where, Folder) else Folder(where)
    return FeatureStore.create(storage, plain_record(images, views, D, codec, rows, **more), tables(images))


def features(start: int, stop: int, views: Sequence[int]) -> np.ndarray:
    """(n, V, D) float32: the teacher's features, a function of i and v alone."""
    out = [[np.random.default_rng([i, v]).normal(size=D) for v in views] for i in range(start, stop)]
    return np.array(out, np.float32).reshape(stop - start, len(views), D)


def content(start: int, stop: int) -> np.ndarray:
    return np.arange(start, stop).astype(np.uint64) + np.uint64(2**63)


def write(store: FeatureStore, shard: Shard, bad: Bad | None = None) -> None:
    """Write a shard as an export does: bad rows are zero in the views of this call; the first reason is kept."""
    x, status = features(shard.start, shard.stop, shard.views), np.zeros(shard.stop - shard.start, np.uint8)
    reasons = {}
    for (i, v), (why, words) in sorted((bad or {}).items(), reverse=True):
        if shard.start <= i < shard.stop and v in shard.views:
            status[i - shard.start], reasons[i] = why, f"{words} (view {v})"
            x[i - shard.start] = 0
    kept = {"embedding": store.codecs["embedding"].encode(x)}
    store.write(shard, kept, status, content(shard.start, shard.stop), reasons)


def export(where: Path | Folder, views: int, bad: Bad | None = None, **settings: Any) -> FeatureStore:
    store = make(where, views, **settings)
    for shard in store.pending():
        write(store, shard, bad)
    return store


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# ---------------------------------------------------------------- reading what was written


@pytest.mark.parametrize("codec", CODECS)
def test_features_are_read_as_the_codec_decodes_them(tmp_path: Path, codec: str) -> None:
    store = export(tmp_path, 6, codec=codec)
    for v in range(6):
        wanted = store.codecs["embedding"].decode(*store.codecs["embedding"].encode(features(0, N, [v])))[:, 0]
        assert np.array_equal(store.read("embedding", v), wanted)
        assert np.array_equal(store.read("embedding", v, slice(3, 9)), wanted[3:9])
    assert store.read("embedding", 0).dtype == np.float32


@pytest.mark.parametrize("codec", ["int8", "float16", "float32"])
def test_compressed_arrays_are_lossless_readable_by_plain_zarr_and_chunked_by_view(tmp_path: Path, codec: str) -> None:
    store, plain = (export(tmp_path / kind, 6, codec=kind, images=200, rows=100) for kind in (f"{codec}+zstd", codec))
    for v in range(6):
        assert np.array_equal(store.read("embedding", v), plain.read("embedding", v))
    bare = zarr.open_array(tmp_path / f"{codec}+zstd/features.zarr/embedding", mode="r")
    assert np.array_equal(bare[:, 3], plain.stored("embedding", 3)[0])
    inner = bare.metadata.to_dict()["codecs"][0]["configuration"]["codecs"]
    assert [step["name"] for step in inner] == ["bytes", "zstd", "crc32c"]
    records = [(folder / done_key(0, 0, 4)).read_bytes() for folder in (store.storage.path, plain.storage.path)]
    assert records[0] == records[1]


@pytest.mark.parametrize("codec", ["int8", "float32", "int8+zstd", "float16+zstd"])
def test_our_shard_reader_returns_what_zarr_returns(tmp_path: Path, codec: str) -> None:
    """Shards of two chunks, a shorter last shard, a chunk and a shard of nothing but zeros; several spans of rows."""
    rows, images = 1500, 4000  # chunks of 750 rows
    store = make(tmp_path, 5, codec=codec, images=images, rows=rows)
    for shard in store.pending():
        n = shard.stop - shard.start
        x = np.random.default_rng(shard.block).normal(size=(n, 5, D)).astype(np.float32)
        x[: 750 * (shard.block == 0)] = 0
        x[: n * (shard.block == 1)] = 0
        kept = {"embedding": store.codecs["embedding"].encode(x)}
        store.write(shard, kept, np.zeros(n, np.uint8), content(shard.start, shard.stop), {})
    assert not (tmp_path / "features.zarr/embedding/c/1").exists()
    spans = [(0, images), (0, 0), (0, 1), (740, 760), (749, 1501), (750, 1500), (1499, 3001), (3999, 4000)]
    for view, (start, stop) in itertools.product((0, 3, 4), spans):
        direct = store.stored("embedding", view, slice(start, stop))[0]
        through_zarr = store.array("embedding")[start:stop, view]
        assert direct.dtype == through_zarr.dtype and np.array_equal(direct, through_zarr), (view, start, stop)


def train(store: FeatureStore, seed: int = 0) -> np.ndarray:
    """Train the codec of the embedding and return the sample (400, D)."""
    sample = np.random.default_rng(seed).normal(size=(400, D)).astype(np.float32)
    store.train("embedding", sample)
    return sample


def test_a_codebook_is_part_of_the_store_and_is_never_replaced(tmp_path: Path) -> None:
    store = make(tmp_path, 2, codec="pq:3")
    assert store.untrained() == ["embedding"]
    with pytest.raises(UserError, match=r"has no codebook/embedding.safetensors yet; repeat the command that made it"):
        write(store, store.pending()[0])
    train(store)
    assert store.untrained() == [] == FeatureStore(Folder(tmp_path)).untrained()
    book = (tmp_path / "codebook/embedding.safetensors").read_bytes()
    assert (tmp_path / "copy/codebook/embedding.safetensors").read_bytes() == book
    train(make(tmp_path, 2, codec="pq:3"), seed=1)  # a second export at the same time keeps the first codebook
    assert (tmp_path / "codebook/embedding.safetensors").read_bytes() == book
    grown = export(tmp_path, 6, codec="pq:3")
    assert (tmp_path / "codebook/embedding.safetensors").read_bytes() == book
    x = features(0, N, range(6))
    length = np.linalg.norm(x, axis=-1)
    for v in range(6):
        back = grown.read("embedding", v)
        assert np.allclose(np.linalg.norm(back, axis=1), length[:, v], rtol=1e-4)
        assert ((back * x[:, v]).sum(1) / length[:, v] ** 2).min() > 0.95


def test_product_codes_are_decoded_as_documented(tmp_path: Path) -> None:
    train(make(tmp_path, 6, codec="pq:3+zstd"))
    store = export(tmp_path, 6, codec="pq:3+zstd")
    documented = (ROOT / "docs/store.md").read_text().split("```python\n")[2].split("```")[0]
    names: dict[str, Any] = {}
    exec(documented.replace("STORE", str(tmp_path)), names)
    assert np.allclose(names["features"], store.read("embedding", 3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", range(6))
def test_a_kill_while_training_leaves_the_same_codebook(tmp_path: Path, changes: int) -> None:
    whole = make(tmp_path / "whole", 2, codec="pq:2")
    train(whole)
    failing = FailingFolder(tmp_path / "cut", 10**6)
    store = make(failing, 2, codec="pq:2")
    failing.left = changes
    with contextlib.suppress(PowerFailure):
        train(store)
    store = make(tmp_path / "cut", 2, codec="pq:2")
    if store.untrained():
        train(store)
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


def test_a_damaged_codebook_is_detected_and_repaired(tmp_path: Path) -> None:
    train(make(tmp_path, 2, codec="pq:3"))
    store = export(tmp_path, 2, codec="pq:3")
    wanted, file = store.read("embedding", 1), tmp_path / "codebook/embedding.safetensors"
    whole = file.read_bytes()
    for damage in (whole[:-7], whole[:200] + bytes([whole[200] ^ 4]) + whole[201:], None):
        file.write_bytes(damage) if damage else file.unlink()
        with pytest.raises(UserError, match="codebook/embedding.safetensors is damaged; compress verify --repair"):
            FeatureStore(Folder(tmp_path)).read("embedding", 1)
        found = integrity.check_small_files(Folder(tmp_path))
        assert [f.key for f in found] == ["codebook/embedding.safetensors"]
        found[0].repair()
        assert np.array_equal(FeatureStore(Folder(tmp_path)).read("embedding", 1), wanted)


def test_the_tables_are_read_as_they_were_given(tmp_path: Path) -> None:
    store = export(tmp_path, 2)
    assert [str(name) for name in store.table("sample_id")] == tables()["sample_id"]
    assert store.table("label").tolist() == tables()["label"].tolist()
    assert store.table("view_key").tolist() == list(range(N))
    assert store.table("content").tolist() == content(0, N).tolist()
    assert store.table("status").tolist() == [GOOD] * N
    dtypes = {name: store.table(name).dtype for name in ("label", "view_key", "content", "status")}
    assert dtypes == {"label": np.int64, "view_key": np.uint64, "content": np.uint64, "status": np.uint8}


def test_the_plain_zarr_package_alone_reads_the_features_as_documented(tmp_path: Path) -> None:
    store = export(tmp_path / "store", 6)
    documented = (ROOT / "docs/store.md").read_text().split("```python\n")[1].split("```")[0]
    assert 'zarr.open_group("STORE/features.zarr"' in documented and "view = 3" in documented
    code = (
        documented.replace("STORE", str(tmp_path / "store"))
        + """
import json, sys
assert not [name for name in sys.modules if name.startswith(("pipeline", "torch"))]
print(json.dumps([features.tolist(), group["sample_id"][:].tolist(), sorted(group.array_keys())]))
"""
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen, ids, names = json.loads(done.stdout)
    assert np.array_equal(np.array(seen, np.float32), store.read("embedding", 3))
    assert ids == tables()["sample_id"]
    assert names == ["content", "embedding", "embedding_scale", "label", "sample_id", "status", "view_key"]


def test_a_view_is_read_without_touching_the_others(tmp_path: Path) -> None:
    store = export(tmp_path, 4, codec="float32")
    shard = tmp_path / "features.zarr/embedding/c/0/0/0"
    data, needle = bytearray(shard.read_bytes()), features(0, 1, [2]).tobytes()
    data[data.index(needle)] ^= 1
    shard.write_bytes(data)
    for v in (0, 1, 3):
        assert np.array_equal(store.read("embedding", v), features(0, N, [v])[:, 0])
    with pytest.raises(UserError, match="array 'embedding' is damaged"):
        store.read("embedding", 2)


def test_reading_an_array_that_is_not_kept_is_an_error_that_lists_the_kept_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"keeps embedding, not 'logits'; export anew with --keep embedding,logits"):
        make(tmp_path, 1).read("logits", 0)


# ---------------------------------------------------------------- the layout


def test_golden_layout(tmp_path: Path) -> None:
    export(tmp_path, 5, images=5, bad={(4, 0): (BROKEN, "truncated")})
    arrays = {
        "embedding": ["c/0/0/0", "c/0/1/0"],  # the second row block holds one bad image: all zero, no file
        "embedding_scale": ["c/0/0", "c/0/1"],
        "status": ["c/0", "c/1"],
        "content": ["c/0", "c/1"],
        "sample_id": ["c/0"],
        "label": ["c/0"],
        "view_key": ["c/0"],
    }
    small = ["zarr.json", *(f"{name}/zarr.json" for name in arrays)]
    small += [f"{name}/c/0" for name in ("sample_id", "label", "view_key")]
    wanted = {"manifest.json", "copy/manifest.json"}
    wanted |= {f"copy/features.zarr/{key}" for key in small} | {f"features.zarr/{key}" for key in small}
    wanted |= {f"features.zarr/{name}/{chunk}" for name, chunks in arrays.items() for chunk in chunks}
    wanted |= {f"done/{block:07d}.{views}.json" for block in (0, 1) for views in ("0000-0004", "0004-0005")}
    assert set(tree(tmp_path)) == wanted


def test_golden_zarr_metadata(tmp_path: Path) -> None:
    make(tmp_path, 5)
    metadata = json.loads((tmp_path / "features.zarr/embedding/zarr.json").read_bytes())
    assert metadata == {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [10, 5, 3],
        "data_type": "int8",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4, 4, 3]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": [4, 1, 3],
                    "codecs": [{"name": "bytes"}, {"name": "crc32c"}],
                    "index_codecs": [
                        {"name": "bytes", "configuration": {"endian": "little"}},
                        {"name": "crc32c"},
                    ],
                    "index_location": "end",
                },
            }
        ],
        "attributes": {},
        "dimension_names": ["image", "view", "embedding_0"],
        "storage_transformers": [],
    }
    group = json.loads((tmp_path / "features.zarr/zarr.json").read_bytes())
    assert (group["zarr_format"], group["node_type"]) == (3, "group")


def test_golden_shard_and_done_record(tmp_path: Path) -> None:
    store = make(tmp_path, 3)
    x = np.arange(4 * 3 * D, dtype=np.float32).reshape(4, 3, D)
    x[2] = 0
    shard = store.pending()[0]
    status = np.array([0, 0, BROKEN, 0], np.uint8)
    store.write(shard, {"embedding": store.codecs["embedding"].encode(x)}, status, content(0, 4), {2: "truncated"})
    files = tree(tmp_path)
    found = {k: digests.digest(files[f"features.zarr/{k}"]) for k in ("embedding/c/0/0/0", "embedding_scale/c/0/0")}
    assert found == GOLDEN_SHARD
    assert files["done/0000000.0000-0003.json"].decode() == GOLDEN_RECORD


GOLDEN_SHARD = {
    "embedding/c/0/0/0": "72ea409b4d54966aa570aeaaf2613ebd",
    "embedding_scale/c/0/0": "2bfe1b0e57aaba37842dc6def021e2a1",
}
GOLDEN_RECORD = (
    '{"bad":{"2":"truncated"},"content":"7636e83a9669e8623a3a8bb12b4a7a5e",'
    '"digest":{"embedding":["a6b0ac3056e07e8bac5995ff06c42316","0da0e4c7fc0292af45009659faf85496",'
    '"b2faebce1b2b5908c50b932885af8a24"]},"rows":[0,4],"seal":"a450bd15039751f1f89e09928d833c0a",'
    '"status":"572a012a410fd686af1be500fcb43cb9","views":[0,3]}\n'
)


def test_a_done_record_holds_digests_of_rows_as_they_are_stored(tmp_path: Path) -> None:
    store = export(tmp_path, 5)
    for block, spans in store.done().items():
        rows = slice(*store.span(block))
        for first, stop in spans:
            record = json.loads((tmp_path / done_key(block, first, stop)).read_bytes())
            assert record["rows"] == [rows.start, rows.stop] and record["views"] == [first, stop]
            assert digests.sealed(record) == record
            assert record["status"] == digests.digest(store.table("status")[rows].tobytes())
            assert record["content"] == digests.digest(store.table("content")[rows].tobytes())
            stored = [store.stored("embedding", v, rows) for v in range(first, stop)]
            assert record["digest"]["embedding"] == [view_digest(*pair) for pair in stored]


def test_small_files_have_a_second_copy_and_a_digest_in_the_manifest(tmp_path: Path) -> None:
    store = make(tmp_path, 3)
    files = tree(tmp_path)
    assert files["copy/manifest.json"] == files["manifest.json"]
    for key, digest in store.about.small.items():
        assert files[key] == files[f"copy/{key}"]
        assert digests.digest(files[key]) == digest
    assert set(files) == {"manifest.json", *store.about.small} | {
        f"copy/{k}" for k in ["manifest.json", *store.about.small]
    }


@given(st.integers(1, 10**7), st.integers(1, 4096), st.integers(1, 8192), st.sampled_from([1, 2, 4]))
def test_shards_are_whole_batches_within_the_limits(images: int, batch: int, width: int, itemsize: int) -> None:
    rows = shard_rows(images, batch, {"embedding": [width]}, itemsize)
    assert rows % batch == 0 and rows >= batch
    assert rows == batch or (rows <= 2048 and rows * 4 * width * itemsize <= 256_000_000)
    assert rows <= max(batch, 256, -(-images // 16))


# ---------------------------------------------------------------- done and pending shards


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 11), st.data())
def test_the_pending_shards_are_those_without_a_done_record(
    images: int, rows: int, views: int, data: st.DataObject
) -> None:
    store = FeatureStore.__new__(FeatureStore)
    store.images, store.rows, store.about = images, rows, StoreAbout(views, small={})
    store.identity = plain_record(images, views, D, "int8", rows).identity
    blocks = range(-(-images // rows))
    spans = [(block, first, min(first + 4, views)) for block in blocks for first in range(0, views, 4)]
    there = data.draw(st.sets(st.sampled_from(spans)))

    class Names(Folder):
        def list(self, prefix: str = "") -> Any:
            return iter([done_key(*span) for span in there])

    store.storage = Names("nowhere")
    done = {(i, v) for block, a, b in there for i in range(block * rows, block * rows + rows) for v in range(a, b)}
    wanted = set(itertools.product(range(images), range(views))) - done
    pending = store.pending()
    assert {(i, v) for s in pending for i in range(s.start, s.stop) for v in s.views} == wanted
    assert [s.block for s in pending] == sorted({s.block for s in pending})
    assert all(s.start == s.block * rows and s.stop == min(images, s.start + rows) for s in pending)
    assert all(list(s.views) == sorted(s.views) for s in pending)


def test_the_done_record_is_written_after_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, order = make(tmp_path, 6), []
    put = Folder.put
    monkeypatch.setattr(Folder, "put", lambda self, key, data: (order.append(key), put(self, key, data)))
    write(store, store.pending()[0])
    kinds = [key.split("/")[0] for key in order]
    assert kinds == sorted(kinds, reverse=True)  # features.zarr..., then done...
    assert kinds.count("done") == 2 and kinds.count("features.zarr") == 6


def test_a_shard_without_its_done_record_is_pending_and_rewritten(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    export(whole, 3)
    failing = FailingFolder(tmp_path / "cut", 10**6)
    store = make(failing, 3)
    first = store.pending()[0]
    failing.left = 4  # embedding, scale, status, content: the next is the done record
    with pytest.raises(PowerFailure):
        write(store, first)
    assert (tmp_path / "cut/features.zarr/embedding/c/0/0/0").exists()
    assert store.done() == {} and store.pending()[0] == first
    export(tmp_path / "cut", 3)
    assert tree(tmp_path / "cut") == tree(whole)


def test_an_absent_chunk_is_not_a_missing_shard(tmp_path: Path) -> None:
    store = make(tmp_path, 2)
    zero = np.zeros((ROWS, 2, D), np.float32)
    for shard in store.pending():
        rows = shard.stop - shard.start
        kept = {"embedding": store.codecs["embedding"].encode(zero[:rows])}
        store.write(shard, kept, np.zeros(rows, np.uint8), np.zeros(rows, np.uint64), {})
    assert not (tmp_path / "features.zarr/embedding/c").exists() or not tree(tmp_path / "features.zarr/embedding/c")
    assert store.pending() == []
    store.require_complete()
    assert np.array_equal(store.read("embedding", 1), np.zeros((N, D)))


def test_zeros_written_over_earlier_features_are_read_as_zeros(tmp_path: Path) -> None:
    store = export(tmp_path, 2)
    shard = Shard(0, 0, 4, (0, 1))
    (tmp_path / done_key(0, 0, 2)).unlink()
    zero = store.codecs["embedding"].encode(np.zeros((4, 2, D), np.float32))
    store.write(shard, {"embedding": zero}, np.zeros(4, np.uint8), content(0, 4), {})
    assert not store.read("embedding", 1, slice(0, 4)).any()


@pytest.mark.parametrize("key", ["embedding/c/0/0/0", "embedding_scale/c/1/0", "content/c/2", "status/c/0"])
def test_a_missing_file_is_an_error_and_not_read_as_zeros(tmp_path: Path, key: str) -> None:
    store = export(tmp_path, 3)
    store.require_complete()
    (tmp_path / "features.zarr" / key).unlink()
    with pytest.raises(UserError, match=f"lacks 1 of the files.*{key}.*verify --repair"):
        store.require_complete()


def test_the_error_of_an_unfinished_store_counts_the_missing_shards(tmp_path: Path) -> None:
    store = make(tmp_path, 5)
    write(store, store.pending()[1])
    with pytest.raises(UserError, match="lacks 2 of 3 shards; repeat the command that made it"):
        store.require_complete()
    with pytest.raises(UserError, match="holds views 0 to 4, but view 7 was asked for.*--views 8"):
        export(tmp_path, 5).require_complete([0, 7])
    export(tmp_path, 6, bad={}).require_complete()


def test_complete_views_can_be_required_while_others_are_pending(tmp_path: Path) -> None:
    export(tmp_path, 4)
    store = make(tmp_path, 8)
    store.require_complete(range(4))
    with pytest.raises(UserError, match="lacks 3 of 3 shards"):
        store.require_complete()


# ---------------------------------------------------------------- continuing a store


def test_a_store_with_other_settings_is_refused_and_the_error_lists_the_differences(tmp_path: Path) -> None:
    export(tmp_path, 3)
    before = tree(tmp_path)
    with pytest.raises(Mismatch, match='batch_size is 1 there, 5 asked; codec is "int8" there, "float32" asked'):
        make(tmp_path, 3, codec="float32", batch_size=5)
    with pytest.raises(UserError, match="has 3 views, but 2 were asked for, and a store only grows"):
        make(tmp_path, 2)
    assert tree(tmp_path) == before


def test_a_fingerprint_stays_when_a_store_moves_or_grows(tmp_path: Path) -> None:
    first = export(tmp_path / "a", 3).fingerprint
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert FeatureStore(Folder(tmp_path / "b")).fingerprint == first
    assert make(tmp_path / "b", 9).fingerprint == first
    assert make(tmp_path / "c", 3, codec="float32").fingerprint != first


def test_opening_a_folder_that_is_no_store_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a store: it holds no manifest.json"):
        FeatureStore(Folder(tmp_path))


# ---------------------------------------------------------------- growth

PATHS = [(1, 8), (3, 5, 8), (4, 8), (2, 3, 4, 9)]
BAD: Bad = {
    (1, 0): (BROKEN, "truncated"),  # bad in every view, because the file is
    **{(1, v): (BROKEN, "truncated") for v in range(1, 9)},
    (4, 2): (NOT_FINITE, "not finite"),  # detected in an early view
    (6, 4): (NOT_FINITE, "not finite"),  # detected in the second view block
    (6, 7): (NOT_FINITE, "not finite"),
    (9, 7): (NOT_FINITE, "not finite"),  # detected in a late view
}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_grown_store_equals_to_the_byte_a_store_made_at_once(
    tmp_path: Path, codec: str, path: tuple[int, ...]
) -> None:
    for views in path:
        export(tmp_path / "grown", views, codec=codec)
    export(tmp_path / "fresh", path[-1], codec=codec)
    assert tree(tmp_path / "grown") == tree(tmp_path / "fresh")


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_row_that_is_bad_in_a_later_view_is_bad_in_all_views(tmp_path: Path, path: tuple[int, ...]) -> None:
    for views in path:
        grown = export(tmp_path / "grown", views, BAD)
    fresh = export(tmp_path / "fresh", path[-1], BAD)
    assert tree(tmp_path / "grown") == tree(tmp_path / "fresh")
    rows = sorted({i for i, v in BAD if v < path[-1]})
    for store in (grown, fresh):
        assert [i for i, _, _ in store.bad_images()] == rows
        for v in range(path[-1]):
            assert not store.read("embedding", v)[rows].any()


def test_growth_computes_only_the_new_views(tmp_path: Path) -> None:
    export(tmp_path, 3)
    assert {shard.views for shard in make(tmp_path, 8).pending()} == {(3, 4, 5, 6, 7)}


def test_old_views_stay_readable_during_growth(tmp_path: Path) -> None:
    old = export(tmp_path, 3)
    wanted = [old.read("embedding", v) for v in range(3)]
    store = make(tmp_path, 8)
    for shard in store.pending():
        for v in range(3):
            assert np.array_equal(FeatureStore(Folder(tmp_path)).read("embedding", v), wanted[v])
        write(store, shard)


def test_a_changed_image_is_detected_at_growth(tmp_path: Path) -> None:
    export(tmp_path, 3)
    store = make(tmp_path, 5)
    shard = store.pending()[1]
    changed = content(shard.start, shard.stop)
    changed[2] += np.uint64(1)
    x = store.codecs["embedding"].encode(features(shard.start, shard.stop, shard.views))
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"1 images? (is|are) not (that|those) .*, the first is ä/06.jpg"):
        store.write(shard, {"embedding": x}, np.zeros(4, np.uint8), changed, {})
    assert tree(tmp_path) == before


# ---------------------------------------------------------------- interruptions at any change


def changes(work: Callable[[Folder], Any], folder: Path) -> int:
    """Number of changes to the folder that `work` makes."""
    failing = FailingFolder(folder, 10**6)
    work(failing)
    return 10**6 - failing.left


def check_every_interruption(work: Callable[[Folder], Any], before: Path | None, scratch: Path) -> None:
    """Check that `work`, stopped before its n-th change for every n and then repeated, leaves the same files."""

    def start(name: str) -> Path:
        if before:
            shutil.copytree(before, scratch / name)
        return scratch / name

    total = changes(work, start("whole"))
    wanted = tree(scratch / "whole")
    assert total > 10
    for n in range(total):
        folder = start(f"cut-{n}")
        with pytest.raises(PowerFailure):
            work(FailingFolder(folder, n))
        work(Folder(folder))
        assert tree(folder) == wanted, f"stopped before change {n} of {total}"
        shutil.rmtree(folder)


FEW_BAD: Bad = {
    (0, 0): (BROKEN, "truncated"),
    **{(i, v): (NOT_FINITE, "not finite") for i, v in [(1, 1), (2, 4), (3, 6)]},
}


@pytest.mark.parametrize("images", [4, pytest.param(7, marks=pytest.mark.soak)])
def test_an_export_killed_before_any_of_its_changes_and_repeated_leaves_the_same_files(
    tmp_path: Path, images: int
) -> None:
    check_every_interruption(lambda folder: export(folder, 5, FEW_BAD, images=images), None, tmp_path)


@pytest.mark.parametrize("images", [4, pytest.param(7, marks=pytest.mark.soak)])
def test_a_growth_killed_before_any_of_its_changes_and_repeated_leaves_the_same_files(
    tmp_path: Path, images: int
) -> None:
    export(tmp_path / "before", 5, FEW_BAD, images=images)
    check_every_interruption(lambda folder: export(folder, 7, FEW_BAD, images=images), tmp_path / "before", tmp_path)
    export(tmp_path / "fresh", 7, FEW_BAD, images=images)
    assert tree(tmp_path / "whole") == tree(tmp_path / "fresh")


def test_a_store_killed_during_creation_can_be_grown(tmp_path: Path) -> None:
    export(tmp_path / "fresh", 8, images=4)
    for n in range(1, changes(lambda folder: make(folder, 3, images=4), tmp_path / "whole"), 3):
        with pytest.raises(PowerFailure):
            make(FailingFolder(tmp_path / f"cut-{n}", n), 3, images=4)
        export(tmp_path / f"cut-{n}", 8, images=4)
        assert tree(tmp_path / f"cut-{n}") == tree(tmp_path / "fresh")


@pytest.mark.soak
@pytest.mark.parametrize("codec", CODECS)
def test_a_growth_killed_twice_and_repeated_leaves_the_same_files(tmp_path: Path, codec: str) -> None:
    export(tmp_path / "before", 3, BAD, codec=codec, images=8)
    work = lambda folder: export(folder, 8, BAD, codec=codec, images=8)  # noqa: E731
    total = changes(work, shutil.copytree(tmp_path / "before", tmp_path / "whole"))
    wanted = tree(tmp_path / "whole")
    for first, second in itertools.product(range(total), range(0, total, 3)):
        folder = shutil.copytree(tmp_path / "before", tmp_path / "cut")
        for n in (first, second):
            try:
                work(FailingFolder(folder, n))
            except PowerFailure:
                continue
        work(Folder(folder))
        assert tree(folder) == wanted
        shutil.rmtree(folder)


# ---------------------------------------------------------------- bad images


def test_bad_images_keep_their_row_and_are_listed_with_reasons(tmp_path: Path) -> None:
    store = export(tmp_path, 5, BAD)
    assert store.bad_images() == [
        (1, "ä/01.jpg", "truncated (view 0)"),
        (4, "ä/04.jpg", "not finite (view 2)"),
        (6, "ä/06.jpg", "not finite (view 4)"),
    ]
    assert store.table("status").tolist() == [0, BROKEN, 0, 0, NOT_FINITE, 0, NOT_FINITE, 0, 0, 0]
    good = [0, 2, 3, 5, 7, 8, 9]
    wanted = store.codecs["embedding"].decode(*store.codecs["embedding"].encode(features(0, N, [4])))[:, 0]
    assert np.array_equal(store.read("embedding", 4)[good], wanted[good])
    assert export(tmp_path / "good", 2).bad_images() == []


def test_unwritten_rows_are_not_bad_images(tmp_path: Path) -> None:
    store = make(tmp_path, 2)
    assert store.bad_images() == []
    write(store, store.pending()[0], BAD)
    assert store.bad_images() == [(1, "ä/01.jpg", "truncated (view 0)")]
    assert set(store.table("status").tolist()) <= {*REASONS, 255}


# ---------------------------------------------------------------- damage


def damaged(file: Path, change: Callable[[bytes], bytes], read: Callable[[], Any], wanted: Any) -> bool:
    """Whether a change to a file is detected. A change that is neither detected nor harmless is a failure."""
    whole = file.read_bytes()
    file.write_bytes(change(whole))
    try:
        seen = read()
    except UserError as problem:
        assert "damaged" in str(problem)
        return True
    finally:
        file.write_bytes(whole)
    assert np.array_equal(seen, wanted)
    return False


@pytest.mark.parametrize(
    ("array", "chunk"),
    [
        ("embedding", "c/0/0/0"),
        ("embedding_scale", "c/0/0"),
        ("content", "c/0"),
        ("status", "c/0"),
        ("sample_id", "c/0"),
    ],
)
def test_a_flipped_bit_anywhere_in_a_file_is_detected(tmp_path: Path, array: str, chunk: str) -> None:
    export(tmp_path, 4)
    file = tmp_path / "features.zarr" / array / chunk

    def read() -> Any:
        store = FeatureStore(Folder(tmp_path))
        if not array.startswith("embedding"):
            return store.table(array)
        return np.concatenate([store.read("embedding", v) for v in range(4)])

    wanted, size = read(), file.stat().st_size
    for place in range(0, size, max(1, size // 40)):
        flip = lambda data, place=place: data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :]  # noqa: E731
        assert damaged(file, flip, read, wanted), f"byte {place} of {size}"


@pytest.mark.parametrize("file", ["embedding/c/1/0/0", "embedding_scale/c/1/0", "content/c/1", "label/c/0"])
def test_a_truncated_file_is_detected(tmp_path: Path, file: str) -> None:
    export(tmp_path, 4)
    target, array = tmp_path / "features.zarr" / file, file.split("/")[0]

    def read() -> Any:
        store = FeatureStore(Folder(tmp_path))
        return store.read("embedding", 0) if array.startswith("embedding") else store.table(array)

    wanted, size = read(), target.stat().st_size
    for left in (0, 1, 5, 20, size // 2, size - 1):
        assert damaged(target, lambda data, left=left: data[:left], read, wanted), f"cut to {left} bytes"


@pytest.mark.parametrize("key", ["zarr.json", "embedding/zarr.json", "embedding_scale/zarr.json"])
@pytest.mark.parametrize("junk", [b"", b"{", b"{}", b"null", b"\xff\xfe\x00"])
def test_damaged_metadata_is_detected(tmp_path: Path, key: str, junk: bytes) -> None:
    export(tmp_path, 2)
    read = lambda: FeatureStore(Folder(tmp_path)).read("embedding", 0)  # noqa: E731
    noticed = damaged(tmp_path / "features.zarr" / key, lambda _: junk, read, read())
    assert noticed or (key, junk) == ("zarr.json", b"{}")  # Zarr reads it as the metadata of a group, which is right


@pytest.mark.parametrize("key", ["zarr.json", "embedding/zarr.json", "label/zarr.json"])
def test_missing_metadata_is_not_mistaken_for_an_array_that_is_not_kept(tmp_path: Path, key: str) -> None:
    store = export(tmp_path, 2)
    (tmp_path / "features.zarr" / key).unlink()
    with pytest.raises(UserError, match="(is damaged|is gone).*see compress verify --repair"):
        store.table(key.split("/")[0]) if "/" in key else FeatureStore(Folder(tmp_path)).table("label")


def test_read_errors_of_the_disk_are_not_reported_as_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = export(tmp_path, 2)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error")

    store.array("embedding")
    monkeypatch.setattr(type(store.array("embedding")), "__getitem__", fail)
    with pytest.raises(OSError, match="Input/output error"):
        store.read("embedding", 0)


# ---------------------------------------------------------------- history


def test_each_event_appends_a_line_to_the_history_which_is_part_of_no_digest(tmp_path: Path) -> None:
    store = export(tmp_path, 2)
    before = store.fingerprint
    events = [HistoryEvent("now", "here", 1, "cpu", {"python": "3"}, 10, 20, seconds, 0) for seconds in (1, 2.5)]
    for event in events:
        store.append_history(event)
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [asdict(event) for event in events]
    assert store.history() == events
    assert FeatureStore(Folder(tmp_path)).fingerprint == before
    assert os.listdir(tmp_path / "copy") and "history.jsonl" not in os.listdir(tmp_path / "copy")
