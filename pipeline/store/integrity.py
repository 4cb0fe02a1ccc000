"""Check a store against its digests, and repair what can be repaired.

Small files (manifest, Zarr metadata, tables, codebooks, heads) are restored from their second copies. The repair of a
damaged shard deletes its done record, so that the command that made the store writes the shard again.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from compress_ssl.pipeline.runtime import artifact, digests
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.records import InvalidRecord
from compress_ssl.pipeline.runtime.storage import Storage
from compress_ssl.pipeline.store.feature_store import COPY, FeatureStore
from compress_ssl.pipeline.store.records import store_record
from compress_ssl.pipeline.store.shards import Span, done_key, view_digest
from compress_ssl.pipeline.views.groups import view_name

# keys of the manifest and of its second copy
MANIFESTS = (artifact.MANIFEST, f"{COPY}/{artifact.MANIFEST}")


@dataclass(frozen=True)
class Damage:
    """One damaged file: its key, what is wrong, and the function that repairs it."""

    key: str
    what: str
    repair: Callable[[], None]


def read_manifest(storage: Storage) -> artifact.Manifest:
    """The manifest of a store, or its second copy. Raises UserError if neither is intact."""
    return _intact_manifest(storage, {key: _get_or_none(storage, key) for key in MANIFESTS})


def _intact_manifest(storage: Storage, raw: Mapping[str, bytes | None]) -> artifact.Manifest:
    """The first intact manifest of raw, {key: bytes, None for no file}."""
    for key, data in raw.items():
        manifest = None if data is None else _parse_manifest(data, key)
        if manifest is not None and manifest.kind == "store":
            return manifest
    if None not in raw.values():
        raise UserError(f"{storage}: the manifest and its copy are both damaged; the store cannot be mended")
    return artifact.read(storage, "store")  # raises the error of a missing or damaged manifest


def check_small_files(storage: Storage) -> list[Damage]:
    """Damage to the small files and to their second copies. Raises UserError if no manifest is intact."""
    raw = {key: _get_or_none(storage, key) for key in MANIFESTS}
    manifest = _intact_manifest(storage, raw)
    expected = artifact.to_bytes(manifest)  # compared as bytes: \u00e9 and \u00E9 parse to the same text
    damages = [_restorable(storage, key, expected) for key in MANIFESTS if raw[key] != expected]
    for name, digest in store_record(manifest, f"{storage}/{artifact.MANIFEST}").about.small.items():
        found = {key: _get_or_none(storage, key) for key in (name, f"{COPY}/{name}")}
        intact = {key: data for key, data in found.items() if data is not None and digests.digest(data) == digest}
        source = next(iter(intact.values()), None)
        damages += [_restorable(storage, key, source) for key in found if key not in intact]
    return damages


def _parse_manifest(data: bytes, key: str) -> artifact.Manifest | None:
    """A manifest, None if it is damaged. Raises UserError for a whole one that is not valid or of another version."""
    try:
        return artifact.parse(data, key)
    except (artifact.OtherFormat, InvalidRecord):
        raise
    except UserError:
        return None


def _get_or_none(storage: Storage, key: str) -> bytes | None:
    try:
        return storage.get(key)
    except FileNotFoundError:
        return None


def _restorable(storage: Storage, key: str, source: bytes | None) -> Damage:
    """The damage of a small file that is restored from the bytes `source`; None: no intact copy exists."""

    def restore() -> None:
        if source is None:
            raise UserError(f"{storage}/{key} and its second copy are both damaged; they cannot be mended")
        storage.put(key, source)

    return Damage(key, "does not fit its digest" if source is not None else "damaged, and so is its copy", restore)


def check_shards(store: FeatureStore, progress: Callable[[int], None] = lambda n: None) -> Iterator[Damage]:
    """Yield the damage of shards and done records. Every stored byte that a reader can use is read.

    progress: called with 1 after each row block. Raises UserError for a manifest that does not fit the arrays: then it
    is wrong itself, and no shard is marked.
    """
    _ = store.group  # opening it compares the manifest with the metadata of the arrays
    for block, spans in sorted(store.done().items()):
        for span in sorted(spans):
            key = done_key(block, *span)
            fault = find_fault(store, block, span)
            if fault:
                yield Damage(key, fault, partial(store.storage.delete, key))
        progress(1)


def find_fault(store: FeatureStore, block: int, span: Span) -> str:
    """Description of the first fault of a shard, (row block, span of views); "" if it fits its done record."""
    start, stop = store.span(block)
    rows = slice(start, stop)
    try:
        record = store.record(block, *span)
        for name, digest in (("status", record.status), ("content", record.content)):
            if digests.digest(np.ascontiguousarray(store.table(name, rows)).tobytes()) != digest:
                return f"{name} differs from the done record"
        for name in store.arrays_of(span[0]):
            for j, view in enumerate(range(*span)):
                if view_digest(*store.stored(name, view, rows)) != record.digest[name][j]:
                    return f"{name} of {view_name(view)} differs from the done record"
    except UserError as damage:
        return str(damage)
    except FileNotFoundError:
        return "the done record is gone"
    return ""
