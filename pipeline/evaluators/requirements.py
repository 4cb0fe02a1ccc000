"""What a protocol's class and its Result must be: sentences on what they are not, for errors and check_protocol."""

import inspect
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass

import numpy as np

from compress_ssl.pipeline.evaluators import PROTOCOLS, figure_arrays, find_protocol
from compress_ssl.pipeline.evaluators.base import Evaluator, Figure, ImageGrid, Result, Score, Split
from compress_ssl.pipeline.evaluators.figure_arrays import PREFIX
from compress_ssl.pipeline.evaluators.figures import KINDS
from compress_ssl.pipeline.evaluators.record import OWN_ENTRIES
from compress_ssl.pipeline.runtime.records import InvalidRecord, parse_json, read_record, to_json

SPLITS = ("training", "validation")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]*")


def is_ours(cls: type) -> bool:
    """Whether a class is part of this package. An error that ours raises is a fault of the package, not of the user."""
    return cls.__module__.startswith(f"{__name__.partition('.')[0]}.")


def find_class_faults(cls: object) -> Iterator[str]:
    """What keeps a class from being a protocol, as sentences that say what to do. The first one explains the others."""
    if not (inspect.isclass(cls) and issubclass(cls, Evaluator)):
        yield "is no subclass of compress_ssl.pipeline.evaluators.base.Evaluator; derive it from that class"
        return
    if inspect.isabstract(cls):
        yield "has no __call__(train, val, folder, augmented); write one that returns a Result"
    else:
        yield from _call_faults(cls)
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        yield f"has the name {name!r}; give it a class variable `name` of letters, digits and hyphens"
    elif name in OWN_ENTRIES:
        yield f"has the name {name!r}, which metrics.json uses itself; choose another `name`"
    elif name in PROTOCOLS.entries and find_protocol(name) is not cls:
        yield f"has the name {name!r}, which is that of a protocol of compress; choose another `name`"
    if not is_dataclass(cls):
        yield "is no dataclass; write @dataclass(frozen=True) above it, with a field for each option"
    if not set(cls.needs_labels) <= set(SPLITS):
        yield f'has needs_labels = {cls.needs_labels!r}; name only "training" and "validation"'


def _call_faults(cls: type[Evaluator]) -> Iterator[str]:
    try:
        inspect.signature(cls.__call__).bind("self", "train", "val", "folder", "augmented")
    except TypeError as wrong:
        yield f"cannot be called with (train, val, folder, augmented): {wrong}; give its __call__ these parameters"


def find_result_faults(result: object, train: Split, val: Split) -> Iterator[str]:
    """What keeps a result from being kept and shown, as sentences that say what to do."""
    if not isinstance(result, Result):
        yield f"returned a {type(result).__name__}; return a Result(metrics, arrays, scores, figures)"
        return
    yield from _metrics_faults(result.metrics)
    yield from _array_faults(result.arrays)
    for what, parts in (("scores", result.scores), ("figures", result.figures)):
        if not isinstance(parts, list | tuple):
            yield f"has {what} that are a {type(parts).__name__}; give a list"
            return
    for score in result.scores:
        if not isinstance(score, Score):
            yield f"has a {type(score).__name__} among its scores; make each a Score(key, title, value)"
            return
        try:
            read_record(Score, parse_json(json.dumps(to_json(score)).encode(), "it"), f"the score {score.key!r}")
        except (InvalidRecord, TypeError, ValueError) as wrong:
            yield f"has a score that cannot be kept: {wrong}"
            return
    for what, values in (("key", [s.key for s in result.scores]), ("title", [s.title for s in result.scores])):
        for twice in _repeated(values):
            yield f"has two scores of the {what} {twice!r}; give each one of its own"
    yield from _figure_faults(result.figures, {"train": len(train), "val": len(val)})


def _metrics_faults(metrics: object) -> Iterator[str]:
    try:
        same = json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    except (TypeError, ValueError) as wrong:
        yield f"has metrics that are no JSON ({wrong}); use numbers that are finite, words, lists and dictionaries"
        return
    if not isinstance(metrics, dict) or not same:
        yield "has metrics that JSON would change; use a dictionary whose keys are words, and lists, not tuples"


def _array_faults(arrays: object) -> Iterator[str]:
    if not isinstance(arrays, dict):
        yield "has arrays that are no dictionary; give {name: array}"
        return
    for name, array in arrays.items():
        if not isinstance(name, str) or name.startswith(PREFIX):
            yield f"has an array called {name!r}; call it by a word that does not begin with {PREFIX!r}"
        if not isinstance(array, np.ndarray) or array.dtype.hasobject:
            yield f"has the array {name!r}, which is no NumPy array of numbers or words; convert it"


def _figure_faults(figures: Iterable[object], images: dict[str, int]) -> Iterator[str]:
    names = []
    for figure in figures:
        if not isinstance(figure, Figure) or type(figure).__name__ not in KINDS:
            yield f"has a {type(figure).__name__} among its figures; the kinds are {', '.join(KINDS)}"
            continue
        names.append(figure.name)
        arrays: dict[str, np.ndarray] = {}
        try:
            figure_arrays.unpack(json.loads(json.dumps(figure_arrays.pack(figure, arrays), allow_nan=False)), arrays)
        except (TypeError, ValueError, KeyError) as wrong:
            yield f"has the figure {figure.name!r}, which cannot be kept: {wrong}"
            continue
        if isinstance(figure, ImageGrid):
            for tile in (tile for row in figure.rows for tile in row.tiles):
                if tile.split not in images or not 0 <= tile.index < images[tile.split]:
                    yield (
                        f"shows image {tile.index} of {tile.split!r} in the figure {figure.name!r}; the splits are "
                        f"'train' with {images['train']} images and 'val' with {images['val']}"
                    )
                    break
    for twice in _repeated(names):
        yield f"has two figures of the name {twice!r}; give each one of its own"


def _repeated(words: list[str]) -> list[str]:
    """The words that are there more than once."""
    return sorted({word for word in words if words.count(word) > 1})
