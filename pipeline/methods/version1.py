"""Base classes for methods that users wrote for version 1, which imports them by `from pipeline.method import Method`.

In version 1 a subclass overrode `named`, `suit`, `delivers` and `fill`. `runtime/old_names.py` maps the old import
paths to this module.
"""

import inspect
from collections.abc import Container
from functools import cache
from typing import cast

from compress_ssl.pipeline.methods import METHODS, base, memory_bank
from compress_ssl.pipeline.models.linear_head import LinearHead


class Method(base.Method):
    """`base.Method` whose overridable methods have their version 1 names; each new name calls the old one."""

    @classmethod
    def for_spec(cls, argument: str) -> type[base.Method]:
        return cls.named(argument)

    @classmethod
    def named(cls, argument: str) -> type[base.Method]:
        return super().for_spec(argument)

    def exported_head(self) -> LinearHead | None:
        return self.delivers()

    def delivers(self) -> LinearHead | None:
        return super().exported_head()

    def check_inputs(self, name: str, arrays: Container[str], pairing: str) -> None:
        self.suit(name, arrays, pairing)

    def suit(self, name: str, arrays: Container[str], pairing: str) -> None:
        super().check_inputs(name, arrays, pairing)

    def refill_banks(self, read: memory_bank.Read) -> None:
        self.fill(read)

    def fill(self, read: memory_bank.Read) -> None:
        super().refill_banks(read)


class MemoryBank(memory_bank.MemoryBank):
    """`memory_bank.MemoryBank` with `fill`, the version 1 name of `refill`."""

    def fill(self, read: memory_bank.Read, block: int = 8192) -> None:
        self.refill(read, block)


def __getattr__(name: str) -> type[Method]:
    """A built-in method's class, such as `Seed`, for a user's subclass that passes `setting` to its constructor."""
    for kind, place in METHODS.entries.items():
        if place.endswith(f":{name}") and kind != "python":
            return _with_old_names(kind)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _with_old_names(kind: str) -> type[Method]:
    built_in = cast(type[base.Method], METHODS.resolve(kind))

    class OldNames(Method, built_in):  # type: ignore[misc, valid-type]  # a base class known only at run time
        """The built-in method with the first version's names."""

        def __init__(self, *, setting: base.MethodContext, **options: object):
            super().__init__(context=setting, **options)

    return OldNames


def with_context(built: type[base.Method], signature: inspect.Signature) -> type[base.Method]:
    """A user's class, whose constructor takes `setting`, as one that takes `context`, which is its name now."""

    class TakesContext(built):  # type: ignore[misc, valid-type]  # a base class known only at run time
        def __init__(self, *, context: base.MethodContext, **options: object):
            super().__init__(setting=context, **options)

    TakesContext.__name__, TakesContext.__qualname__ = built.__name__, built.__qualname__
    parameters = [p.replace(name="context") if p.name == "setting" else p for p in signature.parameters.values()]
    if "setting" not in signature.parameters:  # a constructor that takes any key gets it among them
        parameters.insert(-1, inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY))
    TakesContext.__signature__ = inspect.Signature(parameters)
    return TakesContext
