"""The options of a method: what a spec gives, what a run recorded, and defaults for the rest.

A method's options are the arguments of its constructor, without the context. A run's record keeps all of them, so that
a default that changes later does not change a run that has begun.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from compress_ssl.pipeline.methods import METHODS
from compress_ssl.pipeline.methods.base import Method, MethodContext
from compress_ssl.pipeline.runtime.options import Options, from_option, recordable
from compress_ssl.pipeline.runtime.registry import Member
from compress_ssl.pipeline.runtime.signatures import any_key, convert, literal
from compress_ssl.pipeline.runtime.spec import Spec


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
        values = {
            key: from_option(value, keys[key], f"{bare} {key}=") if key in keys else value
            for key, value in self.options.items()
        }
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
        """The defaults of the options; one that a record cannot hold is left out."""
        return recordable({name: p.default for name, p in self.keys.items()})

    def given(self, spec: Spec, place: str = "") -> Options:
        """The options that a spec of this method gives. Raises UserError for a value of the wrong type.

        place: of the spec, with which such an error begins.
        """
        rest = any_key(self.member.signature)
        where = f"{place}{self.member.name if self.member.user else spec.kind}"
        values: dict[str, object] = {}
        for key, text in spec.options.items():
            if key in self.keys:
                values[key] = convert(text, self.keys[key], f"{where} {key}=")
            else:
                values[key] = text if rest is None or rest.annotation is str else literal(text)
        return recordable(values)

    def accepts(self, option: str) -> bool:
        """Whether the constructor takes an option."""
        return option in self.keys or any_key(self.member.signature) is not None

    def check(self, filled: Options) -> None:
        """Raise UserError for an unknown option, and for one that is required and neither given nor `filled`."""
        METHODS.check(self.spec, given=("context", *(name for name in filled if name not in self.spec.options)))


def find_typed(text: str) -> TypedMethod:
    """The method that a spec names; imports it. Its options are not checked yet: `TypedMethod.check` does so."""
    spec = METHODS.parse(text)
    member = METHODS.member(spec)
    method: type[Method] = member.build.for_spec(member.argument)  # type: ignore[attr-defined]  # a Method's class
    return TypedMethod(text, spec, member, method)
