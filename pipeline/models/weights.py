"""A checkpoint file -> tables of tensors -> a selection -> a load that is all or nothing.

No code in a file is ever run. Before a module is touched, what would be missing, left over or of
another shape is known; if anything is, the error names the key=, prefix= and drop= that would fit.
"""

import argparse
import contextlib
import json
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.registry import did_you_mean

State = dict[str, Tensor]

_TRANSLATION_ERRORS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Selection:
    """Which tensors of a file are meant.

    `key` names a nested dictionary, `prefix` selects the names that begin with it and strips it,
    `drop` may be left over, `head` is put aside (matched on stripped names, and on the full names
    of what the prefix did not select). A pattern is a dotted beginning (`fc`) or a glob (`fc.*.bias`).
    """

    key: str = ""
    prefix: str = ""
    drop: tuple[str, ...] = ()
    head: tuple[str, ...] = ()

    def __str__(self) -> str:
        said = {
            "key": self.key,
            "prefix": self.prefix,
            "drop": "+".join(self.drop),
            "head": "+".join(self.head),
        }
        return ",".join(f"{name}={value}" for name, value in said.items() if value)


@dataclass(frozen=True)
class CheckpointFormat:
    """How a library's own checkpoints differ from its bare module.

    `classifier` holds the exact names of the layers we took off; `translate` is the library's own
    reading of old or resized checkpoints, given the stripped tensors.
    """

    classifier: frozenset[str] = frozenset()
    translate: Callable[[State], State] | None = None


@dataclass
class Fit:
    """A selection held against the names and shapes a module wants."""

    state: State
    head: State
    missing: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return not (self.missing or self.left_over or self.reshaped)


def load(
    module: nn.Module,
    file: Path,
    *,
    name: str,
    choice: Selection | None = None,
    checkpoint_format: CheckpointFormat | None = None,
) -> State:
    """Load a file into a module, all of it or nothing, and return the tensors of the head.

    Raises UserError for unreadable files and for a selection that does not fit, with one that does.
    """
    choice, checkpoint_format = choice or Selection(), checkpoint_format or CheckpointFormat()
    wanted = module.state_dict()
    tables = _tables(read(file))
    if choice.key and choice.key not in tables:
        hint = did_you_mean(choice.key, tables)
        raise UserError(f"{file} holds no tensors under key={choice.key}{hint or '.'} It holds: {_keys(tables)}")
    asked = [choice.key] if choice.key else list(tables)
    fits = {key: _fit(tables[key], wanted, choice, checkpoint_format) for key in asked}
    good = [key for key, fit in fits.items() if fit]
    if len(good) > 1:
        raise UserError(f"{file} holds {len(good)} sets of weights that fit {name}; choose one: {_keys(good)}")
    if not good:
        raise UserError(_misfit_message(file, name, fits, tables, wanted, choice, checkpoint_format))
    fit = fits[good[0]]
    for key, table in tables.items():  # a head's companions may lie elsewhere: EsViT keeps its centres with the loss
        if key != good[0]:
            fit.head |= {f"{key}.{k}": t for k, t in table.items() if matches(f"{key}.{k}".lstrip("."), choice.head)}
    if choice.head and not fit.head:
        raise UserError(f"{file}: nothing matches head={'+'.join(choice.head)}; leave it out or correct it")
    module.load_state_dict(fit.state, strict=False)  # not strict: left over is only what was allowed above
    return fit.head


def read(file: Path) -> Mapping[str, Any]:
    """The (nested) dictionary in a file, by torch.load(weights_only=True) or safetensors.

    Raises UserError if the file is missing, damaged, no dictionary, or wants to run code.
    """
    try:
        with open(file, "rb") as stream:
            start = stream.read(9)
    except FileNotFoundError:
        raise UserError(f"weights={file} does not exist; check the path") from None
    except OSError as wrong:
        raise UserError(f"weights={file} cannot be read: {wrong.strerror or wrong}; check the path") from None
    try:
        if start[8:9] == b"{":  # safetensors: eight bytes of length, then JSON
            return safetensors.torch.load_file(file)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():  # DINO's flags: inert
            warnings.simplefilter("ignore")  # what is wrong with a file, the errors below say
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as wrong:  # torch raises a dozen types for damaged files
        raise UserError(_unreadable(file, wrong)) from wrong
    if not isinstance(content, Mapping):
        raise UserError(f"weights={file} holds a {type(content).__name__}, not tensors by name; save a state dict")
    return content


def _unreadable(file: Path, wrong: Exception) -> str:
    if "TorchScript" in str(wrong):
        return f"weights={file} is a TorchScript program; name it as the model: torchscript:{file}"
    if isinstance(wrong, pickle.UnpicklingError):
        code = re.search(r"GLOBAL (\S+)", str(wrong))
        wants = f"wants to run code when it is loaded ({code[1]})" if code else "is damaged, or a pickle that runs code"
        return (
            f"weights={file} {wants}; compress reads only tensors. "
            "If you trust it, save its state dict anew: torch.save(model.state_dict(), FILE)"
        )
    return f"weights={file} is damaged or no checkpoint ({type(wrong).__name__}); fetch it anew"


def _tables(node: Mapping[str, Any], path: str = "") -> dict[str, State]:
    """Every dictionary in a checkpoint that holds tensors by name, under its dotted path."""
    here = {k: v.detach() for k, v in node.items() if isinstance(k, str) and isinstance(v, Tensor)}
    found = {path: here} if here else {}
    for key, value in node.items():
        if isinstance(key, str) and isinstance(value, Mapping):  # the state of an optimizer is keyed by numbers
            found |= _tables(value, f"{path}.{key}" if path else key)
    return found


def _keys(tables: Iterable[str]) -> str:
    return ", ".join(f"key={key}" if key else "(the outermost dictionary)" for key in tables) or "no tensors at all"


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern is a dotted beginning of the name or a glob for it."""
    return any(name == p.rstrip(".") or name.startswith(p.rstrip(".") + ".") or fnmatchcase(name, p) for p in patterns)


def _fit(table: State, wanted: Mapping[str, Tensor], choice: Selection, checkpoint_format: CheckpointFormat) -> Fit:
    names = {key: key.removeprefix(choice.prefix).lstrip(".") for key in table if key.startswith(choice.prefix)}
    head = {names.get(key, key): table[key] for key in table if matches(names.get(key, key), choice.head)}
    state = {name: table[key] for key, name in names.items() if name not in head}
    if checkpoint_format.translate and state:
        with contextlib.suppress(*_TRANSLATION_ERRORS):  # over foreign names; the comparison below says what is wrong
            state = checkpoint_format.translate(dict(state))
    # torch itself fills in num_batches_tracked, which files from before 0.4.1 lack
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    reshaped = [key for key in wanted if key in state and wanted[key].shape != state[key].shape]
    unknown = [key for key in state if key not in wanted and key not in checkpoint_format.classifier]
    left_over = [key for key in unknown if not matches(key, choice.drop)]
    return Fit(state, head, missing, left_over, reshaped)


def _misfit_message(
    file: Path,
    name: str,
    fits: Mapping[str, Fit],
    tables: Mapping[str, State],
    wanted: Mapping[str, Tensor],
    choice: Selection,
    checkpoint_format: CheckpointFormat,
) -> str:
    if not fits:
        return f"{file} holds no tensors by name, so nothing fits {name}; is it a checkpoint?"
    fit = min(fits.values(), key=lambda f: (len(f.missing) + len(f.reshaped), len(f.left_over)))
    shapes = [f"{key} {_shape(fit.state[key])} there, {_shape(wanted[key])} wanted" for key in fit.reshaped]
    said = [
        f"{len(fit.missing)} of {len(wanted)} tensors are missing ({_few(fit.missing)})" if fit.missing else "",
        f"{len(fit.left_over)} are left over ({_few(fit.left_over)})" if fit.left_over else "",
        f"{len(shapes)} have another shape ({_few(shapes)})" if shapes else "",
    ]
    what = f"{file} does not fit {name}" + (f" with {choice}" if str(choice) else "")
    better = _suggest(tables, wanted, choice, checkpoint_format)
    advice = f"Try {' or '.join(map(str, better))}" if better else "No key=, prefix= or drop= fits: another network?"
    return f"{what}: {'; '.join(filter(None, said))}. Nothing was loaded. {advice}"


def _suggest(
    tables: Mapping[str, State], wanted: Mapping[str, Tensor], choice: Selection, checkpoint_format: CheckpointFormat
) -> list[Selection]:
    """The choices that would load, those that drop least first, at most three."""
    found: list[tuple[Selection, Fit]] = []
    for key, table in tables.items():
        for prefix in _prefixes(table, at_least=len(wanted) // 2):
            other = replace(choice, key=key, prefix=prefix)
            fit = _fit(table, wanted, other, checkpoint_format)
            if not fit.missing and not fit.reshaped:
                found.append((other, fit))
    found.sort(key=lambda pair: len(pair[1].left_over))
    return [
        replace(
            other,
            drop=(*choice.drop, *_patterns(fit.left_over, wanted)),
            head=choice.head if fit.head else (),
        )
        for other, fit in found[:3]
    ]


def _prefixes(table: State, at_least: int) -> list[str]:
    """The dotted beginnings that enough names share, in the order of the file; the empty one first."""
    shared: Counter[str] = Counter()
    for key in table:
        shared.update(["", *(f"{beginning}." for beginning in _beginnings(key) if beginning != key)])
    return [prefix for prefix, count in shared.items() if count >= at_least]


def _patterns(left_over: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """The shortest dotted beginnings that cover what is left over and nothing that is wanted."""
    taken = {beginning for key in wanted for beginning in _beginnings(key)}
    return list(dict.fromkeys(next(b for b in _beginnings(key) if b not in taken) for key in left_over))


def _beginnings(key: str) -> Iterator[str]:
    """`a.b.c` -> `a`, `a.b`, `a.b.c`"""
    parts = key.split(".")
    return (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))


def _few(items: list[str]) -> str:
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def to_bytes(tensors: Mapping[str, Tensor], said: Mapping[str, str]) -> bytes:
    """A safetensors file with one spelling: the library writes what is said in another order every time."""
    data = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    end = 8 + int.from_bytes(data[:8], "little")
    text = json.dumps({"__metadata__": dict(said), **json.loads(data[8:end])}).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of eight bytes
    return len(text).to_bytes(8, "little") + text + data[end:]
