"""FeatureStore: features[i, v] on disk, by shards.

A shard is a run of consecutive rows and up to four views; it has one writer. Zarr encodes a shard
in memory, `Storage` puts it in place whole, and the done record follows: what a done record names
is there, what none names is pending. "The chunk is absent" says nothing: Zarr writes no chunk
that is all fill value. Names and layout: docs/store.md.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from pipeline import artifact, journal
from pipeline.artifact import UserError
from pipeline.codecs import Codec, codec
from pipeline.grid import GROUP, UNWRITTEN, VIEW_BLOCK, Grid, grids, layout, open_group, read_view, table_files
from pipeline.images import GOOD, REASONS
from pipeline.philox import LOCAL
from pipeline.storage import Folder, Storage

COPY = "copy"  # second copies of the manifest, of the Zarr metadata, of the tables and of codebooks
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


class FeatureStore:
    """Open a store. Raises UserError if there is none or its manifest is damaged."""

    def __init__(self, storage: Storage):
        self.storage = storage
        self.manifest = artifact.read(storage, "store")
        self.identity: dict[str, Any] = self.manifest["identity"]
        self.about: dict[str, Any] = self.manifest["about"]
        self.images: int = self.identity["data"]["images"]
        self.rows: int = self.identity["shard_rows"]
        self.arrays: dict[str, tuple[int, ...]] = {k: tuple(s) for k, s in self.identity["arrays"].items()}
        self.codecs: dict[str, Codec] = array_codecs(self.identity, self._codebook)
        self.grids: dict[str, Grid] = grids(self.identity, self.codecs)
        crops = self.identity.get("local", {}).get("views", 0)
        self.local: tuple[int, ...] = tuple(range(LOCAL, LOCAL + crops))  # numbers of the local crops

    @classmethod
    def make(
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
            cuts = grids(identity, array_codecs(identity))
            small = layout(cuts, identity["data"]["images"], _extents(identity, about["views"]))
            small |= table_files(tables) | dict(files or {})
            about = {**about, "small": {key: artifact.digest(data) for key, data in small.items()}}
            artifact.claim(storage, "store", identity, about)
            cls(storage)._put_small(small)
            return cls(storage)
        artifact.claim(storage, "store", identity)
        store = cls(storage)
        store._tidy()
        first = about.get("first_view", 0)
        if first > store.held.start:
            raise UserError(f"{storage} holds views from {store.held.start} on, not from {first}; a store only grows")
        if about["views"] < store.views:
            raise UserError(
                f"{storage} has {store.views} views, but --views {about['views']} was asked, and a store only grows; "
                f"ask for {store.views} or more, or choose another --out"
            )
        last = f"{COPY}/{artifact.MANIFEST}"
        if not storage.exists(last) or storage.get(last) != artifact.spell(store.manifest) or store._unlike():
            small = layout(store.grids, store.images, _extents(store.identity, store.views)) | table_files(tables)
            store._put_small(small | dict(files or {}) | store._codebooks())  # killed at it, or growing
        if about["views"] > store.views or first < store.held.start:
            store._grow(about["views"], first)
        return cls(storage)

    @property
    def views(self) -> int:
        """Global views; local crops are counted in `local`."""
        return self.about["views"]

    @property
    def held(self) -> range:
        """Views that are there to be used: all of them, but of a copy cut down perhaps only those from some view on."""
        return range(self.about.get("first_view", 0), self.views)

    @property
    def all_views(self) -> list[int]:
        """Numbers of all that is stored of an image."""
        return [*self.held, *self.local]

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

    # ------------------------------------------------------------------ what is there

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
                "compress verify --repair marks its shard to export again"
            )
        return record

    def pending(self, views: int | None = None) -> list[Shard]:
        """Row blocks with views that are not done, in order; as if there were to be `views` of them, if given."""
        done = self.done()
        wanted = {*range(self.held.start, views or self.views), *self.local}
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
                f"{self.storage} holds views {self.held.start} to {self.views - 1}, but view {max(over)} was asked "
                f"for; repeat the command that made it with {way}"
            )
        total = -(-self.images // self.rows)
        lacking = sum(1 for shard in self.pending() if wanted & set(shard.views))
        if lacking:
            raise UserError(
                f"{self.storage} lacks {lacking} of {total} shards; repeat the export-teacher command that made it"
            )
        if gone := self._gone(wanted):
            raise UserError(
                f"{self.storage} lacks {len(gone)} of the files that its done records promise, the first is {gone[0]}; "
                "compress verify --repair marks the shards to export again"
            )

    def _gone(self, views: set[int]) -> list[str]:
        """Files of done shards that are missing: Zarr says nothing and reads the fill value.

        A file that would hold nothing but fill value is never written; its done record's digest tells.
        """
        there = set(self.storage.list(GROUP))
        gone = []
        for block, spans in self.done().items():
            wanted = [(first, stop) for first, stop in spans if views & set(range(first, stop))]
            for name in ("status", "content") if wanted else ():
                if (key := self._chunk_key(name, (block,))) not in there and not self._is_fill(name, block, wanted[0]):
                    gone.append(key)
            for first, stop in wanted:
                for name in self.arrays_of(first):
                    names = [name, f"{name}_scale"] if self.codecs[name].scaled else [name]
                    keys = [self._chunk_key(part, (block, column(first) // VIEW_BLOCK)) for part in names]
                    missing = [key for key in keys if key not in there]
                    if missing and not self._is_fill(name, block, (first, stop)):
                        gone += missing
        return gone

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

    # ------------------------------------------------------------------ reading

    @cached_property
    def group(self) -> Any:
        """The Zarr group. Raises UserError if its metadata is not what was written: Zarr believes what it can read."""
        if unlike := self._unlike():
            raise UserError(f"{self.storage}/{unlike[0]} is gone or damaged; see compress verify --repair")
        return open_group(self.storage)

    def _unlike(self) -> list[str]:
        """Keys of Zarr metadata that is not what the manifest says."""
        out = []
        for key in (key for key in self.about["small"] if key.endswith("/zarr.json")):
            there = self.storage.get(key) if self.storage.exists(key) else b""
            if artifact.digest(there) != self.about["small"][key]:
                out.append(key)
        return out

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
            stored = self._whole(name, lambda: read_view(place, self.grids[name], column(view), start, stop))
        else:
            stored = self._read(name, (rows, column(view)))
        return stored, self._read(f"{name}_scale", (rows, column(view))) if self.codecs[name].scaled else None

    def read(self, name: str, view: int, rows: slice = slice(None)) -> np.ndarray:
        """(n, ...) float32 features of one view."""
        stored, scale = self.stored(name, view, rows)
        return self.codecs[name].decode(stored, scale)

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
                "compress verify --repair marks the shards to export again"
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
        held = self.done().get(shard.block, [])
        stale: set[int] = set()
        if held:
            status, bad, stale = self._as_before(shard, held, status, content, bad)
        records = []
        for first in sorted({v - v % VIEW_BLOCK for v in shard.views} | stale):
            views, place = self._block_of(first), (shard.block, column(first) // VIEW_BLOCK)
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

    def _as_before(
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

    def shard_keys(self, block: int, views: tuple[int, int]) -> list[str]:
        """The files that a done record of a row block and a span of views speaks of."""
        arrays = self.arrays_of(views[0])
        names = [part for n in arrays for part in ([n, f"{n}_scale"] if self.codecs[n].scaled else [n])]
        features = [self._chunk_key(name, (block, column(views[0]) // VIEW_BLOCK)) for name in names]
        return [self._chunk_key("status", (block,)), self._chunk_key("content", (block,)), *features]

    def _chunk_key(self, name: str, place: tuple[int, ...]) -> str:
        return f"{GROUP}/{name}/{self.grids[name].place(*place)}"

    def _grow(self, views: int, first: int) -> None:
        """More views: new metadata, then the manifest that knows them."""
        small = layout(self.grids, self.images, _extents(self.identity, views))
        for key, data in small.items():
            self.storage.put(key, data)
        about = {**self.about, "views": views, "first_view": first}
        if not first:
            del about["first_view"]
        self._amend(about, small)

    def _amend(self, about: Mapping[str, Any], small: Mapping[str, bytes]) -> None:
        """A manifest that knows more small files, then their second copies."""
        digests = {**about["small"], **{key: artifact.digest(data) for key, data in small.items()}}
        self.manifest = artifact.write(self.storage, "store", self.identity, {**about, "small": digests})
        self.about = self.manifest["about"]
        self._put_small(small)

    # ------------------------------------------------------------------ codebooks

    def untrained(self) -> list[str]:
        """Arrays whose codec has no codebook yet: nothing of them can be written or read."""
        return [name for name, kind in self.codecs.items() if kind.trained and _book(name) not in self.about["small"]]

    def train(self, name: str, features: np.ndarray) -> None:
        """Train the codec of an array on float32 features (..., D). The first codebook that is put stays for good."""
        key = _book(name)
        if not self.storage.exists(key):
            self.storage.put_new(key, self.codecs[name].train(features))
        self._amend(artifact.read(self.storage, "store")["about"], {key: self.storage.get(key)})

    def _codebook(self, name: str) -> bytes:
        """Raises UserError if there is none yet, or it is not the one that the manifest knows."""
        key = _book(name)
        if key not in self.about["small"]:
            self.about = artifact.read(self.storage, "store")["about"]  # trained since this store was opened?
        if key not in self.about["small"]:
            raise UserError(f"{self.storage} has no {key} yet; repeat the export-teacher command that made it")
        try:
            data = self.storage.get(key)
        except FileNotFoundError:
            data = b""
        if artifact.digest(data) != self.about["small"][key]:
            raise UserError(f"{self.storage}/{key} is damaged; compress verify --repair mends it from its copy")
        return data

    def _codebooks(self) -> dict[str, bytes]:
        """{key: bytes} of the codebooks that the manifest knows."""
        return {_book(name): self._codebook(name) for name in self.codecs if _book(name) in self.about["small"]}

    def _tidy(self) -> None:
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
        for key, data in small.items():
            self.storage.put(f"{COPY}/{key}", data)
        self.storage.put(f"{COPY}/{artifact.MANIFEST}", artifact.spell(self.manifest))

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
        return journal.parse(self.storage.get(key).decode()) if self.storage.exists(key) else []

    def remember(self, event: Mapping[str, Any]) -> None:
        """Add a line to history.jsonl: who made it when, at what cost. Outside every digest."""
        key = "history.jsonl"
        old = self.storage.get(key) if self.storage.exists(key) else b""
        self.storage.put(key, old + artifact.canonical(event) + b"\n")


def array_codecs(identity: Mapping[str, Any], codebook: Callable[[str], bytes] | None = None) -> dict[str, Codec]:
    """{name of a feature array: its codec}; codebook fetches that of an array."""
    return {name: codec(identity["codec"], codebook and partial(codebook, name)) for name in identity["arrays"]}


def _book(name: str) -> str:
    return f"codebook/{name}.safetensors"


def is_local(array: str) -> bool:
    """Whether an array holds local crops."""
    return array.startswith("local_")


def column(view: int) -> int:
    """The place of a view along the view axis of its arrays."""
    return view & ~LOCAL


def _extents(identity: Mapping[str, Any], views: int) -> dict[str, int]:
    """{array: views along its axis}"""
    local = identity.get("local", {}).get("views", 0)
    return {name: local if is_local(name) else views for name in identity["arrays"]}


def done_key(block: int, first: int, stop: int) -> str:
    return f"done/{block:07d}.{first:04d}-{stop:04d}.json"


def _along(rows: np.ndarray, data: np.ndarray) -> np.ndarray:
    """(n,) as (n, 1, ...), to go with data (n, ...)."""
    return rows.reshape(-1, *[1] * (data.ndim - 1))


def view_digest(stored: np.ndarray, scale: np.ndarray | None) -> str:
    """Digest of one view of a shard: the stored rows, then their scales, little-endian."""
    return artifact.digest(stored.tobytes() + (b"" if scale is None else scale.tobytes()))


def _one_line(problem: BaseException) -> str:
    return " ".join(str(problem).split())[:160]


def batches(shard: Shard, size: int) -> Iterator[tuple[int, int]]:
    """Row spans of the forward batches of a shard: they never cross it."""
    for start in range(shard.start, shard.stop, size):
        yield start, min(start + size, shard.stop)
