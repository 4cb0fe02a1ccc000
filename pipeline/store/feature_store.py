"""FeatureStore: features[i, v] on disk, by shards.

Zarr encodes a shard in memory, `Storage` puts it in place whole, and the done record follows. What is
there and what is pending: `compress_ssl.pipeline.store.feature_store.shards`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from compress_ssl.pipeline.datasets.decode import GOOD, REASONS
from compress_ssl.pipeline.runtime import artifact, jsonl
from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.storage import Folder, Storage
from compress_ssl.pipeline.store.codecs import Trained
from compress_ssl.pipeline.store.layout import (
    GROUP,
    UNWRITTEN,
    VIEW_BLOCK,
    array_layouts,
    open_group,
    table_files,
    zarr_metadata,
)
from compress_ssl.pipeline.store.shard_reader import read_view
from compress_ssl.pipeline.store.shards import (
    Shard,
    ShardIndex,
    array_codecs,
    codebook_key,
    done_key,
    is_local,
    view_column,
    view_digest,
)
from compress_ssl.pipeline.views.numbering import LOCAL

COPY = "copy"  # second copies of the manifest, of the Zarr metadata, of the tables and of codebooks


class FeatureStore(ShardIndex):
    """Open a store to read and to write. Raises UserError if there is none or its manifest is damaged."""

    @classmethod
    def create(
        cls,
        storage: Storage,
        identity: Mapping[str, Any],
        about: Mapping[str, Any],
        tables: Mapping[str, Any],
        files: Mapping[str, bytes] | None = None,
    ) -> "FeatureStore":
        """Claim a folder for a store, or open the one that is there; more views than it has is growth.

        identity: {"data": {"images", ...}, "arrays": {name: shape of one (i, v)}, "shard_rows", "codec", ...}
        about: {"views": V, ...}; tables: {"sample_id": (N,) str, "label": (N,), "view_key": (N,)};
        files: {key: bytes} of what else belongs to the store, such as the teacher's heads.
        Raises Mismatch if it was made with other settings, UserError for fewer views than it has.
        """
        if not storage.exists(artifact.MANIFEST):
            cuts = array_layouts(identity, array_codecs(identity))
            small = zarr_metadata(cuts, identity["data"]["images"], _extents(identity, about["views"]))
            small |= table_files(tables) | dict(files or {})
            about = {**about, "small": {key: artifact.digest(data) for key, data in small.items()}}
            artifact.claim(storage, "store", identity, about)
            cls(storage)._put_small(small)
            return cls(storage)
        artifact.claim(storage, "store", identity)
        store = cls(storage)
        store._remove_leftovers()
        first = about.get("first_view", 0)
        if first > store.stored_views.start:
            raise UserError(
                f"{storage} holds views from {store.stored_views.start} on, not from {first}; a store only grows"
            )
        if about["views"] < store.views:
            raise UserError(
                f"{storage} has {store.views} views, but {about['views']} were asked for, and a store only grows; "
                f"ask for {store.views} or more, or name another folder"
            )
        last = f"{COPY}/{artifact.MANIFEST}"
        if (
            not storage.exists(last)
            or storage.get(last) != artifact.to_bytes(store.manifest)
            or store._damaged_small_files()
        ):
            small = zarr_metadata(store.grids, store.images, _extents(store.identity, store.views)) | table_files(
                tables
            )
            store._put_small(small | dict(files or {}) | store._codebooks())  # killed at it, or growing
        if about["views"] > store.views or first < store.stored_views.start:
            store._grow(about["views"], first)
        return cls(storage)

    # ------------------------------------------------------------------ reading

    @cached_property
    def group(self) -> Any:
        """The Zarr group. Raises UserError if its metadata is not what was written: Zarr believes what it can read."""
        if unlike := self._damaged_small_files():
            raise UserError(f"{self.storage}/{unlike[0]} is gone or damaged; see compress verify --repair")
        return open_group(self.storage)

    def _damaged_small_files(self) -> list[str]:
        """Keys of Zarr metadata that is not what the manifest says."""
        return [key for key in self.about["small"] if key.endswith("/zarr.json") and self.read_if_intact(key) is None]

    def array(self, name: str) -> Any:
        """One Zarr array. Raises UserError if the store does not keep it or its metadata is damaged."""
        if f"{GROUP}/{name}/zarr.json" in self.about["small"]:
            return self.group[name]
        kept = ", ".join(self.arrays)
        raise UserError(
            f"{self.storage} keeps {kept}, not {name!r}; export anew with --keep {','.join([*self.arrays, name])}"
        )

    def table(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """(n,) label, sample_id, view_key, content or status."""
        return self._read(name, rows)

    def stored(self, name: str, view: int, rows: slice = slice(None)) -> tuple[np.ndarray, np.ndarray | None]:
        """What lies on disk of one view: ((n, ...) as the codec keeps it, (n, ...) scale or None)."""
        if isinstance(folder := self.storage, Folder):
            self.array(name)  # its metadata is looked at, whoever reads
            start, stop, _ = rows.indices(self.images)
            place = folder.path / GROUP / name
            stored = self._whole(name, lambda: read_view(place, self.grids[name], view_column(view), start, stop))
        else:
            stored = self._read(name, (rows, view_column(view)))
        return stored, self._read(f"{name}_scale", (rows, view_column(view))) if self.codecs[name].scaled else None

    def read(self, name: str, view: int, rows: slice = slice(None)) -> np.ndarray:
        """(n, ...) float32 features of one view."""
        stored, scale = self.stored(name, view, rows)
        return self.codecs[name].decode(stored, scale)

    def read_rows(self, name: str, view: int, rows: np.ndarray) -> np.ndarray:
        """(n, ...) float32 features of one view of ascending rows, a row block in memory at a time."""
        out = []
        for block in np.unique(rows // self.rows).tolist() or [0]:
            start, stop = self.span(block)
            mine = rows[(rows >= start) & (rows < stop)] - start
            stored, scale = self.stored(name, view, slice(start, stop))
            out.append(self.codecs[name].decode(stored[mine], None if scale is None else scale[mine]))
        return np.concatenate(out)

    def _read(self, name: str, selection: Any) -> np.ndarray:
        array = self.array(name)
        return self._whole(name, lambda: np.asarray(array[selection]))

    def _whole(self, name: str, read: Callable[[], np.ndarray]) -> np.ndarray:
        """What `read` says of an array. Raises UserError if it is damaged."""
        try:
            return read()
        except (ValueError, RuntimeError, OSError) as problem:
            if isinstance(problem, OSError) and problem.errno:
                raise
            raise UserError(
                f"{self.storage}: array {name!r} is damaged ({_one_line(problem)}); "
                "compress verify --repair marks the shards to be made again"
            ) from None

    # ------------------------------------------------------------------ writing

    def write(
        self,
        shard: Shard,
        features: Mapping[str, tuple[np.ndarray, np.ndarray | None]],
        status: np.ndarray,
        content: np.ndarray,
        bad: Mapping[int, str],
    ) -> list[tuple[int, int]]:
        """Store a shard whole, then its done records -> the spans of views they are of.

        features: per array what the codec made, ((rows, views, ...), (rows, views, ...) or None);
        status (rows,) uint8; content (rows,) uint64; bad: {row number: reason}.
        Raises UserError if images changed since earlier views of these rows were stored.
        """
        whole = set(self.all_views) <= set(shard.views)  # it replaces all there is, and a list of done/ takes time
        held = [] if whole else self.done().get(shard.block, [])
        stale: set[int] = set()
        if held:
            status, bad, stale = self._join_earlier(shard, held, status, content, bad)
        records = []
        for first in sorted({v - v % VIEW_BLOCK for v in shard.views} | stale):
            views, place = self._block_of(first), (shard.block, view_column(first) // VIEW_BLOCK)
            digests: dict[str, list[str]] = {}
            for name in self.arrays_of(first):
                stored, scale = self._merge(name, shard, views, features[name])
                if np.any(status != GOOD):  # a bad image is zero in every view, whichever view found it out
                    stored = np.where(_along(status == GOOD, stored), stored, stored.dtype.type(0))
                    scale = None if scale is None else np.where(_along(status == GOOD, scale), scale, np.float32(0))
                self._put_chunk(name, place, stored)
                if scale is not None:
                    self._put_chunk(f"{name}_scale", place, scale)
                digests[name] = [
                    view_digest(stored[:, j], None if scale is None else scale[:, j]) for j in range(len(views))
                ]
            records.append((views, digests))
        self._put_chunk("status", (shard.block,), status)
        self._put_chunk("content", (shard.block,), content)
        rows = {"rows": [shard.start, shard.stop], "bad": {str(i): why for i, why in sorted(bad.items())}}
        rows |= {"status": artifact.digest(status.tobytes()), "content": artifact.digest(content.tobytes())}
        for views, digests in records:  # after the data: a crash between costs a shard, not its truth
            record = artifact.sealed({**rows, "views": [views.start, views.stop], "digest": digests})
            self.storage.put(done_key(shard.block, views.start, views.stop), artifact.canonical(record) + b"\n")
            for old in [s for s in held if s[0] == views.start and s[1] != views.stop]:
                self.storage.delete(done_key(shard.block, *old))
        return [(views.start, views.stop) for views, _ in records]

    def _join_earlier(
        self,
        shard: Shard,
        held: Sequence[tuple[int, int]],
        status: np.ndarray,
        content: np.ndarray,
        bad: Mapping[int, str],
    ) -> tuple[np.ndarray, dict[int, str], set[int]]:
        """(status, bad, first views whose done records say otherwise), joined with what earlier views found.

        Raises UserError if the images are not the ones seen then.
        """
        rows = slice(shard.start, shard.stop)
        changed = np.flatnonzero(self._read("content", rows) != content)
        if len(changed):
            name = self.table("sample_id")[shard.start + changed[0]]
            raise UserError(
                f"{len(changed)} images are not those the stored views were made from, the first is {name}; "
                "put them back, or export into a new folder"
            )
        status = np.maximum(self._read("status", rows), status)
        records = {span: self.record(shard.block, *span) for span in held}
        earlier = {int(i): why for record in records.values() for i, why in record["bad"].items()}
        now = artifact.digest(status.tobytes())
        return status, {**bad, **earlier}, {span[0] for span in held if records[span]["status"] != now}

    def _merge(
        self, name: str, shard: Shard, views: range, new: tuple[np.ndarray, np.ndarray | None]
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """One shard's content: the new views, and what a ragged view block already held."""
        made = [v for v in shard.views if is_local(name) == bool(v & LOCAL)]  # the columns of `new`
        if all(v in made for v in views):
            where = slice(made.index(views.start), made.index(views.start) + len(views))
            return new[0][:, where], None if new[1] is None else new[1][:, where]
        parts, scales = [], []
        for v in views:
            if v in made:
                j = made.index(v)
                stored, scale = new[0][:, j], None if new[1] is None else new[1][:, j]
            else:
                stored, scale = self.stored(name, v, slice(shard.start, shard.stop))
            parts.append(stored)
            scales.append(scale)
        return np.stack(parts, 1), None if scales[0] is None else np.stack([s for s in scales if s is not None], 1)

    def _put_chunk(self, name: str, place: tuple[int, ...], data: np.ndarray) -> None:
        """Encode one shard or chunk in memory and put it in place whole; all fill value is no file."""
        encoded, key = self.grids[name].encode(data), self._chunk_key(name, place)
        if encoded is None:
            self.storage.delete(key)
        else:
            self.storage.put(key, encoded)

    def _grow(self, views: int, first: int) -> None:
        """More views: new metadata, then the manifest that knows them."""
        small = zarr_metadata(self.grids, self.images, _extents(self.identity, views))
        for key, data in small.items():
            self.storage.put(key, data)
        about = {**self.about, "views": views, "first_view": first}
        if not first:
            del about["first_view"]
        self._amend(about, small)

    def _amend(self, about: Mapping[str, Any], small: Mapping[str, bytes]) -> None:
        """A manifest that knows more small files, which are in place, then their second copies."""
        digests = {**about["small"], **{key: artifact.digest(data) for key, data in small.items()}}
        self.manifest = artifact.write(self.storage, "store", self.identity, {**about, "small": digests})
        self.about = self.manifest["about"]
        self._put_copies(small)

    # ------------------------------------------------------------------ codebooks

    def untrained(self) -> list[str]:
        """Arrays whose codec has no codebook yet: nothing of them can be written or read."""
        kinds = {name: kind for name, kind in self.codecs.items() if isinstance(kind, Trained)}
        return [name for name in kinds if codebook_key(name) not in self.about["small"]]

    def train(self, name: str, features: np.ndarray) -> None:
        """Train the codec of an array on float32 features (..., D). The first codebook that is put stays for good."""
        key, kind = codebook_key(name), self.codecs[name]
        assert isinstance(kind, Trained)
        if not self.storage.exists(key):
            self.storage.put_new(key, kind.train(features))
        self._amend(artifact.read(self.storage, "store")["about"], {key: self.storage.get(key)})

    def _codebooks(self) -> dict[str, bytes]:
        """{key: bytes} of the codebooks that the manifest knows."""
        return {
            codebook_key(name): self._codebook(name)
            for name in self.codecs
            if codebook_key(name) in self.about["small"]
        }

    def _remove_leftovers(self) -> None:
        """Clear away what a killed writer left: unfinished files, done records that a wider one has replaced."""
        if isinstance(self.storage, Folder):
            self.storage.sweep()
        for block, spans in self.done().items():
            for first, stop in spans:
                if any(a <= first and stop <= b for a, b in spans if (a, b) != (first, stop)):
                    self.storage.delete(done_key(block, first, stop))

    def _put_small(self, small: Mapping[str, bytes]) -> None:
        for key, data in small.items():
            self.storage.put(key, data)
        self._put_copies(small)

    def _put_copies(self, small: Mapping[str, bytes]) -> None:
        for key, data in small.items():
            self.storage.put(f"{COPY}/{key}", data)
        self.storage.put(f"{COPY}/{artifact.MANIFEST}", artifact.to_bytes(self.manifest))

    # ------------------------------------------------------------------ what could not be used

    def bad_images(self) -> list[tuple[int, str, str]]:
        """[(row, sample_id, reason), ...] from the done records of blocks that have any."""
        status = self.table("status")
        bad = np.flatnonzero((status != GOOD) & (status != UNWRITTEN))
        if not len(bad):
            return []
        ids = self.table("sample_id")
        reasons: dict[int, str] = {}
        for block, spans in self.done().items():
            if np.any(bad // self.rows == block):
                for span in spans:
                    record = self.record(block, *span)
                    reasons |= {int(i): why for i, why in record["bad"].items()}
        return [(int(i), str(ids[i]), reasons.get(int(i), REASONS[int(status[i])])) for i in bad]

    def history(self) -> list[dict[str, Any]]:
        """What `remember` was told, in order; a line cut short by a crash is passed over."""
        key = "history.jsonl"
        return jsonl.parse_jsonl(self.storage.get(key).decode(errors="replace")) if self.storage.exists(key) else []

    def append_history(self, event: Mapping[str, Any]) -> None:
        """Add a line to history.jsonl: who made it when, at what cost. Outside every digest."""
        key = "history.jsonl"
        old = self.storage.get(key) if self.storage.exists(key) else b""
        self.storage.put(key, old + artifact.canonical(event) + b"\n")


def _extents(identity: Mapping[str, Any], views: int) -> dict[str, int]:
    """{array: views along its axis}"""
    local = identity.get("local", {}).get("views", 0)
    return {name: local if is_local(name) else views for name in identity["arrays"]}


def _along(rows: np.ndarray, data: np.ndarray) -> np.ndarray:
    """(n,) as (n, 1, ...), to go with data (n, ...)."""
    return rows.reshape(-1, *[1] * (data.ndim - 1))


def _one_line(problem: BaseException) -> str:
    return " ".join(str(problem).split())[:160]
