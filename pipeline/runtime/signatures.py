"""What a function's signature says about a spec: which keys it may have, and the types of their values."""

import inspect
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.storage import local_path


def signature_of(function: Callable[..., object]) -> inspect.Signature:
    """The signature, its annotations as types. A builtin without a signature is taken to accept any key."""
    for eval_str in (True, False):
        try:
            return inspect.signature(function, eval_str=eval_str)
        except Exception:  # an annotation that is a text may name what is imported under TYPE_CHECKING only
            continue
    return inspect.Signature([inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD)])


def positional_parameters(signature: inspect.Signature) -> list[inspect.Parameter]:
    """The positional-only parameters; the first one takes the argument of a spec."""
    return [p for p in signature.parameters.values() if p.kind is inspect.Parameter.POSITIONAL_ONLY]


def any_key(signature: inspect.Signature) -> inspect.Parameter | None:
    """The parameter `**options`, or None."""
    return next((p for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD), None)


def is_path(parameter: inspect.Parameter) -> bool:
    return Path in (parameter.annotation, *typing.get_args(parameter.annotation))


def is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is inspect.Parameter.empty


def literal(text: str) -> bool | int | float | str | None:
    """Text as a Python value: true, false, none, whole numbers and floats; anything else stays a string."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.lower() == "none":
        return None
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def convert(text: str, parameter: inspect.Parameter, where: str) -> object:
    """Convert text to the annotated type of a parameter.

    Supported are bool, int, float, Path, str, Literal, tuples and lists (written `a+b`) and unions of these, `None`
    too; for any other annotation, and for none, the text is read by `literal`. `none` is None if that is the default.
    where: the place of the text, with which an error begins. Raises UserError if no type fits.
    """
    annotation = parameter.annotation
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    options = typing.get_args(annotation) if is_union else (annotation,)
    if text.lower() == "none" and (type(None) in options or parameter.default is None):
        return None
    problem = ""
    for option in options:
        if option is type(None):
            continue
        try:
            return _convert_to(text, option)
        except ValueError as wrong:
            problem = str(wrong)
    raise UserError(f"{where}{text}: {problem}")


def _convert_to(text: str, wanted: object) -> object:
    """Convert text to one type. Raises ValueError that says which values are allowed."""
    kind = typing.get_origin(wanted) or wanted
    if kind in (tuple, list, Sequence):
        inner = next(iter(typing.get_args(wanted)), None)  # None: members of any type
        members = [_convert_to(part, inner) for part in text.split("+") if part]
        return members if kind is list else tuple(members)
    if kind is typing.Literal:
        allowed = {str(each).lower() if isinstance(each, bool) else str(each): each for each in typing.get_args(wanted)}
        if text not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return allowed[text]
    if wanted is bool:
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise ValueError("must be true or false")
        return text.lower() in ("true", "1", "yes")
    if wanted is int or wanted is float:
        try:
            return int(text) if wanted is int else float(text)
        except ValueError:
            raise ValueError("must be a whole number" if wanted is int else "must be a number") from None
    if wanted is Path:
        return local_path(text)
    return text if wanted is str else literal(text)
