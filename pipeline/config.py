"""Fields of a stage's Config, help beside the default, and the rules they are held to."""

from collections.abc import Callable
from dataclasses import MISSING, field
from typing import Any


def flag(default: Any = MISSING, help: str = "", *, short: str = "", place: bool = False) -> Any:
    """A dataclass field that is one command line flag; no default: required. `place`: a positional argument."""
    return field(default=default, metadata={"help": help, "short": short, "place": place})


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
