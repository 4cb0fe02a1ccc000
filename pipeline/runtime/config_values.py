"""Flags that a file names: values of YAML as the fields of a Config require them."""

import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, TypeVar

from compress_ssl.pipeline.runtime.config import choices, plain_types
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.formatting import shorten
from compress_ssl.pipeline.runtime.spec import did_you_mean
from compress_ssl.pipeline.runtime.storage import local_path

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

C = TypeVar("C", bound="DataclassInstance")

EXPONENT_NUMBER = re.compile(r"[-+]?[0-9.]+e[-+]?[0-9]+")
"""Numbers like 1e-3, which YAML 1.1 reads as text unless they have a dot and a signed exponent."""

IN_WORDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Path: "a path",
    NoneType: "null",
}
"""What errors call the types of a flag."""


def parse_flags(
    config: "type[DataclassInstance]", flags: Mapping[str, object], where: str, without: tuple[str, ...]
) -> dict[str, object]:
    """Flags of a command as keyword arguments of its Config class.

    where: what the error texts call the section. without: flags that the caller itself sets. Raises UserError for
    unknown flags, for missing ones and for values of a wrong type.
    """
    known = [f.name for f in fields(config) if f.name not in (*without, "overwrite")]
    for key in flags:
        if key not in known:
            raise UserError(f"{where} has no flag {key!r}{did_you_mean(key, known) or '.'} Known: {', '.join(known)}")
    required = [f.name for f in fields(config) if f.default is MISSING and f.name in known]
    missing = [name for name in required if name not in flags]
    if flags and missing:
        raise UserError(f"{where} needs {missing[0]}")
    return convert_values(config, flags)


def convert_values(config: "type[DataclassInstance]", values: Mapping[str, object]) -> dict[str, object]:
    """Values of YAML as the fields of a Config: paths, tuples, numbers. Raises UserError for a wrong type."""
    hints = typing.get_type_hints(config)
    return {key: _convert(key, value, hints[key]) for key, value in values.items()}


def _convert(key: str, value: object, hint: object) -> object:
    types = plain_types(hint)  # of `float | None`, both
    if typing.get_origin(hint) is tuple:
        return as_texts(value, key)
    if Path in types and isinstance(value, str):
        return local_path(value)
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if float in types and (is_whole or (isinstance(value, str) and EXPONENT_NUMBER.fullmatch(value))):
        try:
            return float(typing.cast(str | int, value))
        except (ValueError, OverflowError):  # 1.2.3e4, or a whole number that no float is as large as
            raise UserError(
                f"{key} is {shorten(repr(value), 80)}, but must be a number that a float can hold"
            ) from None
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        names = choices(hint)
        expected = f"one of {', '.join(names)}" if names else " or ".join(IN_WORDS[each] for each in types)
        raise UserError(f"{key} is {shorten(repr(value), 80)}, but must be {expected}")
    return value


def as_texts(value: object, key: str) -> tuple[str, ...]:
    """Texts from one text or number, or from a list of them. Raises UserError, which names `key`, for anything else."""
    texts = list(value) if isinstance(value, list | tuple) else [value]
    for each in texts:
        if not isinstance(each, str | int | float) or isinstance(each, bool):
            raise UserError(f"{key} is {shorten(repr(each), 80)}, but must be a text or a list of texts")
    return tuple(map(str, texts))


def build(config: type[C], values: Mapping[str, object]) -> C:
    """The Config with these values, to which `convert_values` gave the types of its fields."""
    make: Callable[..., C] = config
    return make(**values)
