"""The options of a spec as values that a record can hold: JSON scalars, and tuples of them."""

import inspect
import math
from collections.abc import Mapping
from pathlib import Path

from compress_ssl.pipeline.runtime.digests import canonical
from compress_ssl.pipeline.runtime.records import UNSET, UnsetType
from compress_ssl.pipeline.runtime.signatures import convert

Scalar = bool | int | float | str | None
Option = Scalar | tuple[Scalar, ...]
"""The value of an option of a method or a student, as it stands in a record."""

Options = Mapping[str, Option]
"""{name: value} of the options of a method or a student."""


def recordable(values: Mapping[str, object]) -> dict[str, Option]:
    """The values that a record can hold, as it holds them; the others are left out."""
    options = {name: to_option(value) for name, value in values.items()}
    return {name: value for name, value in options.items() if not isinstance(value, UnsetType)}


def to_option(value: object) -> Option | UnsetType:
    """The value of an option for a record: a path becomes an absolute text. UNSET if a record cannot hold it."""
    if isinstance(value, tuple | list):
        members = [_to_scalar(member) for member in value]
        scalars = tuple(member for member in members if not isinstance(member, UnsetType))
        return scalars if len(scalars) == len(members) else UNSET
    return _to_scalar(value)


def _to_scalar(value: object) -> Scalar | UnsetType:
    if isinstance(value, Path):
        return str(value.expanduser().absolute())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity and no NaN; `from_option` reads the text again
    return value if value is None or isinstance(value, bool | int | float | str) else UNSET


def option_text(value: Option) -> str:
    """An option's value as it is typed in a spec."""
    if isinstance(value, tuple):
        return "+".join(map(option_text, value))
    if isinstance(value, bool):
        return "true" if value else "false"
    return "none" if value is None else str(value)


def require_types(options: Options, parameters: Mapping[str, inspect.Parameter], where: str) -> None:
    """Raise UserError for a recorded option of another type than its parameter; `where` names the options' entry."""
    for key in options.keys() & parameters.keys():
        from_option(options[key], parameters[key], f"{where}.{key} is ")


def from_option(value: Option, parameter: inspect.Parameter, where: str) -> object:
    """The value that a parameter takes; its own default if the record holds that, whatever its annotation.

    A record may have been changed, so any other value is checked as a typed text is.
    where: the place of the value, with which an error begins. Raises UserError for a value of the wrong type.
    """
    default = to_option(parameter.default)
    if not isinstance(default, UnsetType) and canonical(default) == canonical(value):
        return parameter.default
    if isinstance(value, tuple) and parameter.annotation is parameter.empty:
        return value if isinstance(parameter.default, tuple) else list(value)
    return convert(option_text(value), parameter, where)
