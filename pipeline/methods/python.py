"""A user's own method: `python:module:Class,key=value` or `python:FILE.py:Class`."""

import inspect
from typing import Any

from pipeline.artifact import UserError
from pipeline.imports import load
from pipeline.methods.base import Method, Setting


def python(place: str, /, *, setting: Setting, **options: Any) -> Method:
    """Your own: a subclass of pipeline.methods.base.Method, from a module or a file."""
    build = load(place)
    if not (inspect.isclass(build) and issubclass(build, Method)):
        raise UserError(f"python:{place} is no subclass of pipeline.methods.base.Method")
    return build(setting=setting, **options)
