"""A user's own method: `python:module:Class,key=value` or `python:FILE.py:Class`."""

import inspect
import typing
from pathlib import Path
from typing import Any

from compress_ssl.pipeline.methods.base import Method, MethodContext
from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.import_object import import_object
from compress_ssl.pipeline.runtime.registry import convert, did_you_mean, literal


class UserMethod:
    """Your own: a subclass of compress_ssl.pipeline.methods.base.Method, from a module or a file."""

    def __new__(cls, place: str, /, *, context: MethodContext, **options: str) -> Method:  # type: ignore[misc]
        build = import_method(place)
        parameters = inspect.signature(build).parameters.values()
        known = {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        context_name = "setting" if "setting" in known else "context"  # the first version's name
        known.pop(context_name, None)
        anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        for key in () if anything else options:
            if key not in known:
                keys = ", ".join(known) or "none"
                raise UserError(f"python:{place} has no key {key!r}{did_you_mean(key, known) or '.'} Known: {keys}")
        values = {key: convert_option(text, known.get(key), place) for key, text in options.items()}
        return build(**{context_name: context}, **values)

    @staticmethod
    def for_spec(place: str) -> type[Method]:
        """The class itself, whose recipe and needs count."""
        return import_method(place)


def convert_option(text: str, parameter: inspect.Parameter | None, place: str) -> Any:
    """What was written, as its annotation wants it if that is a number, a truth or a path. Raises UserError."""
    if parameter and {parameter.annotation, *typing.get_args(parameter.annotation)} & {bool, int, float, Path}:
        return convert(text, parameter, f"python:{place} {parameter.name}=")
    return literal(text)


def import_method(place: str) -> type[Method]:
    """Raises UserError if there is no such class, or it is no method."""
    build = import_object(place)
    if not (inspect.isclass(build) and issubclass(build, Method)):
        raise UserError(f"python:{place} is no subclass of compress_ssl.pipeline.methods.base.Method")
    if inspect.isabstract(build):
        raise UserError(f"python:{place} has no forward(batch, outputs), which gives a loss of each student; write it")
    return build
