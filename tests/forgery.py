"""Forged records: a manifest with a right digest whose entries are changed, and changes of any nested value."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compress_ssl.pipeline.runtime import digests

Place = tuple[Any, ...]
"""The keys and numbers that lead to an entry of a nested value."""

MISSING = object()


def read_entries(folder: Path) -> dict[str, Any]:
    """The entries of a manifest, without its digest."""
    entries: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
    del entries["digest"]
    return entries


def write_entries(folder: Path, entries: Any) -> None:
    """Write a manifest with a right digest, and its second copy if the folder has one."""
    data = json.dumps({**entries, "digest": digests.fingerprint(entries)}, indent=1, sort_keys=True) + "\n"
    for place in (folder, folder / "copy"):
        if place.is_dir():
            (place / "manifest.json").write_text(data)


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    """The places of all entries, dictionaries and lists included."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in pairs:
        yield (*place, key)
        yield from places(entry, (*place, key))


def changed(value: Any, place: Place, by: Any) -> Any:
    """A copy with another entry in one place; with MISSING, without it."""
    value = copy.deepcopy(value)
    inside = value
    for key in place[:-1]:
        inside = inside[key]
    if by is MISSING:
        del inside[place[-1]]
    else:
        inside[place[-1]] = by
    return value
