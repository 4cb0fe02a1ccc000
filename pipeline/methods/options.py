"""The options of a method: what a spec gives, what a run recorded, and defaults for the rest.

A method's options are the keyword-only parameters of its constructor, without the context. A run's record keeps all of
them as JSON values, so that a default that changes later does not change a run that has begun.
"""

import inspect
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress_ssl.pipeline.methods import METHODS
from compress_ssl.pipeline.methods.base import Method, MethodContext
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.registry import Spec, convert, literal

CONTEXT_NAMES = ("context", "setting")  # of the constructor's first keyword; `setting` in users' methods of version 1


@dataclass(frozen=True)
class MethodChoice:
    """A method as a command uses it: its class and every option, given or not."""

    words: str  # the spec as it was typed when the run was begun: for its record, messages and tables
    spec: Spec
    method: type[Method]
    options: Mapping[str, Any]  # JSON values
    recorded: Mapping[str, Any] | None = None  # the options with which the run in the folder was begun; None: no run

    def build(self, context: MethodContext) -> Method:
        """The method. Raises UserError for options that it does not accept and for a store that does not suffice."""
        parameters = option_parameters(self.method)
        values = {key: self._value(key, value, parameters.get(key)) for key, value in self.options.items()}
        built: Method = METHODS.build(Spec(self.spec.kind, self.spec.argument), context=context, **values)
        return built

    def _value(self, key: str, value: Any, parameter: inspect.Parameter | None) -> Any:
        """The value that the constructor takes, from JSON."""
        if isinstance(value, str):
            return convert_text(self.spec, key, value, parameter)
        if not takes_any_key(self.spec.kind):  # a record is not typed by the user: its numbers are checked like texts
            return convert_text(self.spec, key, _to_text(value), parameter)
        of_tuple = parameter is not None and isinstance(parameter.default, tuple)
        return tuple(value) if of_tuple and isinstance(value, list | tuple) else value


def option_parameters(method: type[Method]) -> dict[str, inspect.Parameter]:
    """{option: its parameter} of a method's constructor."""
    parameters = inspect.signature(method).parameters
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    return {name: p for name, p in parameters.items() if p.kind is keyword_only and name not in CONTEXT_NAMES}


def default_options(method: type[Method]) -> dict[str, Any]:
    """The defaults of a method's options as JSON values; one that JSON cannot hold is left out, and not recorded."""
    defaults = {name: p.default for name, p in option_parameters(method).items()}
    return {name: to_json_value(value) for name, value in defaults.items() if _is_json(value)}


def given_options(spec: Spec, method: type[Method], place: str = "") -> dict[str, Any]:
    """The options that a spec gives, as JSON values. Raises UserError for a value of the wrong type.

    place: of the spec, with which such an error begins.
    """
    parameters = option_parameters(method)
    return {
        key: to_json_value(convert_text(spec, key, text, parameters.get(key), place))
        for key, text in spec.options.items()
    }


def check_recorded(spec: Spec, method: type[Method], recorded: Mapping[str, Any], place: str) -> None:
    """Raise UserError, which begins with `place`, for a recorded option of the wrong type."""
    parameters = option_parameters(method)
    for key, value in recorded.items():
        if key in parameters and (isinstance(value, str) or not takes_any_key(spec.kind)):
            convert_text(spec, key, _to_text(value), parameters[key], place)


def accepts(method: type[Method], option: str) -> bool:
    """Whether a method's constructor takes an option."""
    parameters = inspect.signature(method).parameters.values()
    return option in option_parameters(method) or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def require_all(spec: Spec, method: type[Method], options: Mapping[str, Any]) -> None:
    """Raise UserError if an option without a default is missing."""
    for key, parameter in option_parameters(method).items():
        if parameter.default is inspect.Parameter.empty and key not in options:
            raise UserError(f"method {Spec(spec.kind, spec.argument)} needs {key}=")


def takes_any_key(kind: str) -> bool:
    """Whether a kind of method passes its options on to a user's class."""
    parameters = inspect.signature(METHODS.resolve(kind)).parameters.values()
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def convert_text(spec: Spec, key: str, text: str, parameter: inspect.Parameter | None, place: str = "") -> Any:
    """An option's text as the annotated type. For a user's class see `convert_loosely`."""
    if takes_any_key(spec.kind):
        return convert_loosely(text, parameter, f"{place}{spec.kind}:{spec.argument}")
    return text if parameter is None else convert(text, parameter, f"{place}{spec.kind} {key}=")


def convert_loosely(text: str, parameter: inspect.Parameter | None, method: str) -> Any:
    """`text` as the annotated bool, int, float or Path, else as a Python literal. Raises UserError if it cannot be.

    method: name of the method in the error.
    """
    if parameter and {parameter.annotation, *typing.get_args(parameter.annotation)} & {bool, int, float, Path}:
        return convert(text, parameter, f"{method} {parameter.name}=")
    return literal(text)


def to_json_value(value: Any) -> Any:
    """An option's value as JSON: a path becomes an absolute text, a tuple a list."""
    if isinstance(value, Path):
        return str(value.expanduser().absolute())
    return [to_json_value(member) for member in value] if isinstance(value, tuple | list) else value


def _is_json(value: Any) -> bool:
    """Whether a record can hold a value: not a missing default (`Parameter.empty`), no object, no nested list."""
    members = value if isinstance(value, tuple | list) else (value,)
    return all(member is None or isinstance(member, bool | int | float | str | Path) for member in members)


def _to_text(value: Any) -> str:
    """A JSON value as it would be typed in a spec."""
    if isinstance(value, list | tuple):
        return "+".join(map(_to_text, value))
    return "none" if value is None else str(value)
