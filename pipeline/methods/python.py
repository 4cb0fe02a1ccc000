"""A user's own method, `python:module:Class,key=value` or `python:FILE.py:Class,key=value`."""

import inspect
import typing
from pathlib import Path
from typing import Any

from compress_ssl.pipeline.methods import version1
from compress_ssl.pipeline.methods.base import Method, MethodContext
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.import_object import import_object
from compress_ssl.pipeline.runtime.registry import convert, did_you_mean, literal


class UserMethod:
    """Your own method: a subclass of compress_ssl.pipeline.methods.base.Method, from a module or a file.

    python:mine.py:Cosine,power=2 builds the class Cosine of mine.py with power=2. The keys are the keyword-only
    arguments of its `__init__`; a value is converted to the type of the argument's annotation. docs/methods.md
    shows how to write and test a method. Raises UserError for a place without such a class and for unknown keys.
    """

    def __new__(cls, place: str, /, *, context: MethodContext, **options: str) -> Method:  # type: ignore[misc]
        build = import_method(place)
        parameters = inspect.signature(build).parameters.values()
        known = {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        of_version1 = issubclass(build, version1.Method) and "context" not in known
        context_name = "setting" if "setting" in known or of_version1 else "context"
        known.pop(context_name, None)
        takes_any_key = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        for key in () if takes_any_key else options:
            if key not in known:
                keys = ", ".join(known) or "none"
                raise UserError(f"python:{place} has no key {key!r}{did_you_mean(key, known) or '.'} Known: {keys}")
        values = {key: convert_option(text, known.get(key), place) for key, text in options.items()}
        return build(**{context_name: context}, **values)

    @staticmethod
    def for_spec(place: str) -> type[Method]:
        """The user's class, whose `recipe` and `needs` apply."""
        return import_method(place)


def convert_option(text: str, parameter: inspect.Parameter | None, place: str) -> Any:
    """`text` as the annotated bool, int, float or Path, else as a Python literal. Raises UserError if it cannot be."""
    if parameter and {parameter.annotation, *typing.get_args(parameter.annotation)} & {bool, int, float, Path}:
        return convert(text, parameter, f"python:{place} {parameter.name}=")
    return literal(text)


def import_method(place: str) -> type[Method]:
    """Import the class at `place`. Raises UserError if there is none, or if it is not a concrete subclass of Method."""
    build = import_object(place)
    if not (inspect.isclass(build) and issubclass(build, Method)):
        raise UserError(
            f"python:{place} is no subclass of compress_ssl.pipeline.methods.base.Method; derive it from that class"
        )
    if inspect.isabstract(build):
        raise UserError(f"python:{place} has no forward(batch, outputs); write one that returns one loss per student")
    return build
