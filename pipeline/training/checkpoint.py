"""Save and restore everything that a training step depends on.

A checkpoint is written atomically, and its parts are restored by name: all of them or none.
"""

import io
import os
import platform
import re
import secrets
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

import torch

from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.storage import PART, Folder, replace_file
from compress_ssl.pipeline.training.restore_state import load_optimizer_state, load_scaler_state

KEEP = 2  # files step-*.pt to keep: if peers are killed between their saves, the step before is one that all have
STEP_FILE = re.compile(r"step-(\d+)\.pt$")
"""Name of a checkpoint's file; the number is that of steps taken."""


State: TypeAlias = "dict[str, object]"


@runtime_checkable
class Stateful(Protocol):
    """What has a state to save: a module, an optimizer, a scaler."""

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State, /) -> object: ...


def save(folder: Path, step: int, parts: Mapping[str, object]) -> None:
    """Write step-N.pt into the folder, and make last.pt the same file.

    parts: name -> an object with `state_dict`, or a plain value. KEEP - 1 checkpoints of earlier steps are kept.
    Those of later steps are deleted: they belong to a continuation that this run did not take.
    """
    data = to_bytes({"step": step, **parts})
    target = Folder(folder)
    name = f"step-{step:08d}.pt"
    target.put(name, data)
    link(folder / name, folder / "last.pt")
    kept = [earlier for earlier in list_steps(folder) if earlier <= step][-KEEP:]
    for other in set(list_steps(folder)) - set(kept):
        target.delete(f"step-{other:08d}.pt")


def link(source: Path, target: Path) -> None:
    """Make target a hard link to source, atomically. On file systems without hard links, target becomes a copy."""
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.{os.getpid()}.{platform.node()}{PART}")
    try:
        os.link(source, part)
    except OSError:
        Folder(target.parent).put(target.name, source.read_bytes())
        return
    replace_file(part, target)


def to_bytes(parts: Mapping[str, object]) -> bytes:
    """A checkpoint's file: name -> `state_dict` of the part, or the plain value."""
    buffer = io.BytesIO()
    torch.save({k: v.state_dict() if isinstance(v, Stateful) else v for k, v in parts.items()}, buffer)
    return buffer.getvalue()


def list_steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint in a folder, ascending; empty if the folder does not exist."""
    names = os.listdir(folder) if folder.is_dir() else []
    found = [STEP_FILE.match(name) for name in names]
    return sorted(int(match.group(1)) for match in found if match)


def load(path: Path) -> State:
    """Read a checkpoint into memory. Raises UserError if the file is missing or damaged.

    Only tensors and plain values are unpickled (`weights_only`): a checkpoint cannot run code.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not verify checksums
            broken = archive.testzip()
            if broken:
                raise zipfile.BadZipFile(f"bad checksum of {broken}")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(saved, dict) or not isinstance(saved.get("step"), int):
            raise ValueError("it holds no step")
        return saved
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as problem:  # torch and pickle raise many types on damaged files
        if isinstance(problem, OSError) and problem.errno:  # the disk failed, which says nothing about the file
            raise
        why = " ".join(str(problem).split())[:120]
        raise UserError(f"checkpoint {path} is damaged ({why}); delete it to continue from an earlier one") from None


def _load_state(part: Stateful, state: State) -> None:
    """Load a state into a part. Raises one of several types if the state does not fit it."""
    if isinstance(part, torch.optim.Optimizer):
        load_optimizer_state(part, state)
    elif isinstance(part, torch.amp.GradScaler):
        load_scaler_state(part, state)
    else:
        part.load_state_dict(state)


def restore(path: Path, parts: Mapping[str, object]) -> State:
    """Load every part that has `load_state_dict`, strictly, and return the whole checkpoint.

    The caller takes plain values from what is returned. Raises UserError if a part is missing, superfluous or
    does not fit: a partly restored run must not train.
    """
    saved = load(path)
    if set(saved) - {"step"} != set(parts):
        differing = sorted((set(saved) - {"step"}) ^ set(parts))
        raise UserError(
            f"checkpoint {path} does not fit this run: checkpoint and run differ in {', '.join(differing)}; "
            "start anew with --overwrite"
        )
    for name, part in parts.items():
        if isinstance(part, Stateful):
            state = saved[name]
            try:
                if not isinstance(state, dict):
                    raise TypeError(f"expected a state, got {type(state).__name__}")
                _load_state(part, state)
            except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as problem:
                why = " ".join(str(problem).split())[:200]
                raise UserError(f"checkpoint {path} does not fit this run: {name}: {why}") from None
    return saved
