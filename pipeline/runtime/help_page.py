"""The text of a --help page: paragraphs, then sections of two columns, for a terminal of any width.

Typer's own tables are not used: at 80 columns they leave a third of the line for the text and cut long flag names.
"""

import textwrap
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from compress_ssl.pipeline.runtime.config import Panel, choices, flag_name, plain_types

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FIRST_COLUMN = 26
"""Characters of the first column, with two before it and two behind it. A longer name stands on a line of its own."""

VALUES = {str: "TEXT", Path: "PATH", int: "N", float: "X"}
"""{type of a flag: what its value is called, unless the flag has a `metavar`}"""

Rows = Sequence[tuple[str, str]]
"""[(a flag or command with its value, its help), ...]"""


# ---------------------------------------------------------------- what a Config says


def sections_of(config: "type[DataclassInstance]") -> dict[str, list[tuple[str, str]]]:
    """The rows of every flag of a Config class, by panel; flags of one panel alone are called Options."""
    hints = typing.get_type_hints(config)
    sections: dict[str, list[tuple[str, str]]] = {name: [] for name in typing.get_args(Panel)}
    for f in fields(config):
        sections[f.metadata["panel"]].append((spelling(f, hints[f.name]), help_text(f)))
    sections = {name: rows for name, rows in sections.items() if rows}
    return sections if len(sections) > 1 else {"Options": [row for rows in sections.values() for row in rows]}


def spelling(of: Field[object], hint: object) -> str:
    """A flag as it is typed: `-b, --batch-size N`, `--norm-decay / --no-norm-decay`, or `STORE` if it has a place.

    A switch that is off by default is shown without its --no- form, which changes nothing.
    """
    name, value = flag_name(of.name), value_name(of, hint)
    if of.metadata["place"]:
        return f"{value}..." if typing.get_origin(hint) is tuple else value
    if not value:
        return f"--{name}" if of.default is False else f"--{name} / --no-{name}"
    short = f"{of.metadata['short']}, " if of.metadata["short"] else ""
    return f"{short}--{name} {value}"


def value_name(of: Field[object], hint: object) -> str:
    """What the help calls the value of a flag: its metavar, its choices, or a word for its type; "" for a switch."""
    if of.metadata["metavar"]:
        return str(of.metadata["metavar"])
    if choices(hint):
        return "|".join(choices(hint))
    return next((name for kind, name in VALUES.items() if kind in plain_types(hint)), "")


def help_text(of: Field[object]) -> str:
    """The help of a field with its default as the last sentence, or with "Required." if it has none.

    A switch that is off by default says nothing of it, and a help that states the default itself is left as it is.
    """
    text, default = str(of.metadata["help"]), of.default
    if default is MISSING:
        return f"{text} Required."
    if default is None or default is False or default == "" or "Default: " in text:
        return text
    if default is True:
        return f"{text} Default: on."
    shown = ", ".join(map(str, default)) if isinstance(default, tuple) else default
    return f"{text} Default: {shown:g}." if isinstance(shown, float) else f"{text} Default: {shown}."


# ---------------------------------------------------------------- the page


def format_page(text: str, sections: Mapping[str, Rows], width: int) -> str:
    """The page below the line with the usage. Paragraphs of the text are separated by empty lines."""
    parts = [wrap(" ".join(paragraph.split()), width, 2) for paragraph in text.split("\n\n")]
    parts += [f"{title}:\n{format_rows(rows, width)}" for title, rows in sections.items()]
    return "\n" + "\n\n".join(parts) + "\n"


def format_rows(rows: Rows, width: int) -> str:
    """Two columns, the first no wider than it must be."""
    fitting = [len(name) for name, _ in rows if len(name) <= FIRST_COLUMN]
    margin = max(fitting, default=FIRST_COLUMN) + 4
    lines = []
    for name, text in rows:
        body = wrap(text, width, margin)
        fits = len(name) + 4 <= margin
        lines.append(f"  {name}".ljust(margin) + body[margin:] if fits else f"  {name}\n{body}")
    return "\n".join(lines)


def wrap(text: str, width: int, margin: int) -> str:
    """The text in lines of at most `width` characters, each after `margin` spaces.

    A word is never cut, not even at its hyphens: the names of flags have them.
    """
    indent = " " * margin
    return textwrap.fill(
        text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
