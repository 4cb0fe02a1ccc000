"""What a command takes and returns: the fields of its Config, flags that reproduce one, checks, and its result."""

import math
import typing
from collections.abc import Callable
from dataclasses import MISSING, field, fields
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal

from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.spec import did_you_mean

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

CommandResult = dict[str, object]
"""The JSON object that --json prints. Its entry "summary" is the text that a command prints without --json."""

Panel = Literal["What", "Recipe", "Views", "Speed", "Output"]
"""The sections of a command's help, in the order in which they are shown."""


# The result is Any because a field stands where the class body promises a value of the field's own type, as with
# dataclasses.field.
def flag(
    default: object = MISSING, help: str = "", *, panel: Panel = "What", metavar: str = "", short: str = "",
    place: bool = False,
) -> Any:  # fmt: skip
    """A dataclass field that becomes a command line flag; without a default the flag is required.

    help: whole sentences. `help_page` adds the default, so only a help whose default is None or "" says it itself.
    panel: the section of the command's help. metavar: what the help calls the value. short: a second name such as
    "-q". place: the field is a positional argument instead of a flag.
    """
    metadata = {"help": help, "panel": panel, "metavar": metavar, "short": short, "place": place}
    return field(default=default, metadata=metadata)


def to_flags(config: "DataclassInstance") -> list[str]:
    """The command line arguments that reproduce a Config; fields that have their default value are left out.

    Positional arguments come as they are, in the order of the fields; a flag comes as one word, "--name=value", so
    that a value may begin with "-". A tuple repeats its flag for each member. Numbers keep all their digits.
    """
    out: list[str] = []
    for f in fields(config):
        name, value = flag_name(f.name), getattr(config, f.name)
        if value == f.default:
            continue
        if isinstance(value, bool):
            out.append(f"--{name}" if value else f"--no-{name}")
            continue
        for member in value if isinstance(value, tuple) else (value,):
            out.append(str(member) if f.metadata.get("place") else f"--{name}={member}")
    return out


def flag_name(field_name: str) -> str:
    """The name of a field's flag, without the leading hyphens."""
    return field_name.replace("_", "-")


# ---------------------------------------------------------------- checks


def require(config: "DataclassInstance", rules: dict[str, tuple[Callable[[Any], bool], str]]) -> None:
    """Check fields against {name: (predicate, "must be ...")} and all choices; the value None passes a rule.

    A number must be finite whatever the rules say: JSON has neither infinity nor NaN. Raises UserError.
    """
    check_choices(config)
    for name, (good, words) in rules.items():
        value = getattr(config, name)
        if value is not None and not good(value):
            raise UserError(f"--{flag_name(name)} is {value}, but {words}")
    for f in fields(config):
        value = getattr(config, f.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{flag_name(f.name)} is {value}, but must be a finite number")


def check_choices(config: "DataclassInstance") -> None:
    """Raises UserError if a field whose type is a Literal has a value outside it.

    A Config that was made in Python or from a sweep's file is checked alike, and in the same words.
    """
    hints = typing.get_type_hints(type(config))
    for f in fields(config):
        known = choices(hints[f.name])
        value = getattr(config, f.name)
        if not known or (value is None and NoneType in typing.get_args(hints[f.name])):
            continue
        for member in value if isinstance(value, tuple) else (value,):
            if member not in known:
                hint = did_you_mean(str(member), known)
                raise UserError(f"--{flag_name(f.name)} is {member}, but must be one of {', '.join(known)}{hint}")


def choices(hint: object) -> tuple[str, ...]:
    """The names in a field's type: those of Literal[...], `Literal[...] | None` and tuple[Literal[...], ...]."""
    if typing.get_origin(hint) is Literal:
        return tuple(map(str, typing.get_args(hint)))
    return tuple(name for part in typing.get_args(hint) for name in choices(part))


def plain_types(hint: object) -> tuple[type, ...]:
    """The types in a field's type, such as (float, NoneType) of `float | None`, with str in place of a Literal."""
    if typing.get_origin(hint) is Literal:
        return (str,)
    if isinstance(hint, type) and not typing.get_args(hint):
        return (hint,)
    return tuple(found for part in typing.get_args(hint) for found in plain_types(part))


# Rules for `require`: (predicate, what the error says a value must be).
POSITIVE = (lambda x: x > 0, "must be more than 0")
NOT_NEGATIVE = (lambda x: x >= 0, "must be 0 or more")
