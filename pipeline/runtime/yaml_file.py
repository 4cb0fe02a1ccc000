"""YAML files that a user wrote, or that somebody else did: every fault of a file ends in words.

Only what JSON can say is read: texts, numbers, true, false, null, lists, and mappings whose keys are texts.
"""

import re
from pathlib import Path

from compress_ssl.pipeline.runtime.errors import UserError

MAX_VALUES = 100_000  # of a file with its aliases written out; a few lines of aliases to aliases can mean billions
MAX_LEVELS = 50  # of lists and mappings inside each other, with aliases written out

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters and lone surrogates


def read_yaml(file: Path) -> object:
    """The content of a YAML file. Raises UserError if there is no such file, and for everything that is not allowed."""
    import yaml

    try:
        loader = yaml.SafeLoader(file.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        # Aliases are counted before values are made of the nodes: a merge key (<<) writes them out.
        if node is not None and not _is_small(node):
            raise UserError(
                f"{file} means more than {MAX_VALUES} values, or more than {MAX_LEVELS} levels of lists and mappings, "
                "when its aliases are written out; write it without aliases"
            )
        content = None if node is None else loader.construct_document(node)
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; give the path of a YAML file") from None
    except RecursionError:
        raise UserError(f"{file} is nested too deeply; it may have {MAX_LEVELS} levels") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, ArithmeticError) as problem:
        # PyYAML raises the latter types for numbers, dates and characters that are none, such as 2020-13-45
        raise UserError(f"{file} is no YAML: {' '.join(str(problem).split())[:200]}") from None
    _check(content, file)
    return content


def _is_small(root: object) -> bool:
    """Whether a node of PyYAML, with its aliases written out, stays within MAX_VALUES and MAX_LEVELS."""
    endless = MAX_VALUES + 1, MAX_LEVELS + 1
    known: dict[int, tuple[int, int]] = {}  # id of a node: (its values, its levels)

    def measure(node: object) -> tuple[int, int]:
        if id(node) not in known:
            known[id(node)] = endless  # a node that is met again inside itself has no end
            inside = [measure(child) for child in _children(node)]
            values = 1 + sum(child_values for child_values, _ in inside)
            levels = 1 + max((child_levels for _, child_levels in inside), default=0)
            known[id(node)] = values, levels
        return known[id(node)]

    values, levels = measure(root)
    return values <= MAX_VALUES and levels <= MAX_LEVELS


def _children(node: object) -> list[object]:
    """The nodes in a node of PyYAML: a sequence holds nodes, a mapping pairs of nodes, a scalar its text."""
    value = getattr(node, "value", None)
    if not isinstance(value, list):
        return []
    return [child for entry in value for child in (entry if isinstance(entry, tuple) else (entry,))]


def _check(value: object, file: Path, name: str = "") -> None:
    """Raise UserError for a value that JSON has not, and for a text that cannot be printed or be part of a path.

    name: dotted, of the entry that the value is.
    """
    where = f"{file}: {name}" if name else str(file)
    if isinstance(value, dict):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise UserError(f"{where} has the key {key!r}, which is no text; put it in quotes")
            _check(key, file, name)
            _check(entry, file, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for entry in value:
            _check(entry, file, name)
    elif isinstance(value, str):
        if _UNPRINTABLE.search(value):
            raise UserError(f"{where} holds {ascii(value)[:80]}, with a character that cannot be printed; take it out")
    elif value is not None and not isinstance(value, bool | int | float):
        raise UserError(f"{where} holds a {type(value).__name__}, {str(value)[:80]!r}; if a text is meant, use quotes")
