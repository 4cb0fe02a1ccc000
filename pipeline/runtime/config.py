"""Fields of a stage's Config, the command line flags that reproduce one, and checks of its values."""

from collections.abc import Callable
from dataclasses import MISSING, field, fields
from typing import Any

from compress_ssl.pipeline.runtime.errors import UserError


def flag(default: Any = MISSING, help: str = "", *, short: str = "", place: bool = False) -> Any:
    """A dataclass field that becomes a command line flag; without a default the flag is required.

    short: a second name such as "-q". place: the field is a positional argument instead of a flag.
    """
    return field(default=default, metadata={"help": help, "short": short, "place": place})


def to_flags(config: Any) -> list[str]:
    """The command line arguments that reproduce a Config; fields that have their default value are left out.

    Positional arguments come as they are, in the order of the fields; a flag comes as one word, "--name=value", so
    that a value may begin with "-". A tuple repeats its flag for each member. Numbers keep all their digits.
    """
    out: list[str] = []
    for f in fields(config):
        name, value = f.name.replace("_", "-"), getattr(config, f.name)
        if value == f.default:
            continue
        if isinstance(value, bool):
            out.append(f"--{name}" if value else f"--no-{name}")
            continue
        for member in value if isinstance(value, tuple) else (value,):
            out.append(str(member) if f.metadata.get("place") else f"--{name}={member}")
    return out


def require(config: Any, rules: dict[str, tuple[Callable[[Any], bool], str]]) -> None:
    """Check fields against {name: (predicate, "must be ...")}; the value None always passes. Raises UserError."""
    for name, (good, words) in rules.items():
        value = getattr(config, name)
        if value is not None and not good(value):
            raise UserError(f"--{name.replace('_', '-')} is {value}, but {words}")


# Rules for `require`: (predicate, what the error says a value must be).
POSITIVE = (lambda x: x > 0, "must be more than 0")
NOT_NEGATIVE = (lambda x: x >= 0, "must be 0 or more")


def one_of(*names: str) -> tuple[Callable[[Any], bool], str]:
    """A rule for `require`: the value is one of these names."""
    return (lambda x: x in names), f"must be one of {', '.join(names)}"
