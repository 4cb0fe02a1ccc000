"""Figures on disk: their words as JSON, their arrays beside those of the result, in its .npz file."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import msgspec
import numpy as np

from compress_ssl.pipeline.evaluators.figures import KINDS, Figure
from compress_ssl.pipeline.runtime.records import JsonObject

PREFIX = "figure."  # of the names of arrays that only a figure has


def pack(figure: Figure, arrays: dict[str, np.ndarray]) -> JsonObject:
    """A figure as JSON. Its arrays are added to `arrays`; one that is there already is referred to by its name."""
    packed = _pack(figure, f"{PREFIX}{figure.name}", arrays)
    return {"kind": type(figure).__name__, **packed}


def _pack(value: Any, name: str, arrays: dict[str, np.ndarray]) -> Any:
    """A part of a figure as JSON. `Any`: whatever the fields of a figure are."""
    if isinstance(value, np.ndarray):
        known = next((key for key, array in arrays.items() if array is value), None)
        if known is None:
            arrays[name] = value
        return {"array": known or name}
    if is_dataclass(value):
        return {
            field.name: _pack(getattr(value, field.name), f"{name}.{field.name}", arrays) for field in fields(value)
        }
    if isinstance(value, Mapping):
        return {key: _pack(part, f"{name}.{number}", arrays) for number, (key, part) in enumerate(value.items())}
    if isinstance(value, list | tuple):
        return [_pack(part, f"{name}.{number}", arrays) for number, part in enumerate(value)]
    return value


def unpack(packed: JsonObject, arrays: Mapping[str, np.ndarray]) -> Figure:
    """The figure that `pack` was given. Raises ValueError or KeyError for what it did not write."""

    def find_array(wanted: type, value: Any) -> Any:
        if wanted is not np.ndarray or not isinstance(value, dict):
            raise ValueError(f"a figure has no {wanted.__name__}")
        return arrays[value["array"]]

    words = {key: value for key, value in packed.items() if key != "kind"}
    return msgspec.convert(words, KINDS[packed["kind"]], dec_hook=find_array)
