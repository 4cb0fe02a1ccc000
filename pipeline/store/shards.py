"""Shelf: what a store is, which of its shards are there, and what they are called.

A shard is a run of consecutive rows and up to four views; it has one writer. What a done record names
is there, what none names is pending. "The chunk is absent" says nothing: Zarr writes no chunk that is
all fill value. Names and layout: docs/store.md.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.storage import Storage
from compress_ssl.pipeline.store.codecs import Codec, codec
from compress_ssl.pipeline.store.layout import GROUP, VIEW_BLOCK, ArrayLayout, array_layouts
from compress_ssl.pipeline.views.numbering import LOCAL

SHARD_ROWS = 2048
SHARD_BYTES = 256_000_000
_DONE = re.compile(r"done/(\d+)\.(\d+)-(\d+)\.json$")


@dataclass(frozen=True)
class Shard:
    """What one task computes: rows start..stop-1 in `views`; nobody else writes row block `block`."""

    block: int
    start: int
    stop: int
    views: tuple[int, ...]


def shard_rows(images: int, batch_size: int, arrays: Mapping[str, Sequence[int]], itemsize: int) -> int:
    """Rows per shard: whole batches, at most 2048 rows and 256 MB, and about 16 shards in a small set."""
    row_bytes = max(int(np.prod(shape)) for shape in arrays.values()) * itemsize * VIEW_BLOCK
    most = min(SHARD_ROWS, SHARD_BYTES // row_bytes, max(256, -(-images // 16)))
    return max(1, most // batch_size) * batch_size


class ShardIndex:
    """A store's manifest and its done records. Raises UserError if there is none or it is damaged."""

    def __init__(self, storage: Storage):
        self.storage = storage
        self.manifest = artifact.read(storage, "store")
        self.identity: dict[str, Any] = self.manifest["identity"]
        self.about: dict[str, Any] = self.manifest["about"]
        self.images: int = self.identity["data"]["images"]
        self.rows: int = self.identity["shard_rows"]
        self.arrays: dict[str, tuple[int, ...]] = {k: tuple(s) for k, s in self.identity["arrays"].items()}
        self.codecs: dict[str, Codec] = array_codecs(self.identity, self._codebook)
        self.grids: dict[str, ArrayLayout] = array_layouts(self.identity, self.codecs)
        crops = self.identity.get("local", {}).get("views", 0)
        self.local: tuple[int, ...] = tuple(range(LOCAL, LOCAL + crops))  # numbers of the local crops

    @property
    def views(self) -> int:
        """Global views; local crops are counted in `local`."""
        return self.about["views"]

    @property
    def stored_views(self) -> range:
        """Views that are there to be used: all of them, but of a copy cut down perhaps only those from some view on."""
        return range(self.about.get("first_view", 0), self.views)

    @property
    def all_views(self) -> list[int]:
        """Numbers of all that is stored of an image."""
        return [*self.stored_views, *self.local]

    def arrays_of(self, view: int) -> list[str]:
        """Names of the feature arrays that hold this view."""
        return [name for name in self.arrays if is_local(name) == bool(view & LOCAL)]

    def _block_of(self, first: int) -> range:
        """The views of the view block that begins with `first`."""
        end = LOCAL + len(self.local) if first & LOCAL else self.views
        return range(first, min(first + VIEW_BLOCK, end))

    @cached_property
    def fingerprint(self) -> str:
        """What children record as their parent: identity only, so a moved or grown store still fits."""
        return artifact.fingerprint(self.identity)

    def done(self) -> dict[int, list[tuple[int, int]]]:
        """{row block: [(first view, one past the last), ...]} from the names of the done records."""
        out: dict[int, list[tuple[int, int]]] = {}
        for key in self.storage.list("done"):
            if match := _DONE.match(key):
                block, first, stop = map(int, match.groups())
                out.setdefault(block, []).append((first, stop))
        return out

    def record(self, block: int, first: int, stop: int) -> dict[str, Any]:
        """A done record: rows, bad images, digests. Raises UserError if it is not what was written."""
        raw = self.storage.get(done_key(block, first, stop))
        try:
            record = json.loads(raw)
            whole = artifact.canonical(artifact.sealed(record)) + b"\n" == raw
        except (ValueError, AttributeError):
            whole = False
        if not whole:
            raise UserError(
                f"{self.storage}/{done_key(block, first, stop)} is damaged: it does not fit its own digest; "
                "compress verify --repair marks its shard to be made again"
            )
        return record

    def pending(self, views: int | None = None) -> list[Shard]:
        """Row blocks with views that are not done, in order; as if there were to be `views` of them, if given."""
        done = self.done()
        wanted = {*range(self.stored_views.start, views or self.views), *self.local}
        out = []
        for block in range(-(-self.images // self.rows)):
            spans = done.get(block, [])
            missing = wanted.difference(*(range(first, stop) for first, stop in spans)) if spans else wanted
            if missing:
                start, stop = self.span(block)
                out.append(Shard(block, start, stop, tuple(sorted(missing))))
        return out

    def is_done(self, shard: Shard) -> bool:
        """Whether somebody else has written this shard meanwhile."""
        spans = [self._block_of(first) for first in {v - v % VIEW_BLOCK for v in shard.views}]
        return all(self.storage.exists(done_key(shard.block, span.start, span.stop)) for span in spans)

    def span(self, block: int) -> tuple[int, int]:
        """First row of a block and one past its last."""
        return block * self.rows, min(self.images, (block + 1) * self.rows)

    def require_complete(self, views: Sequence[int] | None = None) -> None:
        """Raises UserError if any (i, v) of these views (all of them unless given) is not done."""
        wanted = set(self.all_views if views is None else views)
        if over := wanted.difference(self.all_views):
            more = max(over) >= self.views
            way = f"--views {max(over) + 1}" if more else "the views that it was copied without"
            raise UserError(
                f"{self.storage} holds views {self.stored_views.start} to {self.views - 1}, but view {max(over)} was "
                f"asked for; repeat the command that made it with {way}"
            )
        total = -(-self.images // self.rows)
        lacking = sum(1 for shard in self.pending() if wanted & set(shard.views))
        if lacking:
            raise UserError(f"{self.storage} lacks {lacking} of {total} shards; repeat the command that made it")
        if gone := self._gone(wanted):
            raise UserError(
                f"{self.storage} lacks {len(gone)} of the files that its done records promise, the first is {gone[0]}; "
                "compress verify --repair marks the shards to be made again"
            )

    def _gone(self, views: set[int]) -> list[str]:
        """Files of done shards that are missing: Zarr says nothing and reads the fill value.

        A file that would hold nothing but fill value is never written; its done record's digest tells.
        """
        there = set(self.storage.list(GROUP))
        gone: dict[str, str] = {}
        for block, spans in self.done().items():
            for span in spans:
                if views & set(range(*span)):
                    missing = {key: name for key, name in self.shard_keys(block, span).items() if key not in there}
                    gone |= {key: name for key, name in missing.items() if not self._is_fill(name, block, span)}
        return list(gone)

    def _is_fill(self, name: str, block: int, views: tuple[int, int]) -> bool:
        """Whether a done record says that an array holds nothing but fill value there."""
        rows = self.span(block)[1] - self.span(block)[0]
        record = self.record(block, *views)
        grid = self.grids[name]
        fill = np.full((rows, *grid.shards[2:]), grid.fill, grid.dtype)
        if name in ("status", "content"):
            return record[name] == artifact.digest(fill.tobytes())
        scale = np.zeros(fill.shape[:-1], "<f4") if self.codecs[name].scaled else None
        return set(record["digest"][name]) == {view_digest(fill, scale)}

    def shard_keys(self, block: int, views: tuple[int, int]) -> dict[str, str]:
        """{file: its array, or that whose scales it holds} of what one done record speaks of."""
        keys = {self._chunk_key(name, (block,)): name for name in ("status", "content")}
        for name in self.arrays_of(views[0]):
            for part in [name, f"{name}_scale"] if self.codecs[name].scaled else [name]:
                keys[self._chunk_key(part, (block, view_column(views[0]) // VIEW_BLOCK))] = name
        return keys

    def _chunk_key(self, name: str, place: tuple[int, ...]) -> str:
        return f"{GROUP}/{name}/{self.grids[name].chunk_key(*place)}"

    def read_if_intact(self, key: str, place: str | None = None) -> bytes | None:
        """A small file, or what lies in another `place` as its second copy, if it is what the manifest knows."""
        try:
            data = self.storage.get(place or key)
        except FileNotFoundError:
            return None
        return data if artifact.digest(data) == self.about["small"][key] else None

    def small(self, key: str) -> bytes:
        """A small file: metadata, table, codebook, heads. Raises UserError if it is not what the manifest knows."""
        if (data := self.read_if_intact(key)) is None:
            raise UserError(f"{self.storage}/{key} is damaged; compress verify --repair mends it from its copy")
        return data

    def _codebook(self, name: str) -> bytes:
        """Raises UserError if there is none yet, or it is not the one that the manifest knows."""
        key = codebook_key(name)
        if key not in self.about["small"]:
            self.about = artifact.read(self.storage, "store")["about"]  # trained since this store was opened?
        if key not in self.about["small"]:
            raise UserError(f"{self.storage} has no {key} yet; repeat the command that made it")
        return self.small(key)


def array_codecs(identity: Mapping[str, Any], codebook: Callable[[str], bytes] | None = None) -> dict[str, Codec]:
    """{name of a feature array: its codec}; codebook fetches that of an array."""
    return {name: codec(identity["codec"], codebook and partial(codebook, name)) for name in identity["arrays"]}


def codebook_key(name: str) -> str:
    """Where the codebook of an array lies."""
    return f"codebook/{name}.safetensors"


def is_local(array: str) -> bool:
    """Whether an array holds local crops."""
    return array.startswith("local_")


def view_column(view: int) -> int:
    """The place of a view along the view axis of its arrays."""
    return view & ~LOCAL


def done_key(block: int, first: int, stop: int) -> str:
    return f"done/{block:07d}.{first:04d}-{stop:04d}.json"


def view_digest(stored: np.ndarray, scale: np.ndarray | None) -> str:
    """Digest of one view of a shard: the stored rows, then their scales, little-endian."""
    return artifact.digest(stored.tobytes() + (b"" if scale is None else scale.tobytes()))


def batch_spans(shard: Shard, size: int) -> Iterator[tuple[int, int]]:
    """Row spans of the forward batches of a shard: they never cross it."""
    for start in range(shard.start, shard.stop, size):
        yield start, min(start + size, shard.stop)
