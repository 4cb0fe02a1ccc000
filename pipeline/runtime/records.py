"""Records: frozen dataclasses that are read from JSON with every type and range checked, and written back unchanged.

A record's fields have the names and types of the JSON object: `int`, `str`, `Literal`, `tuple[int, ...]`, nested
dataclasses. `Annotated[int, Meta(ge=1)]` gives a range, `Annotated[str, Meta(pattern=...)]` a pattern, and a field of
the type `T | UnsetType = UNSET` may be missing on disk. msgspec does the checking; a record that would not be written
back as it was read is refused too, so no entry of another version of compress is lost without a word.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from compress_ssl.pipeline.runtime.errors import UserError

__all__ = [
    "UNSET", "Count", "Digest", "InvalidRecord", "JsonObject", "Meta", "Number", "Positive", "PositiveNumber", "Sha256",
    "UnsetType", "parse_json", "read_record", "require_shallow", "to_json",
]  # fmt: skip

Record = TypeVar("Record")

MAX_LEVELS = 100  # of lists and objects inside each other: our own records have up to six

JsonObject = dict[str, Any]  # Any: a JSON object whose entries are not known here
Number = int | float  # a number as it stands on disk: 1 stays 1 and 1.0 stays 1.0
Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
PositiveNumber = Annotated[int, Meta(gt=0)] | Annotated[float, Meta(gt=0)]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]  # BLAKE2b-128, see compress_ssl.pipeline.runtime.digests
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]  # of weights

_FAULT = re.compile(r"(?P<what>.*?)(?: - at (?P<where>key in )?`\$?(?P<path>.*)`)?$", re.DOTALL)


class InvalidRecord(UserError):
    """What lies on disk is not a record of this kind."""


_REMEDY = "use the version of compress that made it, or restore it from a copy"


def read_record(
    cls: type[Record], data: object, where: str, *, ignore_unknown: bool = False, remedy: str = _REMEDY
) -> Record:
    """The record of class `cls` in parsed JSON; `where` names it in the error, for instance "S/manifest.json".

    ignore_unknown: for records that are never written back, entries of another version do no harm.
    remedy: what the error tells the user to do.
    Raises InvalidRecord for a missing or unknown entry, and for one of another type or outside its range.
    """
    try:
        record = msgspec.convert(data, cls)
    except (msgspec.ValidationError, RecursionError, UnicodeEncodeError) as wrong:
        raise InvalidRecord(f"{where} is not valid: {_describe(wrong)}; {remedy}") from None
    unknown = None if ignore_unknown else next(_unknown_entries(data, to_json(record)), None)
    if unknown is not None:
        raise InvalidRecord(f"{where} has the entry {unknown}, which this version of compress does not know; {remedy}")
    return record


def to_json(record: object) -> Any:  # Any: a dictionary for a dataclass, a list for a tuple of them
    """A record as JSON: dataclasses become dictionaries without their UNSET fields, tuples become lists."""
    return _with_lists(msgspec.to_builtins(record))


def _with_lists(value: object) -> object:
    """JSON with lists in the place of tuples, so that it equals what is read from disk."""
    if isinstance(value, dict):
        return {key: _with_lists(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_with_lists(entry) for entry in value]
    return value


def parse_json(raw: bytes | str, where: str) -> object:
    """Parse JSON from disk. Raises InvalidRecord if it is none (NaN and infinity are none) or nested too deeply."""
    try:
        parsed: object = json.loads(raw, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise InvalidRecord(f"{where} is damaged: it is not valid JSON; {_REMEDY}") from None
    require_shallow(parsed, where)
    return parsed


def require_shallow(parsed: object, where: str) -> None:
    """Raise InvalidRecord for JSON of more than MAX_LEVELS levels: what walks through a record calls itself per level.

    Python stops at a thousand calls, wherever it is then.
    """
    level = [parsed]
    for _ in range(MAX_LEVELS):
        level = [entry for value in level if isinstance(value, dict | list) for entry in _entries(value)]
        if not level:
            return
    raise InvalidRecord(f"{where} is not valid: it has more than {MAX_LEVELS} levels; {_REMEDY}")


def _entries(value: JsonObject | list[object]) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _describe(wrong: Exception) -> str:
    """The error of msgspec in our words: "identity.data.images: Expected `int`, got `str`"."""
    if isinstance(wrong, RecursionError):
        return "it is nested too deeply"
    if isinstance(wrong, UnicodeEncodeError):  # msgspec compares names as UTF-8, in which half a surrogate has no bytes
        return f"the text {ascii(wrong.object)[:80]} has a character that is not Unicode"
    match = _FAULT.match(str(wrong))
    assert match  # the pattern matches any text
    what = match["what"].replace("`", "").replace("Object missing required field", "it lacks the entry")
    what = what[0].lower() + what[1:]
    path = (match["path"] or "").lstrip(".")
    return f"{path}: {what}" if path else what


def _unknown_entries(there: object, known: object, path: str = "") -> Iterator[str]:
    """Dotted names of the entries of `there` that are not in `known` with an equal value."""
    if isinstance(there, dict) and isinstance(known, dict):
        for key, value in there.items():
            name = f"{path}.{key}" if path else str(key)
            if key in known:
                yield from _unknown_entries(value, known[key], name)
            else:
                yield name
    elif isinstance(there, list) and isinstance(known, list) and len(there) == len(known):
        for number, (one, other) in enumerate(zip(there, known, strict=True)):
            yield from _unknown_entries(one, other, f"{path}[{number}]")
    elif there != known:
        yield path
