"""Figures on disk: their words as JSON, their arrays beside those of the result, in its .npz file."""

from collections.abc import Mapping
from dataclasses import fields

import msgspec
import numpy as np

from compress_ssl.pipeline.evaluators.figures import KINDS, Figure, ImageRow, Panel, Tile
from compress_ssl.pipeline.runtime.records import JsonObject

PREFIX = "figure."  # of the names of arrays that only a figure has


def pack(figure: Figure, arrays: dict[str, np.ndarray]) -> JsonObject:
    """A figure as JSON. Its arrays are added to `arrays`; one that is there already is referred to by its name."""
    return {"kind": type(figure).__name__, **_pack_fields(figure, f"{PREFIX}{figure.name}", arrays)}


def _pack_fields(part: Figure | Panel | ImageRow | Tile, name: str, arrays: dict[str, np.ndarray]) -> JsonObject:
    """A dataclass as JSON; `name` begins the names of its arrays."""
    return {field.name: _pack(getattr(part, field.name), f"{name}.{field.name}", arrays) for field in fields(part)}


def _pack(value: object, name: str, arrays: dict[str, np.ndarray]) -> object:
    """The value of a field as JSON."""
    if isinstance(value, np.ndarray):
        known = next((key for key, array in arrays.items() if array is value), None)
        if known is None:
            arrays[name] = value
        return {"array": known or name}
    if isinstance(value, Panel | ImageRow | Tile):
        return _pack_fields(value, name, arrays)
    if isinstance(value, Mapping):
        return {key: _pack(part, f"{name}.{number}", arrays) for number, (key, part) in enumerate(value.items())}
    if isinstance(value, list | tuple):
        return [_pack(part, f"{name}.{number}", arrays) for number, part in enumerate(value)]
    return value


def unpack(packed: JsonObject, arrays: Mapping[str, np.ndarray]) -> Figure:
    """The figure that `pack` was given. Raises ValueError or KeyError for what it did not write."""

    def find_array(wanted: type, value: object) -> np.ndarray:
        if wanted is not np.ndarray or not isinstance(value, dict):
            raise ValueError(f"a figure has no {wanted.__name__}")
        return arrays[value["array"]]

    words = {key: value for key, value in packed.items() if key != "kind"}
    return msgspec.convert(words, KINDS[packed["kind"]], dec_hook=find_array)
