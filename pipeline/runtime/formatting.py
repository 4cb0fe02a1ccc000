"""Formatting of names, numbers and records for people: in summaries, progress lines and reports."""

import math
from collections.abc import Mapping
from typing import TypeGuard

DASH = "\N{EN DASH}"  # stands for a missing value


def is_finite(value: object) -> TypeGuard[float]:
    """Whether a value is a number that can be drawn: no NaN, no infinity, no integer beyond the range of floats."""
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:
        return False


def shorten(text: str, most: int) -> str:
    """The text as one printable line of at most `most` characters; a longer one ends in an ellipsis."""
    line = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    return line if len(line) <= most else line[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def pluralize(number: int, noun: str) -> str:
    """`1 row block`, `2 row blocks`"""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def format_score(value: float | None) -> str:
    """A score in percent with one decimal: 71.24 -> 71.2"""
    return DASH if value is None else f"{value:.1f}"


def format_difference(value: float | None) -> str:
    """A difference of scores with its sign: 1.26 -> +1.3; what rounds to zero has no sign."""
    if value is None:
        return DASH
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}") if round(value, 1) else "0.0"


def share(part: float, whole: float) -> str:
    """A part of a whole in percent: 18 of 20 -> 90 %"""
    return f"{100 * part / whole:.0f} %"


def bar_length(percent: float) -> str:
    """A CSS length, limited to 0 to 100 percent so that a bar stays in its frame: 103.2 -> 100.00%"""
    return f"{min(max(percent, 0), 100):.2f}%"


def format_count(value: object) -> str:
    """A count with three digits and a decimal prefix: 11689512 -> 11.7M"""
    if not is_finite(value):
        return DASH
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return format_number(value)


def format_number(value: object) -> str:
    """A number without a prefix, floats with up to six digits: 2048 -> 2048"""
    if not is_finite(value):
        return DASH
    return f"{value:g}" if isinstance(value, float) else str(value)


def format_value(value: object) -> str:
    """Any value of a record: whole numbers with grouped digits, the first 12 members of a list."""
    if value is None:
        return DASH
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value[:12])) + (f" and {len(value) - 12} more" if len(value) > 12 else "")
    return f"{value:g}" if isinstance(value, float) else str(value)


def flatten(record: Mapping[str, object], under: str = "") -> list[tuple[str, object]]:
    """The entries of nested records as (name, value), the names of levels joined by dots."""
    out: list[tuple[str, object]] = []
    for key, value in record.items():
        name = f"{under}.{key}" if under else str(key)
        out += flatten(value, name) if isinstance(value, Mapping) else [(name, value)]
    return out


def format_duration(seconds: float) -> str:
    """`41 s`, `3 min 05 s`, `2 h 10 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def format_bytes(count: float) -> str:
    """A number of bytes with a decimal unit: `812 B`, `3.4 MB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def describe_exception(wrong: BaseException) -> str:
    """An exception as part of a sentence: its type and the first 200 characters of its text."""
    text = " ".join(str(wrong).split())
    return f"{type(wrong).__name__}: {text[:200]}" if text else type(wrong).__name__
