"""Which tensors of a checkpoint file belong to a network: select them, compare them, suggest a better selection.

A table is a dictionary {name: tensor}; a checkpoint may hold several of them, nested, for example `state_dict` and
`state_dict_ema`. Nothing here changes a module.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

from torch import Tensor

State = dict[str, Tensor]

MAX_SUGGESTIONS = 3
"""Selections named in an error text."""

MAX_NAMES = 3
"""Tensors named in an error text, for each way in which a selection does not fit."""

_TRANSLATION_ERRORS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What the filters of timm and torchvision raise for tensors of another network."""

# ---------------------------------------------------------------- what is selected


@dataclass(frozen=True)
class Selection:
    """Which tensors of a file are meant: the options key=, prefix=, drop= and head= of a model's spec.

    key: dotted path of the table in the file. prefix: only names that begin with it are used, and it is removed
    from them. drop: patterns of tensors that may be left over. head: patterns of tensors that are returned
    separately; they are compared with names without prefix, and with the full names of the other tensors.

    A pattern is the beginning of a name up to a dot (`fc`) or a glob (`fc.*.bias`).
    """

    key: str = ""
    prefix: str = ""
    drop: tuple[str, ...] = ()
    head: tuple[str, ...] = ()

    def __str__(self) -> str:
        """As in a spec: `key=state_dict,prefix=module.`"""
        options = {
            "key": self.key,
            "prefix": self.prefix,
            "drop": "+".join(self.drop),
            "head": "+".join(self.head),
        }
        return ",".join(f"{name}={value}" for name, value in options.items() if value)


@dataclass(frozen=True)
class CheckpointFormat:
    """How the checkpoints of a library differ from its module without classifier.

    classifier: exact names of the tensors of the removed layers, which may be left over. translate: the library's
    own function for old or resized checkpoints, applied to the names without prefix.
    """

    classifier: frozenset[str] = frozenset()
    translate: Callable[[State], State] | None = None


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns is the beginning of the name up to a dot, the whole name, or a glob for it."""
    for pattern in patterns:
        stem = pattern.rstrip(".")
        if name == stem or name.startswith(f"{stem}.") or fnmatchcase(name, pattern):
            return True
    return False


# ---------------------------------------------------------------- comparing with a module


@dataclass
class Fit:
    """Result of comparing the selected tensors with the names and shapes of a module; true if they can be loaded."""

    state: State  # tensors for the module
    head: State  # tensors that the patterns of head= match
    missing: list[str] = field(default_factory=list)  # names in the module only
    left_over: list[str] = field(default_factory=list)  # names in the file only, which no pattern allows
    reshaped: list[str] = field(default_factory=list)  # names whose shapes are different

    def __bool__(self) -> bool:
        return not (self.missing or self.left_over or self.reshaped)


def compare(
    table: State, wanted: Mapping[str, Tensor], selection: Selection, checkpoint_format: CheckpointFormat
) -> Fit:
    """Select tensors of one table and compare them with `wanted`, the state dict of a module."""
    prefix = selection.prefix
    names = {key: key.removeprefix(prefix).lstrip(".") for key in table if key.startswith(prefix)}
    head = {names.get(key, key): table[key] for key in table if matches(names.get(key, key), selection.head)}
    state = {name: table[key] for key, name in names.items() if name not in head}
    if checkpoint_format.translate and state:
        # a filter raises for tensors of another network; the comparison below then reports what does not fit
        with contextlib.suppress(*_TRANSLATION_ERRORS):
            state = checkpoint_format.translate(dict(state))
    # torch itself adds num_batches_tracked, which files older than torch 0.4.1 do not have
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    reshaped = [key for key in wanted if key in state and wanted[key].shape != state[key].shape]
    unknown = [key for key in state if key not in wanted and key not in checkpoint_format.classifier]
    left_over = [key for key in unknown if not matches(key, selection.drop)]
    return Fit(state, head, missing, left_over, reshaped)


# ---------------------------------------------------------------- error texts and suggestions


def describe_misfit(
    file: Path,
    name: str,
    fits: Mapping[str, Fit],
    tables: Mapping[str, State],
    wanted: Mapping[str, Tensor],
    selection: Selection,
    checkpoint_format: CheckpointFormat,
) -> str:
    """The error text for a file none of whose tables fits the network `name`, with selections that would fit.

    fits: the comparison of each table that was tried, by key.
    """
    if not fits:
        return f"{file} holds no tensors by name, so nothing fits {name}; is it a checkpoint?"
    nearest = min(fits.values(), key=lambda fit: (len(fit.missing) + len(fit.reshaped), len(fit.left_over)))
    chosen = f" with {selection}" if str(selection) else ""
    suggestions = _suggest(tables, wanted, selection, checkpoint_format)
    advice = "No key=, prefix= or drop= fits: another network?"
    if suggestions:
        advice = f"Try {' or '.join(map(str, suggestions))}"
    return f"{file} does not fit {name}{chosen}: {_describe_fit(nearest, wanted)}. Nothing was loaded. {advice}"


def _describe_fit(fit: Fit, wanted: Mapping[str, Tensor]) -> str:
    shapes = [f"{key} {_shape(fit.state[key])} there, {_shape(wanted[key])} wanted" for key in fit.reshaped]
    parts = []
    if fit.missing:
        parts.append(f"{len(fit.missing)} of {len(wanted)} tensors are missing ({_first_few(fit.missing)})")
    if fit.left_over:
        parts.append(f"{len(fit.left_over)} are left over ({_first_few(fit.left_over)})")
    if shapes:
        parts.append(f"{len(shapes)} have another shape ({_first_few(shapes)})")
    return "; ".join(parts)


def _first_few(items: list[str]) -> str:
    return ", ".join(items[:MAX_NAMES]) + (", ..." if len(items) > MAX_NAMES else "")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _suggest(
    tables: Mapping[str, State],
    wanted: Mapping[str, Tensor],
    selection: Selection,
    checkpoint_format: CheckpointFormat,
) -> list[Selection]:
    """Selections that could be loaded, at most MAX_SUGGESTIONS, those that drop the fewest tensors first."""
    found: list[tuple[Selection, Fit]] = []
    for key, table in tables.items():
        for prefix in _prefixes(table, at_least=len(wanted) // 2):
            candidate = replace(selection, key=key, prefix=prefix)
            fit = compare(table, wanted, candidate, checkpoint_format)
            if not fit.missing and not fit.reshaped:
                found.append((candidate, fit))
    found.sort(key=lambda pair: len(pair[1].left_over))
    suggestions = []
    for candidate, fit in found[:MAX_SUGGESTIONS]:
        drop = (*selection.drop, *_patterns(fit.left_over, wanted))
        suggestions.append(replace(candidate, drop=drop, head=selection.head if fit.head else ()))
    return suggestions


def _prefixes(table: State, at_least: int) -> list[str]:
    """Dotted prefixes that at least so many names share, in the order of the file; the empty prefix first."""
    counts: Counter[str] = Counter()
    for key in table:
        counts[""] += 1
        counts.update(f"{beginning}." for beginning in _beginnings(key) if beginning != key)
    return [prefix for prefix, count in counts.items() if count >= at_least]


def _patterns(left_over: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """The shortest dotted beginnings that cover all left-over names and no wanted name."""
    used = {beginning for key in wanted for beginning in _beginnings(key)}
    shortest = [next(beginning for beginning in _beginnings(key) if beginning not in used) for key in left_over]
    return list(dict.fromkeys(shortest))


def _beginnings(key: str) -> Iterator[str]:
    """`a.b.c` -> `a`, `a.b`, `a.b.c`"""
    parts = key.split(".")
    return (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
