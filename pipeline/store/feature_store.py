"""FeatureStore: create, write and extend the array features[i, v] on disk, shard by shard.

Zarr encodes a shard in memory, `Storage` puts the file in place as a whole, and then the done record is written.
`compress_ssl.pipeline.store.shards` lists what is done and what is pending; `compress_ssl.pipeline.store.reader` reads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from compress_ssl.pipeline.datasets.decode import GOOD
from compress_ssl.pipeline.runtime import artifact, digests
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.records import UNSET, to_json
from compress_ssl.pipeline.runtime.storage import Folder, Storage
from compress_ssl.pipeline.store.codecs import Stored, Trained
from compress_ssl.pipeline.store.done_record import DoneRecord
from compress_ssl.pipeline.store.layout import VIEW_BLOCK, Column, array_layouts, table_files, zarr_metadata
from compress_ssl.pipeline.store.reader import HISTORY, StoreReader
from compress_ssl.pipeline.store.records import HistoryEvent, StoreAbout, StoreIdentity, StoreRecord, read_store
from compress_ssl.pipeline.store.shards import Shard, Span, array_codecs, codebook_key, done_key, view_digest
from compress_ssl.pipeline.views.groups import group_of, group_of_array

COPY = "copy"  # folder of second copies: manifest, Zarr metadata, tables, codebooks and heads


class FeatureStore(StoreReader):
    """A store open for reading and writing. Raises UserError if there is none or its manifest is damaged."""

    # ---------------------------------------------------------------- creating and growing

    @classmethod
    def create(
        cls,
        storage: Storage,
        record: StoreRecord,
        tables: Mapping[str, Column],
        files: Mapping[str, bytes] | None = None,
    ) -> "FeatureStore":
        """Create a store, or open the existing one; if more views are given than it has, it grows.

        record: the manifest, of which `about.small` is filled in here;
        tables: {"sample_id": (N,) str, "label": (N,), "view_key": (N,)};
        files: {key: bytes} of further files of the store, such as the teacher's heads.
        Raises Mismatch if the store was made with other settings, UserError for fewer views than it has.
        """
        files, identity, about = dict(files or {}), record.identity, record.about
        if not storage.exists(artifact.MANIFEST):
            layouts = array_layouts(identity.shard_rows, identity.arrays, array_codecs(identity.codec, identity.arrays))
            small = zarr_metadata(layouts, identity.data.images, _views_of_arrays(identity, about.views))
            small |= table_files(tables) | files
            about = replace(about, small={key: digests.digest(data) for key, data in small.items()})
            artifact.claim(storage, "store", to_json(identity), to_json(about))
            cls(storage)._put_small_files(small)
            return cls(storage)
        artifact.claim(storage, "store", to_json(identity))
        store = cls(storage)
        store._remove_leftovers()
        store._require_growth(about.views, about.first)
        if not store._small_files_complete():
            small = zarr_metadata(store.layouts, store.images, _views_of_arrays(store.identity, store.views))
            store._put_small_files(small | table_files(tables) | files | store._codebooks())
        if about.views > store.views or about.first < store.stored_views.start:
            store._grow(about.views, about.first)
        return cls(storage)

    def _require_growth(self, views: int, first: int) -> None:
        """Raises UserError if the views first..views-1 lack some that the store has."""
        if first > self.stored_views.start:
            raise UserError(
                f"{self.storage} holds views from {self.stored_views.start} on, not from {first}; a store only grows"
            )
        if views < self.views:
            raise UserError(
                f"{self.storage} has {self.views} views, but {views} were asked for, and a store only grows; "
                f"ask for {self.views} or more, or name another folder"
            )

    def _small_files_complete(self) -> bool:
        """Whether the last small file was written. It was not if a process was killed while creating or growing."""
        last = f"{COPY}/{artifact.MANIFEST}"
        if not self.storage.exists(last) or self.storage.get(last) != artifact.to_bytes(self.manifest):
            return False
        return not self._damaged_metadata()

    def _remove_leftovers(self) -> None:
        """Delete what a killed writer left: unfinished files, and done records that a wider one replaces."""
        if isinstance(self.storage, Folder):
            self.storage.sweep()
        for block, spans in self.done().items():
            for first, stop in spans:
                if any(a <= first and stop <= b for a, b in spans if (a, b) != (first, stop)):
                    self.storage.delete(done_key(block, first, stop))

    def _grow(self, views: int, first: int) -> None:
        """Extend the store to the views first..views-1: write the new metadata, then the manifest with its digests."""
        small = zarr_metadata(self.layouts, self.images, _views_of_arrays(self.identity, views))
        for key, data in small.items():
            self.storage.put(key, data)
        self._register(replace(self.about, views=views, first_view=first or UNSET), small)

    # ---------------------------------------------------------------- writing

    def write(
        self,
        shard: Shard,
        features: Mapping[str, Stored],
        status: np.ndarray,
        content: np.ndarray,
        bad: Mapping[int, str],
    ) -> list[Span]:
        """Write a shard, then its done records; return the spans of views that the records cover.

        features: per array what the codec returned, ((rows, views, ...), (rows, views, ...) or None);
        status (rows,) uint8; content (rows,) uint64; bad: {row number: reason}.
        Raises UserError if images changed since earlier views of these rows were stored.
        """
        complete = set(self.all_views) <= set(shard.views)  # replaces everything: listing done/ can be skipped
        earlier = [] if complete else self.done().get(shard.block, [])
        stale: set[int] = set()
        if earlier:
            status, bad, stale = self._join_earlier(shard, earlier, status, content, bad)
        digests_by_views = {}
        for first in sorted({v - v % VIEW_BLOCK for v in shard.views} | stale):
            views = self._block_of(first)
            digests_by_views[views] = self._write_view_block(shard, views, features, status == GOOD)
        self._put_chunk("status", (shard.block,), status)
        self._put_chunk("content", (shard.block,), content)
        # After the data: a crash in between costs a shard, but no done record describes data that are not there.
        for views, view_digests in digests_by_views.items():
            record = DoneRecord(
                rows=(shard.start, shard.stop),
                views=(views.start, views.stop),
                bad={str(i): why for i, why in sorted(bad.items())},
                status=digests.digest(status.tobytes()),
                content=digests.digest(content.tobytes()),
                digest=view_digests,
            )
            self._put_done_record(shard.block, record, earlier)
        return [(views.start, views.stop) for views in digests_by_views]

    def _put_done_record(self, block: int, record: DoneRecord, earlier: Sequence[Span]) -> None:
        """Write a done record, then delete the earlier records of the same view block with another number of views."""
        start, end = record.views
        self.storage.put(done_key(block, start, end), record.to_bytes())
        for first, stop in earlier:
            if first == start and stop != end:
                self.storage.delete(done_key(block, first, stop))

    def _write_view_block(
        self, shard: Shard, views: range, features: Mapping[str, Stored], good: np.ndarray
    ) -> dict[str, tuple[str, ...]]:
        """Write the files of one view block -> {array: digest of each view}.

        good: (rows,) bool. A bad image is zero in all views, whichever view it was found bad in.
        """
        view_digests: dict[str, tuple[str, ...]] = {}
        block = (shard.block, group_of(views.start).column(views.start) // VIEW_BLOCK)
        for name in self.arrays_of(views.start):
            stored, scale = self._merge(name, shard, views, features.get(name))
            if not good.all():
                stored = np.where(_expand_dims(good, stored), stored, stored.dtype.type(0))
                scale = None if scale is None else np.where(_expand_dims(good, scale), scale, np.float32(0))
            self._put_chunk(name, block, stored)
            if scale is not None:
                self._put_chunk(f"{name}_scale", block, scale)
            view_digests[name] = tuple(
                view_digest(stored[:, j], None if scale is None else scale[:, j]) for j in range(len(views))
            )
        return view_digests

    def _join_earlier(
        self,
        shard: Shard,
        earlier: Sequence[Span],
        status: np.ndarray,
        content: np.ndarray,
        bad: Mapping[int, str],
    ) -> tuple[np.ndarray, dict[int, str], set[int]]:
        """Join status and bad images with those of views that were stored earlier.

        earlier: spans of the existing done records -> (status, bad, first views of the records that are now stale,
        because their status differs). Raises UserError if the images are not those of the earlier views.
        """
        rows = slice(shard.start, shard.stop)
        changed = np.flatnonzero(self._read_array("content", rows) != content)
        if len(changed):
            name = self.table("sample_id")[shard.start + changed[0]]
            raise UserError(
                f"{len(changed)} images are not those the stored views were made from, the first is {name}; "
                "put them back, or export into a new folder"
            )
        status = np.maximum(self._read_array("status", rows), status)
        records = {span: self.record(shard.block, *span) for span in earlier}
        bad_earlier = {int(i): why for record in records.values() for i, why in record.bad.items()}
        now = digests.digest(status.tobytes())
        return status, {**bad, **bad_earlier}, {span[0] for span in earlier if records[span].status != now}

    def _merge(self, name: str, shard: Shard, views: range, new: Stored | None) -> Stored:
        """The content of one view block: the new views, and the views of the block that were stored before.

        new: what the codec returned for those views of `shard` that belong to the array `name`; None if none do.
        """
        group = group_of_array(name)
        columns = {v: j for j, v in enumerate(filter(group.contains, shard.views))}  # of `new`
        if new and all(v in columns for v in views):
            first = columns[views.start]
            return _take_columns(new, slice(first, first + len(views)))
        rows = slice(shard.start, shard.stop)
        parts = [_take_columns(new, columns[v]) if new and v in columns else self.stored(name, v, rows) for v in views]
        scales = [scale for _, scale in parts if scale is not None]
        return np.stack([stored for stored, _ in parts], 1), np.stack(scales, 1) if scales else None

    def _put_chunk(self, name: str, block: tuple[int, ...], data: np.ndarray) -> None:
        """Write one shard of an array as a whole. A shard that holds nothing but fill value has no file."""
        encoded, key = self.layouts[name].encode(data), self._chunk_key(name, block)
        if encoded is None:
            self.storage.delete(key)
        else:
            self.storage.put(key, encoded)

    # ---------------------------------------------------------------- small files and their second copies

    def _put_small_files(self, small: Mapping[str, bytes]) -> None:
        for key, data in small.items():
            self.storage.put(key, data)
        self._put_copies(small)

    def _put_copies(self, small: Mapping[str, bytes]) -> None:
        """Write the second copies. That of the manifest comes last: it marks the small files as complete."""
        for key, data in small.items():
            self.storage.put(f"{COPY}/{key}", data)
        self.storage.put(f"{COPY}/{artifact.MANIFEST}", artifact.to_bytes(self.manifest))

    def _register(self, about: StoreAbout, small: Mapping[str, bytes]) -> None:
        """Write a manifest with the digests of further small files, which exist already, then their second copies."""
        known = {**about.small, **{key: digests.digest(data) for key, data in small.items()}}
        self.about = replace(about, small=known)
        self.manifest = artifact.write(self.storage, "store", self.manifest.identity, to_json(self.about))
        self._put_copies(small)

    # ---------------------------------------------------------------- codebooks

    def untrained(self) -> list[str]:
        """Arrays whose codec has no codebook yet, so that they can be neither written nor read."""
        trained = [name for name, kind in self.codecs.items() if isinstance(kind, Trained)]
        return [name for name in trained if codebook_key(name) not in self.about.small]

    def train(self, name: str, features: np.ndarray) -> None:
        """Train the codec of an array on float32 features (..., D).

        The first codebook that is written is kept for good; a second call registers that one.
        """
        key, kind = codebook_key(name), self.codecs[name]
        assert isinstance(kind, Trained)
        if not self.storage.exists(key):
            self.storage.put_new(key, kind.train(features))
        self._register(read_store(self.storage).about, {key: self.storage.get(key)})

    def _codebooks(self) -> dict[str, bytes]:
        """{key: bytes} of the codebooks that are in the manifest."""
        trained = [name for name in self.codecs if codebook_key(name) in self.about.small]
        return {codebook_key(name): self._codebook(name) for name in trained}

    # ---------------------------------------------------------------- history

    def append_history(self, event: HistoryEvent) -> None:
        """Append a line to history.jsonl: who exported when, at what cost. The file is part of no digest."""
        old = self.storage.get(HISTORY) if self.storage.exists(HISTORY) else b""
        self.storage.put(HISTORY, old + digests.canonical(to_json(event)) + b"\n")


def _views_of_arrays(identity: StoreIdentity, views: int) -> dict[str, int]:
    """{feature array: number of views along its axis}; `views` is the number of global views."""
    groups = identity.groups(views)
    return {name: group_of_array(name, groups).count for name in identity.arrays}


def _take_columns(data: Stored, columns: int | slice) -> Stored:
    """Some of the views of what a codec returned."""
    stored, scale = data
    return stored[:, columns], None if scale is None else scale[:, columns]


def _expand_dims(rows: np.ndarray, data: np.ndarray) -> np.ndarray:
    """(n,) reshaped to (n, 1, ...), so that it broadcasts with data (n, ...)."""
    return rows.reshape(-1, *[1] * (data.ndim - 1))
