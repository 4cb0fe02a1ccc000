"""Artifacts: folders described by a manifest.json, how they are claimed, compared and moved aside.

manifest.json = {"format", "kind", "identity", "about", "digest"}. A command continues a folder whose `kind` and
`identity` equal its own and refuses any other; `about` may change (paths, extents that grow). `digest` is the
fingerprint of the other four entries and reveals damage.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from compress_ssl.pipeline.runtime.digests import canonical, fingerprint
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.formatting import shorten
from compress_ssl.pipeline.runtime.records import JsonObject, Meta, read_record, require_shallow, to_json
from compress_ssl.pipeline.runtime.storage import Folder, Storage, is_url, open_storage

FORMAT = 1  # version of the layout of manifest.json
MANIFEST = "manifest.json"
LEASE = "lease.json"  # names the process that is writing, see compress_ssl.pipeline.runtime.lease


@dataclass(frozen=True)
class Manifest:
    """The contents of a manifest.json. The records of a kind are read from `identity` and `about`."""

    format: int
    kind: Annotated[str, Meta(pattern=r"^[a-z][a-z ]*\Z")]
    identity: JsonObject
    about: JsonObject


class Mismatch(UserError):
    """The folder was made with other settings.

    `differing` holds their dotted names; it is empty if the settings were not compared one by one.
    """

    def __init__(self, message: str, differing: Sequence[str] = ()):
        super().__init__(message)
        self.differing = differing


class OtherFormat(UserError):
    """The manifest was written by a version of compress that uses another format."""


def differences(there: Mapping[str, object], asked: Mapping[str, object]) -> list[str]:
    """The entries that differ, as ["optimizer.lr is 0.01 there, 0.02 asked", ...]; nested keys are joined by dots."""
    return list(_unequal(there, asked).values())


def _unequal(there: Mapping[str, object], asked: Mapping[str, object], under: str = "") -> dict[str, str]:
    """{dotted name: "NAME is OLD there, NEW asked"} of the entries that differ; a missing entry counts as null."""
    out: dict[str, str] = {}
    for key in sorted({*there, *asked}):
        name = f"{under}{key}"
        old, new = _numbered(there.get(key)), _numbered(asked.get(key))
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            out |= _unequal(old, new, f"{name}.")
        elif canonical(_by_value(old)) != canonical(_by_value(new)):
            out[name] = f"{name} is {_json(old)} there, {_json(new)} asked"
    return out


def _numbered(value: object) -> object:
    """A list of records as {"0": record, ...}, so that only the records that differ are reported."""
    if isinstance(value, list) and value and all(isinstance(record, Mapping) for record in value):
        return {str(number): record for number, record in enumerate(value)}
    return value


def _by_value(value: object) -> object:
    """A setting in which equal numbers are written alike: a flag given as 5.0 is the recorded 5."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return [_by_value(member) for member in value] if isinstance(value, list | tuple) else value


def _json(value: object) -> str:
    """JSON of at most 80 characters, so that an error stays readable."""
    return shorten(json.dumps(value), 80)


def read(storage: Storage, kind: str | None = None) -> Manifest:
    """Read the manifest and check its digest.

    Raises UserError if there is no manifest, if it is damaged, or if its format or its kind is another one.
    """
    try:
        raw = storage.get(MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        expected = f"is not {_with_article(kind)}" if kind else "was not made by compress"
        raise UserError(f"{storage} {expected}: {_describe_absence(storage)}") from None
    manifest = parse(raw, f"{storage}/{MANIFEST}")
    if kind and manifest.kind != kind:
        raise UserError(
            f"{storage} holds {_with_article(manifest.kind)}, not {_with_article(kind)}; name another folder"
        )
    return manifest


def _describe_absence(storage: Storage) -> str:
    """Why there is no manifest, and what to do; a folder that holds artifacts of its own names them."""
    if not isinstance(storage, Folder):
        return f"it holds no {MANIFEST}; check the path"
    if not storage.path.exists():
        return "there is no such folder; check the path"
    inside = sorted(str(manifest.parent) for manifest in storage.path.glob(f"*/{MANIFEST}"))
    if inside:
        return f"it holds {len(inside)} folders that compress made; name one of them: {', '.join(inside[:3])}"
    return f"it holds no {MANIFEST}; check the path"


def _with_article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def parse(raw: bytes, where: str) -> Manifest:
    """Parse a manifest's bytes; `where` names them in an error.

    Raises UserError if the digest does not match, OtherFormat if another version of compress wrote it.
    """
    try:
        entries = json.loads(raw)
        claimed = entries.pop("digest")
        good = claimed == fingerprint(entries)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        good = False
    if not good:
        raise UserError(
            f"{where} is damaged, or was not made by compress: its content does not match its digest; "
            "restore it from a copy (compress verify --repair does so for a store), "
            "or move the folder away and start again"
        )
    if entries.get("format") != FORMAT:
        raise OtherFormat(
            f"{where} has format {_json(entries.get('format'))}, but this version of compress reads {FORMAT}; "
            "use the version that made it"
        )
    require_shallow(entries, where)
    return read_record(Manifest, entries, where)


def to_bytes(manifest: Manifest) -> bytes:
    """A manifest with its digest, as indented JSON."""
    entries = to_json(manifest)
    return json.dumps({**entries, "digest": fingerprint(entries)}, indent=1, sort_keys=True).encode() + b"\n"


def write(storage: Storage, kind: str, identity: Mapping[str, object], about: Mapping[str, object]) -> Manifest:
    """Write the manifest atomically and return it."""
    # Through JSON, so that tuples are lists here too, as after reading.
    manifest = Manifest(FORMAT, kind, json.loads(canonical(identity)), json.loads(canonical(about)))
    storage.put(MANIFEST, to_bytes(manifest))
    return manifest


def claim(
    storage: Storage, kind: str, identity: Mapping[str, object], about: Mapping[str, object] | None = None,
    flags: Mapping[str, str] | None = None,
) -> tuple[Manifest, bool]:  # fmt: skip
    """Make a folder an artifact of a kind and identity -> (its manifest, whether it was written just now).

    If the folder has a manifest already, its identity is compared with `identity`: raises Mismatch with the settings
    that differ. flags: {dotted name of a setting: the flag that it comes from}, for this list. Raises UserError if
    the folder holds anything else.
    """
    manifest = claimed(storage, kind)
    if manifest is None:
        return write(storage, kind, identity, about or {}), True
    known = flags or {}
    require_equal(storage, manifest.identity, json.loads(canonical(identity)), lambda name: known.get(name, ""))
    return manifest, False


def require_equal(
    storage: Storage,
    there: Mapping[str, object],
    asked: Mapping[str, object],
    name_flag: Callable[[str], str] = lambda name: "",
) -> None:
    """Raise Mismatch, which lists the settings that differ, unless the identity `there` equals the one `asked` for.

    name_flag: the flag that a setting (by its dotted name) comes from, for the list; "" if it comes from none.
    """
    changed = _unequal(there, asked)
    if not changed:
        return
    named = [f"{words} ({flag})" if (flag := name_flag(name)) else words for name, words in changed.items()]
    raise Mismatch(
        f"{storage} was made with other settings: {'; '.join(named)}. "
        "Repeat them, name another folder, or start anew (with --overwrite, where the command has it)",
        differing=list(changed),
    )


def claimed(storage: Storage, kind: str) -> Manifest | None:
    """The manifest of a folder for an artifact of this kind; None if the folder is empty or missing.

    Raises UserError if the folder holds another kind, or files without a manifest.
    """
    if storage.exists(MANIFEST):
        return read(storage, kind)
    if isinstance(storage, Folder) and storage.path.exists() and not storage.path.is_dir():
        raise UserError(f"{storage} is a file, and a folder is needed for the {kind}; name another folder")
    if any(key != LEASE for key in storage.list()):
        raise UserError(f"{storage} is not empty and holds no {MANIFEST} of ours; name another folder")
    return None


def replaceable(where: str | Path, kind: str) -> bool:
    """Whether a location holds an artifact of this kind that --overwrite can move aside; False if it is empty.

    Raises UserError if it holds anything else, or if it is in an object store and not empty: objects cannot be
    renamed. Nothing is changed.
    """
    if is_url(where):
        if next(open_storage(where).list(), None) is not None:
            raise UserError(
                f"--overwrite moves a folder aside by renaming, which is not possible in {where}; "
                "choose another --out, or delete what is there with your provider's tool"
            )
        return False
    folder = Path(where)
    if not folder.exists() or (folder.is_dir() and all(path.name == LEASE for path in folder.iterdir())):
        return False
    if not (folder / MANIFEST).exists():
        raise UserError(
            f"--overwrite touches only what compress made, and {folder} holds no {MANIFEST}; choose another --out"
        )
    read(Folder(folder), kind)  # a store is not overwritten by a run, which may be reading it
    here = Path.cwd()
    if folder.resolve() in (here, *here.parents):
        raise UserError(f"--overwrite cannot set {folder} aside while you work in it; go to another folder")
    return True


def move_aside(where: str | Path, kind: str) -> Path | None:
    """For --overwrite: rename an artifact of this kind to the first free NAME.old-N and return that path.

    Returns None if there is nothing to move. Raises UserError for a folder of another kind, or one that cannot be
    renamed; the folder then stays unchanged.
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
    """The path next to a folder with an ending added to its name: `runs/a` -> `runs/a-evaluation`.

    `.` and `..` are replaced by the folder's real name. For a URL the path is in the working directory:
    `s3://bucket/a` -> `a-evaluation`.
    """
    folder = Path(os.fspath(where).rstrip("/").rpartition("/")[2]) if is_url(where) else Path(where)
    named = folder if folder.name not in ("", "..") else Path(os.path.abspath(folder))
    return named.parent / f"{named.name}{ending}"
