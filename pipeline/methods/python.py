"""A user's own method, `python:module:Class,key=value` or `python:FILE.py:Class,key=value`."""

import inspect

from compress_ssl.pipeline.methods import version1
from compress_ssl.pipeline.methods.base import Method, MethodContext
from compress_ssl.pipeline.methods.options import convert_loosely
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.import_object import import_object
from compress_ssl.pipeline.runtime.registry import did_you_mean


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
        values = {
            key: convert_loosely(value, known.get(key), f"python:{place}") if isinstance(value, str) else value
            for key, value in options.items()  # a value that is no text was converted before
        }
        return build(**{context_name: context}, **values)

    @staticmethod
    def for_spec(place: str) -> type[Method]:
        """The user's class, whose `recipe` and `needs` apply."""
        return import_method(place)


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
