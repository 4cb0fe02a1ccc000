"""Fields of a stage's Config, help beside the default, and the rules they are held to."""

from collections.abc import Callable
from dataclasses import MISSING, field, fields
from typing import Any


def flag(default: Any = MISSING, help: str = "", *, short: str = "", place: bool = False) -> Any:
    """A dataclass field that is one command line flag; no default: required. `place`: a positional argument."""
    return field(default=default, metadata={"help": help, "short": short, "place": place})


def to_flags(config: Any) -> list[str]:
    """The flags that make a config of options again: what is at its default is left out."""
    out: list[str] = []
    for f in fields(config):
        name, value = f.name.replace("_", "-"), getattr(config, f.name)
        if value == f.default:
            continue
        if isinstance(value, bool):
            out.append(f"--{name}" if value else f"--no-{name}")
        else:
            for each in value if isinstance(value, tuple) else (value,):
                out.append(f"--{name}={each}")
    return out


def require(config: Any, rules: dict[str, tuple[Callable[[Any], bool], str]]) -> None:
    """Check fields against {name: (predicate, "must be ...")}; None passes. Raises UserError."""
    from compress_ssl.pipeline.runtime.artifact import UserError

    for name, (good, words) in rules.items():
        value = getattr(config, name)
        if value is not None and not good(value):
            raise UserError(f"--{name.replace('_', '-')} is {value}, but {words}")


POSITIVE = (lambda x: x > 0, "must be more than 0")
NOT_NEGATIVE = (lambda x: x >= 0, "must be 0 or more")


def one_of(*names: str) -> tuple[Callable[[Any], bool], str]:
    """A rule: the value is one of these."""
    return (lambda x: x in names), f"must be one of {', '.join(names)}"
