"""The options of a method: what a spec gives, what a run recorded, and defaults for the rest.

A method's options are the arguments of its constructor, without the context. A run's record keeps all of them as JSON
values, so that a default that changes later does not change a run that has begun.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from compress_ssl.pipeline.methods import METHODS
from compress_ssl.pipeline.methods.base import Method, MethodContext
from compress_ssl.pipeline.runtime.registry import Member, Spec, convert, literal
from compress_ssl.pipeline.runtime.signatures import any_key

Options = Mapping[str, Any]  # JSON values: null, true, numbers, texts and lists of these


@dataclass(frozen=True)
class MethodChoice:
    """A method as a command uses it: its class and every option, given or not."""

    words: str  # the spec as it was typed when the run was begun: for its record, messages and tables
    spec: Spec
    method: type[Method]
    options: Options
    recorded: Options | None = None  # the options with which the run in the folder was begun; None: no run

    def build(self, context: MethodContext) -> Method:
        """The method. Raises UserError for options that it does not accept and for a store that does not suffice."""
        bare = Spec(self.spec.kind, self.spec.argument)
        keys = METHODS.member(bare).keys(("context",))
        values = {key: from_json(value, keys.get(key), f"{bare} {key}=") for key, value in self.options.items()}
        built: Method = METHODS.build(bare, context=context, **values)
        return built


@dataclass(frozen=True)
class TypedMethod:
    """A method's spec as it was typed, and the class that it names."""

    text: str
    spec: Spec
    member: Member
    method: type[Method]  # its `needs` and `recipe` apply

    @cached_property
    def keys(self) -> Mapping[str, inspect.Parameter]:
        """{option: its parameter} of the constructor."""
        return self.member.keys(("context",))

    @property
    def defaults(self) -> Options:
        """The defaults of the options; one that JSON cannot hold is left out, and is not recorded."""
        return {name: to_json_value(p.default) for name, p in self.keys.items() if _is_json(p.default)}

    def given(self, spec: Spec, place: str = "") -> Options:
        """The options that a spec of this method gives. Raises UserError for a value of the wrong type.

        place: of the spec, with which such an error begins.
        """
        rest = any_key(self.member.signature)
        where = f"{place}{self.member.name if self.member.user else spec.kind}"
        options: dict[str, Any] = {}
        for key, text in spec.options.items():
            if key in self.keys:
                options[key] = to_json_value(convert(text, self.keys[key], f"{where} {key}="))
            else:
                options[key] = text if rest is None or rest.annotation is str else literal(text)
        return options

    def accepts(self, option: str) -> bool:
        """Whether the constructor takes an option."""
        return option in self.keys or any_key(self.member.signature) is not None

    def check(self, filled: Options) -> None:
        """Raise UserError for an unknown option, and for one that is required and neither given nor `filled`."""
        METHODS.check(self.spec, given=("context", *(name for name in filled if name not in self.spec.options)))

    def check_recorded(self, recorded: Options, place: str) -> None:
        """Raise UserError, which begins with `place`, for a recorded option of the wrong type."""
        for key, value in recorded.items():
            from_json(value, self.keys.get(key), f"{place}{key}=")


def find_typed(text: str) -> TypedMethod:
    """The method that a spec names; imports it. Its options are not checked yet: `TypedMethod.check` does so."""
    spec = METHODS.parse(text)
    member = METHODS.member(spec)
    method: type[Method] = member.build.for_spec(member.argument)  # type: ignore[attr-defined]  # a Method's class
    return TypedMethod(text, spec, member, method)


def to_json_value(value: Any) -> Any:
    """An option's value as JSON: a path becomes an absolute text, a tuple a list."""
    if isinstance(value, Path):
        return str(value.expanduser().absolute())
    return [to_json_value(member) for member in value] if isinstance(value, tuple | list) else value


def from_json(value: Any, parameter: inspect.Parameter | None, where: str) -> Any:
    """The value that a constructor takes. A record may have been changed, so it is checked as a typed text is."""
    if parameter is None:
        return value
    if isinstance(value, list | tuple) and parameter.annotation is not parameter.empty:
        return convert("+".join(map(_to_text, value)), parameter, where)
    if isinstance(value, list | tuple):
        return tuple(value) if isinstance(parameter.default, tuple) else value
    return convert(_to_text(value), parameter, where)


def _is_json(value: Any) -> bool:
    """Whether a record can hold a value: not a missing default (`Parameter.empty`), no object, no nested list."""
    members = value if isinstance(value, tuple | list) else (value,)
    return all(member is None or isinstance(member, bool | int | float | str | Path) for member in members)


def _to_text(value: Any) -> str:
    """A JSON value as it would be typed in a spec."""
    return "none" if value is None else str(value)
