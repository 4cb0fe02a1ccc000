"""A folder that says what it is: claim it for a record, compare, fingerprint, damage found.

manifest.json = {"format", "kind", "identity", "about", "digest"}. `identity` decides whether a
command continues this folder or is refused; `about` may change (paths, extents that grow).
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.storage import Folder, Storage

FORMAT = 1
MANIFEST = "manifest.json"


class UserError(Exception):
    """Something the user can mend. The text says what is, what was asked, what to do."""


class Mismatch(UserError):
    """A folder made with other settings."""


def canonical(record: Any) -> bytes:
    """JSON with one spelling: sorted keys, no spaces, no NaN."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def fingerprint(record: Any) -> str:
    """32 hexadecimal digits that stand for a record."""
    return hashlib.blake2b(canonical(record), digest_size=16).hexdigest()


def digest(data: Any) -> str:
    """BLAKE2b-128 of bytes or of an array's memory, in hexadecimal."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def differences(there: Mapping[str, Any], asked: Mapping[str, Any], under: str = "") -> list[str]:
    """["optimizer.lr is 0.01 there, 0.02 asked", ...]; nested records by dotted names."""
    out: list[str] = []
    for key in sorted({*there, *asked}):
        old, new = there.get(key), asked.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            out += differences(old, new, f"{under}{key}.")
        elif canonical(old) != canonical(new):
            out.append(f"{under}{key} is {_short(old)} there, {_short(new)} asked")
    return out


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
        what = f"a {kind}" if kind else "anything compress made"
        raise UserError(f"{storage} is not {what}: it holds no {MANIFEST}") from None
    manifest = parse(raw, f"{storage}/{MANIFEST}")
    if kind and manifest["kind"] != kind:
        raise UserError(f"{storage} is a {manifest['kind']}, but a {kind} was asked for")
    return manifest


def parse(raw: bytes, where: str) -> dict[str, Any]:
    """A manifest from its bytes. Raises UserError if they are not what was written."""
    try:
        manifest = json.loads(raw)
        claimed = manifest.pop("digest")
        good = claimed == fingerprint(manifest)
    except (ValueError, KeyError, AttributeError, TypeError):
        good = False
    if not good:
        raise UserError(f"{where} is damaged: its content does not fit its digest; restore it from a copy")
    if manifest["format"] != FORMAT:
        raise UserError(f"{where} has format {manifest['format']}; this version of compress reads {FORMAT}")
    return manifest


def spell(manifest: Mapping[str, Any]) -> bytes:
    """A manifest as bytes, readable, with its digest."""
    return json.dumps({**manifest, "digest": fingerprint(manifest)}, indent=1, sort_keys=True).encode() + b"\n"


def write(storage: Storage, kind: str, identity: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """Write the manifest, whole or not at all, and return it."""
    manifest = {"format": FORMAT, "kind": kind, "identity": dict(identity), "about": dict(about)}
    manifest = json.loads(canonical(manifest))  # tuples become lists now, not at the next comparison
    storage.put(MANIFEST, spell(manifest))
    return manifest


def claim(
    storage: Storage, kind: str, identity: Mapping[str, Any], about: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], bool]:
    """(manifest, new?): the first call writes it, later calls compare.

    Raises Mismatch with the list of what differs, UserError if the folder holds other things.
    """
    if storage.exists(MANIFEST):
        manifest = read(storage, kind)
        asked = json.loads(canonical(identity))
        if changed := differences(manifest["identity"], asked):
            raise Mismatch(
                f"{storage} was made with other settings: {'; '.join(changed)}. "
                "Repeat them, choose another --out, or start anew with --overwrite"
            )
        return manifest, False
    if any(True for _ in storage.list()):
        raise UserError(f"{storage} is not empty and holds no {MANIFEST} of ours; choose another --out")
    return write(storage, kind, identity, about or {}), True


def set_aside(folder: Path) -> Path | None:
    """For --overwrite: move a folder of ours to the first free NAME.old-N. None if there is nothing.

    Raises UserError for a folder that is not ours: it is left as it is.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / MANIFEST).exists():
        raise UserError(
            f"--overwrite touches only what compress made, and {folder} holds no {MANIFEST}; choose another --out"
        )
    read(Folder(folder))
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    os.rename(folder, aside)
    return aside
