"""ShardIndex: the manifest of a store, its shards, which of them are done, and the names of their files.

A shard is a run of consecutive rows in up to four views and has one writer. A shard is done if a done record names
it, and pending otherwise. An absent chunk file proves nothing, because Zarr writes no file for a chunk of nothing but
fill value. Names and layout are described in docs/store.md.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from compress_ssl.pipeline.runtime import artifact, digests
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.storage import Storage
from compress_ssl.pipeline.store.codecs import Codec, Trained, build_codec
from compress_ssl.pipeline.store.done_record import DoneRecord, read_done_record
from compress_ssl.pipeline.store.layout import GROUP, VIEW_BLOCK, ArrayLayout, array_layouts
from compress_ssl.pipeline.store.records import ExportRecord, StoreRecord, export_record, read_store, store_record
from compress_ssl.pipeline.views.groups import ViewGroup, group_of, group_of_array

SHARD_ROWS = 2048  # largest number of rows of a shard
SHARD_BYTES = 256_000_000  # largest size of a shard before compression; a writer holds one in memory
SMALL_SET_SHARDS = 16  # shards that a small set is cut into, so that several workers have work
SMALL_SET_ROWS = 256  # rows below which a shard is not cut further for that reason

Span = tuple[int, int]
"""Views of a view block that one done record covers: (first, one past the last)."""

_DONE = re.compile(r"done/(\d+)\.(\d+)-(\d+)\.json$")


@dataclass(frozen=True)
class Shard:
    """The unit of work of an export: rows start..stop-1 in `views`. A row block has one writer at a time."""

    block: int
    start: int
    stop: int
    views: tuple[int, ...]


def shard_rows(images: int, batch_size: int, arrays: Mapping[str, Sequence[int]], itemsize: int) -> int:
    """Rows per shard: whole batches, at most SHARD_ROWS and SHARD_BYTES; a small set gets about 16 shards.

    arrays: {name: shape of one (i, v)}; itemsize: bytes of a number as stored.
    """
    row_bytes = max(int(np.prod(shape)) for shape in arrays.values()) * itemsize * VIEW_BLOCK
    most = min(SHARD_ROWS, SHARD_BYTES // row_bytes, max(SMALL_SET_ROWS, -(-images // SMALL_SET_SHARDS)))
    return max(1, most // batch_size) * batch_size


class ShardIndex:
    """A store's manifest and its done records. Raises UserError if the manifest is missing, damaged or not valid."""

    def __init__(self, storage: Storage):
        self.storage = storage
        self.manifest = artifact.read(storage, "store")
        record = store_record(self.manifest, f"{storage}/{artifact.MANIFEST}")
        self.identity, self.about = record.identity, record.about
        self.images = self.identity.data.images
        self.rows = self.identity.shard_rows  # of a row block; the last one may be shorter
        self.arrays = self.identity.arrays  # {name: shape of one (i, v)}
        self.codecs: dict[str, Codec] = array_codecs(self.identity.codec, self.arrays, self._codebook)
        self.layouts: dict[str, ArrayLayout] = array_layouts(self.rows, self.arrays, self.codecs)

    @cached_property
    def export(self) -> ExportRecord:
        """What the store says of its origin. Raises UserError for the features of an evaluation, which do not."""
        return export_record(StoreRecord(self.identity, self.about), str(self.storage))

    @property
    def views(self) -> int:
        """Number of global views."""
        return self.about.views

    @property
    def stored_views(self) -> range:
        """Numbers of the global views that the store holds. A copy may lack the first ones."""
        return range(self.about.first, self.views)

    @property
    def groups(self) -> tuple[ViewGroup, ...]:
        """The groups of views that the store holds, the global ones first."""
        return self.identity.groups(self.views, self.about.first)

    @property
    def other_views(self) -> list[int]:
        """Numbers of the views of all groups but the global ones. These do not grow."""
        return [view for group in self.groups[1:] for view in group.numbers]

    @property
    def all_views(self) -> list[int]:
        """Numbers of the views of all groups that the store holds."""
        return [*self.stored_views, *self.other_views]

    def arrays_of(self, view: int) -> list[str]:
        """Names of the feature arrays that hold this view."""
        return [name for name in self.arrays if group_of_array(name).contains(view)]

    def _block_of(self, first: int) -> range:
        """The views of the view block that begins with `first`."""
        return range(first, min(first + VIEW_BLOCK, group_of(first, self.groups).numbers.stop))

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the identity, which runs and copies record as their parent.

        It covers the identity alone, so it stays the same when the store is moved or gets more views.
        """
        return digests.fingerprint(self.manifest.identity)

    def done(self) -> dict[int, list[Span]]:
        """{row block: [span of views, ...]}, read from the names of the done records.

        A name that is no row block and view block of this store is not that of a done record.
        """
        out: dict[int, list[Span]] = {}
        for key in self.storage.list("done"):
            match = _DONE.match(key)
            if match:
                block, first, stop = map(int, match.groups())
                if block < self.blocks and first % VIEW_BLOCK == 0 and first < stop <= first + VIEW_BLOCK:
                    out.setdefault(block, []).append((first, stop))
        return out

    def record(self, block: int, first: int, stop: int) -> DoneRecord:
        """A done record: rows, bad images, digests. Raises UserError if it is damaged or is that of another shard."""
        where = f"{self.storage}/{done_key(block, first, stop)}"
        record = read_done_record(self.storage.get(done_key(block, first, stop)), where)
        views = {name: len(of_views) for name, of_views in record.digest.items()}
        expected = dict.fromkeys(self.arrays_of(first), stop - first)
        if (record.rows, record.views, views) != (self.span(block), (first, stop), expected):
            raise UserError(
                f"{where} is not valid: its rows, views or arrays are not those of this shard; compress verify "
                "--repair marks it to be made again"
            )
        return record

    def pending(self, views: int | None = None) -> list[Shard]:
        """Shards that are not done, in order of their rows.

        views: the number of global views that the store is to have; by default the number that it has.
        """
        done = self.done()
        wanted = {*range(self.stored_views.start, views or self.views), *self.other_views}
        out = []
        for block in range(self.blocks):
            spans = done.get(block, [])
            missing = wanted.difference(*(range(first, stop) for first, stop in spans)) if spans else wanted
            if missing:
                start, stop = self.span(block)
                out.append(Shard(block, start, stop, tuple(sorted(missing))))
        return out

    def is_done(self, shard: Shard) -> bool:
        """Whether all done records of this shard exist, perhaps written by another process."""
        spans = [self._block_of(first) for first in {v - v % VIEW_BLOCK for v in shard.views}]
        return all(self.storage.exists(done_key(shard.block, span.start, span.stop)) for span in spans)

    @property
    def blocks(self) -> int:
        """Number of row blocks."""
        return -(-self.images // self.rows)

    def span(self, block: int) -> tuple[int, int]:
        """(first row, one past the last row) of a row block."""
        return block * self.rows, min(self.images, (block + 1) * self.rows)

    def require_complete(self, views: Sequence[int] | None = None) -> None:
        """Raises UserError if any (i, v) of these views (default: all views) is not done or its file is missing."""
        wanted = set(self.all_views if views is None else views)
        absent = wanted.difference(self.all_views)
        if absent:
            more = max(absent) >= self.views
            remedy = f"--views {max(absent) + 1}" if more else "the views that it was copied without"
            raise UserError(
                f"{self.storage} holds views {self.stored_views.start} to {self.views - 1}, but view {max(absent)} was "
                f"asked for; repeat the command that made it with {remedy}"
            )
        lacking = sum(1 for shard in self.pending() if wanted & set(shard.views))
        if lacking:
            raise UserError(f"{self.storage} lacks {lacking} of {self.blocks} shards; repeat the command that made it")
        missing = self._missing_files(wanted)
        if missing:
            raise UserError(
                f"{self.storage} lacks {len(missing)} of the files that its done records name, the first is "
                f"{missing[0]}; compress verify --repair marks the shards to be made again"
            )

    def _missing_files(self, views: set[int]) -> list[str]:
        """Files of done shards that are missing. Zarr would read the fill value instead, without an error.

        A shard of nothing but fill value has no file; the digest in its done record distinguishes it.
        """
        existing = set(self.storage.list(GROUP))
        missing: dict[str, None] = {}  # an ordered set
        for block, spans in self.done().items():
            for span in spans:
                if not views & set(range(*span)):
                    continue
                for key, name in self.shard_keys(block, span).items():
                    if key not in existing and not self._is_fill(name, block, span):
                        missing[key] = None
        return list(missing)

    def _is_fill(self, name: str, block: int, views: Span) -> bool:
        """Whether, by its done record, an array holds nothing but fill value in a row block and these views."""
        rows = self.span(block)[1] - self.span(block)[0]
        record = self.record(block, *views)
        layout = self.layouts[name]
        fill = np.full((rows, *layout.shards[2:]), layout.fill, layout.dtype)
        if name in ("status", "content"):
            return digests.digest(fill.tobytes()) == (record.status if name == "status" else record.content)
        scale = np.zeros(fill.shape[:-1], "<f4") if self.codecs[name].scaled else None
        return set(record.digest[name]) == {view_digest(fill, scale)}

    def shard_keys(self, block: int, views: Span) -> dict[str, str]:
        """{key of a file: name of its array} for all files that one done record covers.

        The file of an array's scales is listed under the name of that array.
        """
        keys = {self._chunk_key(name, (block,)): name for name in ("status", "content")}
        view_block = group_of(views[0]).column(views[0]) // VIEW_BLOCK
        for name in self.arrays_of(views[0]):
            for part in [name, f"{name}_scale"] if self.codecs[name].scaled else [name]:
                keys[self._chunk_key(part, (block, view_block))] = name
        return keys

    def _chunk_key(self, name: str, block: tuple[int, ...]) -> str:
        """Key of the file of a shard; block: (row block,) or (row block, view block)."""
        return f"{GROUP}/{name}/{self.layouts[name].chunk_key(*block)}"

    def read_if_intact(self, key: str, read_from: str | None = None) -> bytes | None:
        """A small file if it fits its digest in the manifest, else None.

        read_from: the key to read instead, that of the second copy.
        """
        try:
            data = self.storage.get(read_from or key)
        except FileNotFoundError:
            return None
        return data if digests.digest(data) == self.about.small[key] else None

    def read_small_file(self, key: str) -> bytes:
        """A small file: Zarr metadata, table, codebook or heads. Raises UserError if it does not fit its digest."""
        data = self.read_if_intact(key)
        if data is None:
            raise UserError(f"{self.storage}/{key} is damaged; compress verify --repair mends it from its copy")
        return data

    def _codebook(self, name: str) -> bytes:
        """The codebook of an array. Raises UserError if there is none yet, or it is damaged or not valid."""
        key = codebook_key(name)
        if key not in self.about.small:  # another process may have trained it since this store was opened
            self.about = read_store(self.storage).about
        if key not in self.about.small:
            raise UserError(f"{self.storage} has no {key} yet; repeat the command that made it")
        data, kind = self.read_small_file(key), self.codecs[name]
        fault = kind.fault_of(data, self.arrays[name][-1]) if isinstance(kind, Trained) else ""
        if fault:
            raise UserError(
                f"{self.storage}/{key} is not valid: {fault}; restore the store from a copy, or export anew"
            )
        return data


def array_codecs(codec: str, arrays: Iterable[str], codebook: Callable[[str], bytes] | None = None) -> dict[str, Codec]:
    """{name of a feature array: its codec}; `codebook` returns the codebook of a named array."""
    return {name: build_codec(codec, codebook and partial(codebook, name)) for name in arrays}


def codebook_key(name: str) -> str:
    """Key of the file with the codebook of an array."""
    return f"codebook/{name}.safetensors"


def done_key(block: int, first: int, stop: int) -> str:
    """Key of the done record of a row block and the views first..stop-1."""
    return f"done/{block:07d}.{first:04d}-{stop:04d}.json"


def view_digest(stored: NDArray[np.generic], scale: NDArray[np.generic] | None) -> str:
    """Digest of one view of a shard: of the stored rows followed by their scales, little-endian."""
    return digests.digest(stored.tobytes() + (b"" if scale is None else scale.tobytes()))
