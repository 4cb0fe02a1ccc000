"""Fields of a stage's Config: help beside the default, and which fields say what an artifact is."""

from collections.abc import Callable
from dataclasses import MISSING, field, fields
from typing import Any


def flag(default: Any = MISSING, help: str = "", *, short: str = "", identity: bool = False, place: bool = False) -> Any:
    """A dataclass field that is one command line flag.

    No default: required. `identity`: part of what the artifact is. `place`: a positional argument.
    """
    return field(default=default, metadata={"help": help, "short": short, "identity": identity, "place": place})


def identity(config: Any) -> dict[str, Any]:
    """{name: value} of the fields that say what the artifact is."""
    return {f.name: getattr(config, f.name) for f in fields(config) if f.metadata.get("identity")}


def require(config: Any, rules: dict[str, tuple[Callable[[Any], bool], str]]) -> None:
    """Check fields against {name: (predicate, "must be ...")}; None passes. Raises UserError."""
    from pipeline.artifact import UserError

    for name, (good, words) in rules.items():
        value = getattr(config, name)
        if value is not None and not good(value):
            raise UserError(f"--{name.replace('_', '-')} is {value}, but {words}")


POSITIVE = (lambda x: x > 0, "must be more than 0")
NOT_NEGATIVE = (lambda x: x >= 0, "must be 0 or more")


def one_of(*names: str) -> tuple[Callable[[Any], bool], str]:
    """A rule: the value is one of these."""
    return (lambda x: x in names), f"must be one of {', '.join(names)}"
