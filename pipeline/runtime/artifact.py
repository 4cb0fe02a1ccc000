"""A folder that says what it is: claim it for a record, compare, fingerprint, damage found.

manifest.json = {"format", "kind", "identity", "about", "digest"}. `identity` decides whether a
command continues this folder or is refused; `about` may change (paths, extents that grow).
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.storage import Folder, Storage, is_url, open_storage

FORMAT = 1
MANIFEST = "manifest.json"
LEASE = "lease.json"  # of who is writing: see compress_ssl.pipeline.runtime.lease


class Mismatch(UserError):
    """A folder made with other settings; `differing` are their dotted names, where they were compared."""

    def __init__(self, message: str, differing: Sequence[str] = ()):
        super().__init__(message)
        self.differing = differing


class OtherFormat(UserError):
    """A manifest that another version of compress wrote."""


def canonical(record: Any) -> bytes:
    """JSON with one spelling: sorted keys, no spaces, no NaN."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def fingerprint(record: Any) -> str:
    """32 hexadecimal digits that stand for a record."""
    return hashlib.blake2b(canonical(record), digest_size=16).hexdigest()


def digest(data: Any) -> str:
    """BLAKE2b-128 of bytes or of an array's memory, in hexadecimal."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with `seal`, the fingerprint of all else in it: equal to itself if it is whole."""
    rest = {key: value for key, value in record.items() if key != "seal"}
    return {**rest, "seal": fingerprint(rest)}


def differences(there: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """["optimizer.lr is 0.01 there, 0.02 asked", ...]; nested records by dotted names."""
    return list(_unequal(there, asked).values())


def _unequal(there: Mapping[str, Any], asked: Mapping[str, Any], under: str = "") -> dict[str, str]:
    """{dotted name: what differs, in words}"""
    out: dict[str, str] = {}
    for key in sorted({*there, *asked}):
        old, new, name = _numbered(there.get(key)), _numbered(asked.get(key)), f"{under}{key}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            out |= _unequal(old, new, f"{name}.")
        elif canonical(old) != canonical(new):
            out[name] = f"{name} is {_short(old)} there, {_short(new)} asked"
    return out


def _numbered(value: Any) -> Any:
    """A list of records as a record, so that the one that differs is named."""
    if isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
        return {str(number): each for number, each in enumerate(value)}
    return value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def read(storage: Storage, kind: str | None = None) -> dict[str, Any]:
    """The manifest, its digest checked.

    Raises UserError if there is none, it is damaged, it is of another format or another kind.
    """
    try:
        raw = storage.get(MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        what = _a(kind) if kind else "anything compress made"
        there = not isinstance(storage, Folder) or storage.path.exists()
        why = f"it holds no {MANIFEST}" if there else "there is no such folder"
        raise UserError(f"{storage} is not {what}: {why}; check the path") from None
    manifest = parse(raw, f"{storage}/{MANIFEST}")
    if kind and manifest["kind"] != kind:
        raise UserError(f"{storage} holds {_a(manifest['kind'])}, not {_a(kind)}; name another folder")
    return manifest


def _a(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def parse(raw: bytes, where: str) -> dict[str, Any]:
    """A manifest from its bytes. Raises UserError if they are not what was written."""
    try:
        manifest = json.loads(raw)
        claimed = manifest.pop("digest")
        good = claimed == fingerprint(manifest)
    except (ValueError, KeyError, AttributeError, TypeError):
        good = False
    if not good:
        raise UserError(
            f"{where} is damaged, or not of our making: its content does not fit its digest; restore it from a copy "
            "(compress verify --repair does so for a store), or move the folder away and begin anew"
        )
    if manifest["format"] != FORMAT:
        raise OtherFormat(
            f"{where} has format {manifest['format']}, but this version of compress reads {FORMAT}; "
            "use the version that made it"
        )
    return manifest


def read_json(storage: Storage, key: str) -> Any:
    """A small JSON file of ours that has no digest. Raises UserError if it is damaged."""
    try:
        return json.loads(storage.get(key))
    except ValueError:
        raise UserError(f"{storage}/{key} is damaged; delete it and repeat the command that made it") from None


def to_bytes(manifest: Mapping[str, Any]) -> bytes:
    """A manifest as bytes, readable, with its digest."""
    return json.dumps({**manifest, "digest": fingerprint(manifest)}, indent=1, sort_keys=True).encode() + b"\n"


def write(storage: Storage, kind: str, identity: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """Write the manifest, whole or not at all, and return it."""
    manifest = {"format": FORMAT, "kind": kind, "identity": dict(identity), "about": dict(about)}
    manifest = json.loads(canonical(manifest))  # tuples become lists now, not at the next comparison
    storage.put(MANIFEST, to_bytes(manifest))
    return manifest


def claim(
    storage: Storage, kind: str, identity: Mapping[str, Any], about: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], bool]:
    """(manifest, new?): the first call writes it, later calls compare.

    Raises Mismatch with the list of what differs, UserError if the folder holds other things.
    """
    if manifest := claimed(storage, kind):
        asked = json.loads(canonical(identity))
        if changed := _unequal(manifest["identity"], asked):
            raise Mismatch(
                f"{storage} was made with other settings: {'; '.join(changed.values())}. "
                "Repeat them, name another folder, or start anew (with --overwrite, where the command has it)",
                differing=list(changed),
            )
        return manifest, False
    return write(storage, kind, identity, about or {}), True


def claimed(storage: Storage, kind: str) -> dict[str, Any] | None:
    """The manifest of a folder that a `kind` may be written to; None if nothing is there yet.

    Raises UserError if the folder holds other things.
    """
    if storage.exists(MANIFEST):
        return read(storage, kind)
    if isinstance(storage, Folder) and storage.path.exists() and not storage.path.is_dir():
        raise UserError(f"{storage} is a file, and a folder is needed for the {kind}; name another folder")
    if any(key != LEASE for key in storage.list()):
        raise UserError(f"{storage} is not empty and holds no {MANIFEST} of ours; name another folder")
    return None


def replaceable(where: str | Path, kind: str) -> bool:
    """Whether there is a `kind` of ours for --overwrite to set aside.

    Raises UserError for anything else that is there, and for what is in an object store, where nothing
    can be renamed: it is left as it is.
    """
    if is_url(where):
        if any(True for _ in open_storage(where).list()):
            raise UserError(
                f"--overwrite sets aside by renaming, which {where} cannot do; choose another --out, "
                "or delete what is there with your provider's tool"
            )
        return False
    folder = Path(where)
    if not folder.exists() or (folder.is_dir() and all(path.name == LEASE for path in folder.iterdir())):
        return False
    if not (folder / MANIFEST).exists():
        raise UserError(
            f"--overwrite touches only what compress made, and {folder} holds no {MANIFEST}; choose another --out"
        )
    read(Folder(folder), kind)  # never a store for a run: it may be the very one that is read
    if folder.resolve() in (here := Path.cwd(), *here.parents):
        raise UserError(f"--overwrite cannot set {folder} aside while you work in it; go to another folder")
    return True


def move_aside(where: str | Path, kind: str) -> Path | None:
    """For --overwrite: move a `kind` of ours to the first free NAME.old-N. None if there is nothing.

    Raises UserError for a folder that is not ours or cannot be moved: it is left as it is.
    """
    if not replaceable(where, kind):
        return None
    folder, number = Path(where), 1
    while (aside := sibling(folder, f".old-{number}")).exists():
        number += 1
    try:
        os.rename(folder, aside)
    except OSError as problem:
        raise UserError(
            f"{folder} cannot be moved to {aside} ({problem.strerror}); move it yourself, or choose another --out"
        ) from None
    return aside


def sibling(where: str | Path, ending: str) -> Path:
    """A neighbour of a folder, NAME + ending: `runs/a` -> `runs/a-evaluation`; `.` has a name too.

    What is in an object store has its neighbour here: `s3://bucket/a` -> `a-evaluation`.
    """
    folder = Path(os.fspath(where).rstrip("/").rpartition("/")[2]) if is_url(where) else Path(where)
    named = folder if folder.name not in ("", "..") else Path(os.path.abspath(folder))
    return named.parent / f"{named.name}{ending}"
