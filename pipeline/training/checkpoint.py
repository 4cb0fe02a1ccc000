"""Save and restore everything a step depends on: by name, atomic, all or nothing."""

import io
import os
import platform
import re
import secrets
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.storage import PART, Folder

KEEP = 2  # step-*.pt kept, so that several students killed between two saves share a step
_STEP = re.compile(r"step-(\d+)\.pt$")


def save(folder: Path, step: int, parts: Mapping[str, Any]) -> None:
    """checkpoints/step-N.pt from {name: object with state_dict, or plain value}; last.pt is the same file.

    Of earlier ones KEEP - 1 stay; later ones, of a future that was not gone back to, are deleted.
    """
    data = to_bytes({"step": step, **parts})
    home = Folder(folder)
    name = f"step-{step:08d}.pt"
    home.put(name, data)
    link(folder / name, folder / "last.pt")
    kept = [there for there in steps(folder) if there <= step][-KEEP:]
    for other in set(steps(folder)) - set(kept):
        home.delete(f"step-{other:08d}.pt")


def link(source: Path, target: Path) -> None:
    """Make target the same file as source, atomically; a copy where links are not to be had."""
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.{os.getpid()}.{platform.node()}{PART}")
    try:
        os.link(source, part)
    except OSError:
        Folder(target.parent).put(target.name, source.read_bytes())
        return
    os.replace(part, target)


def to_bytes(parts: Mapping[str, Any]) -> bytes:
    """A checkpoint as bytes."""
    buffer = io.BytesIO()
    torch.save({k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in parts.items()}, buffer)
    return buffer.getvalue()


def steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint, ascending."""
    found = [_STEP.match(name) for name in (os.listdir(folder) if folder.is_dir() else [])]
    return sorted(int(match.group(1)) for match in found if match)


def load(path: Path) -> dict[str, Any]:
    """Raises UserError if the file is not there or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself reads over a flipped bit
            if broken := archive.testzip():
                raise zipfile.BadZipFile(f"bad checksum of {broken}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as problem:  # torch and pickle raise nearly anything on damaged files
        if isinstance(problem, OSError) and problem.errno:
            raise
        why = " ".join(str(problem).split())[:120]
        raise UserError(f"checkpoint {path} is damaged ({why}); delete it to go on from an earlier one") from None


def restore(path: Path, parts: Mapping[str, Any]) -> dict[str, Any]:
    """Load every part by name, strictly, and return the whole; plain values are for the caller to take.

    Raises UserError if a part is missing, left over or does not fit; nothing is trained from a half.
    """
    saved = load(path)
    if set(saved) - {"step"} != set(parts):
        odd = sorted((set(saved) - {"step"}) ^ set(parts))
        raise UserError(f"checkpoint {path} does not fit this run: it differs in {', '.join(odd)}")
    for name, part in parts.items():
        if hasattr(part, "load_state_dict"):
            try:
                part.load_state_dict(saved[name])
            except (RuntimeError, KeyError, ValueError, TypeError) as problem:
                why = " ".join(str(problem).split())[:200]
                raise UserError(f"checkpoint {path} does not fit this run: {name}: {why}") from None
    return saved
