"""Is a store what its records say? Every digest checked, damage named, and what can be mended mended.

Small files (manifest, Zarr metadata, tables) are mended from their second copies. A damaged shard
loses its done record, so that the command that made the store makes it again.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.storage import Storage
from compress_ssl.pipeline.store.feature_store import COPY, FeatureStore
from compress_ssl.pipeline.store.shards import done_key, view_digest
from compress_ssl.pipeline.views.numbering import view_name

MANIFESTS = (artifact.MANIFEST, f"{COPY}/{artifact.MANIFEST}")


@dataclass(frozen=True)
class Damage:
    """One thing that is not what it should be, and how it is mended."""

    key: str
    what: str
    repair: Callable[[], None]


def read_manifest(storage: Storage) -> dict[str, Any]:
    """The manifest of a store, from its copy if need be. Raises UserError if there is none that is whole."""
    return _whole(storage, {place: _get(storage, place) for place in MANIFESTS})


def _whole(storage: Storage, raw: Mapping[str, bytes | None]) -> dict[str, Any]:
    for place, data in raw.items():
        if data is not None and (found := _manifest(data, place)) is not None and found["kind"] == "store":
            return found
    if None not in raw.values():
        raise UserError(f"{storage}: the manifest and its copy are both damaged; the store cannot be mended")
    return artifact.read(storage, "store")


def check_small_files(storage: Storage) -> list[Damage]:
    """Damage to the manifest, the Zarr metadata and the tables, and to their second copies."""
    raw = {place: _get(storage, place) for place in MANIFESTS}
    good = _whole(storage, raw)
    spelt = artifact.to_bytes(good)  # to the byte: \u00e9 and \u00E9 read the same
    out = [_mend(storage, place, spelt) for place in MANIFESTS if raw[place] != spelt]
    for key, claimed in good["about"]["small"].items():
        places = (key, f"{COPY}/{key}")
        found = {place: _get(storage, place) for place in places}
        whole = next((data for data in found.values() if data is not None and artifact.digest(data) == claimed), None)
        for place in places:
            if found[place] is None or artifact.digest(found[place]) != claimed:
                out.append(_mend(storage, place, whole))
    return out


def _manifest(data: bytes, place: str) -> dict[str, Any] | None:
    try:
        return artifact.parse(data, place)
    except artifact.OtherFormat:
        raise
    except UserError:
        return None


def _get(storage: Storage, key: str) -> bytes | None:
    try:
        return storage.get(key)
    except FileNotFoundError:
        return None


def _mend(storage: Storage, place: str, whole: bytes | None) -> Damage:
    def mend() -> None:
        if whole is None:
            raise UserError(f"{storage}/{place} and its second copy are both damaged; they cannot be mended")
        storage.put(place, whole)

    return Damage(place, "does not fit its digest" if whole is not None else "damaged, and so is its copy", mend)


def check_shards(store: FeatureStore, progress: Callable[[int], None] = lambda n: None) -> Iterator[Damage]:
    """Damage to shards and done records. Every stored byte that a reader could meet is read."""
    for block, spans in sorted(store.done().items()):
        for span in sorted(spans):
            key = done_key(block, *span)
            why = find_fault(store, block, span)
            if why:
                yield Damage(key, why, lambda key=key: store.storage.delete(key))  # type: ignore[misc]
        progress(1)


def find_fault(store: FeatureStore, block: int, span: tuple[int, int]) -> str:
    """What is wrong with one (row block, span of views), or nothing."""
    start, stop = store.span(block)
    rows = slice(start, stop)
    try:
        record = store.record(block, *span)
        for name in ("status", "content"):
            if artifact.digest(np.ascontiguousarray(store.table(name, rows)).tobytes()) != record[name]:
                return f"{name} differs from the done record"
        for name in store.arrays_of(span[0]):
            for j, view in enumerate(range(*span)):
                if view_digest(*store.stored(name, view, rows)) != record["digest"][name][j]:
                    return f"{name} of {view_name(view)} differs from the done record"
    except UserError as damage:
        return str(damage)
    except FileNotFoundError:
        return "the done record is gone"
    return ""
