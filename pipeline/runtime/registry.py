"""Registries: objects that a user names by a spec "kind:argument,key=value", for example "timm:resnet18".

A registry is a table of "module:object" strings. A module is imported only when a spec names it, so a missing
optional package is an error only for the specs that need it. Errors suggest the nearest known name.
"""

import difflib
import importlib
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from compress_ssl.pipeline.runtime.errors import UserError

# A comma that begins the next option of a spec; other commas belong to the argument.
_NEXT_KEY = re.compile(r",(?=[A-Za-z_][\w-]*=)")


@dataclass(frozen=True)
class Spec:
    """A parsed spec: `timm:resnet18,pretrained=true` has the kind timm, the argument resnet18 and one option."""

    kind: str
    argument: str = ""
    options: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        head = f"{self.kind}:{self.argument}" if self.argument else self.kind
        pairs = [f"{key}={value}" for key, value in self.options.items()]
        if not pairs:
            return head
        return ",".join([head, *pairs]) if self.argument else f"{head}:{','.join(pairs)}"


def parse(text: str) -> Spec:
    """Split a spec. The argument may contain commas and colons; the options begin at the first `,key=`.

    Hyphens in keys become underscores. Raises UserError if a key is given twice.
    """
    kind, _, rest = text.partition(":")
    if re.match(r"[A-Za-z_][\w-]*=", rest):
        rest = "," + rest
    argument, *pairs = _NEXT_KEY.split(rest)
    options: dict[str, str] = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        key = key.replace("-", "_")
        if key in options:
            raise UserError(f"{text!r} gives {key}= twice; keep one")
        options[key] = value
    return Spec(kind, argument, options)


def did_you_mean(word: str, known: typing.Iterable[str]) -> str:
    """`; did you mean 'seed'?` for the known name most similar to `word`, or "" if none is similar enough."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


class Registry:
    """A family of objects that specs name: models, data sets, methods and so on.

    family: what error messages call a member. entries: {kind: "module:object"}. path_means: the kind of a spec that
    is only a path of an existing file or folder.

    Each object is a function or class whose signature defines the spec. Its positional-only parameter takes the
    argument. Its keyword-only parameters are the keys, except those that the caller of `build` passes in `given`.
    With `**options` any other key is allowed, and its value is converted by `literal`; with `**options: str` the
    value stays text. All other values are converted to the parameter's annotated type.
    """

    def __init__(self, family: str, entries: Mapping[str, str], path_means: str | None = None):
        self.family = family
        self.entries = dict(entries)
        self.path_means = path_means

    def parse(self, text: str) -> Spec:
        """Parse a spec and check its kind. An existing path alone becomes a spec of the kind `path_means`.

        Raises UserError for an unknown kind; the text lists the known kinds and suggests the nearest.
        """
        spec = parse(text)
        if spec.kind in self.entries:
            return spec
        if self.path_means and (Path(text).expanduser().exists() or text.startswith((".", "/", "~"))):
            return Spec(self.path_means, text)
        hint = did_you_mean(spec.kind, self.entries) or "."
        path = ", and there is no file or folder of that name" if self.path_means and text == spec.kind else ""
        raise UserError(f"unknown {self.family} {spec.kind!r}{path}{hint} Known: {', '.join(self.entries)}")

    def resolve(self, kind: str) -> Callable[..., typing.Any]:
        """Import the object of a kind. Raises UserError if an optional package is not installed."""
        module, _, name = self.entries[kind].partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as missing:
            if missing.name and missing.name.split(".")[0] == "compress_ssl":
                raise
            raise UserError(
                f"{self.family} {kind!r} needs the package {missing.name!r}, which is not installed; "
                f"pip install {str(missing.name).replace('_', '-')}"
            ) from missing

    def summary(self, kind: str) -> str:
        """The first line of the docstring of a kind's object."""
        return (inspect.getdoc(self.resolve(kind)) or "").partition("\n")[0]

    def keys(self, kind: str, given: typing.Iterable[str] = ()) -> dict[str, inspect.Parameter]:
        """The keys a spec of this kind may have: {key: parameter}, without those in `given`."""
        parameters = inspect.signature(self.resolve(kind)).parameters
        keyword_only = inspect.Parameter.KEYWORD_ONLY
        return {name: p for name, p in parameters.items() if p.kind is keyword_only and name not in given}

    def build(self, text: str | Spec, **given: typing.Any) -> typing.Any:
        """Build the object that a spec names. `given` are arguments from the caller, not from the user.

        Raises UserError for an unknown kind or key, a missing argument or key, and a value of the wrong type.
        """
        spec = self.parse(text) if isinstance(text, str) else text
        build = self.resolve(spec.kind)
        return build(*self._argument(spec, build), **self._options(spec, build, given), **given)

    def check(self, text: str | Spec, given: typing.Iterable[str] = ()) -> Spec:
        """Parse a spec and check it as `build` does, without building the object."""
        spec = self.parse(text) if isinstance(text, str) else text
        build = self.resolve(spec.kind)
        self._argument(spec, build)
        self._options(spec, build, dict.fromkeys(given))
        return spec

    def absolute_spec(self, text: str) -> str:
        """The spec with absolute paths, so that it names the same object from any working directory."""
        spec = self.parse(text)
        build = self.resolve(spec.kind)
        positional, argument = _positional_parameters(build), spec.argument
        if argument and (_is_path(positional[0]) or ".py:" in argument):
            argument = _absolute(argument)
        keys = self.keys(spec.kind)
        options = {k: _absolute(v) if k in keys and _is_path(keys[k]) else v for k, v in spec.options.items()}
        return str(Spec(spec.kind, argument, options))

    def _argument(self, spec: Spec, build: Callable[..., typing.Any]) -> list[typing.Any]:
        """The converted argument of a spec as a list of one, or [] if the spec has none."""
        positional = _positional_parameters(build)
        if spec.argument and not positional:
            raise UserError(f"{self.family} {spec.kind!r} takes no argument, but {spec.argument!r} was given")
        if not spec.argument:
            if positional and positional[0].default is inspect.Parameter.empty:
                name = positional[0].name.upper()
                raise UserError(f"{self.family} {spec.kind!r} needs an argument: {spec.kind}:{name}")
            return []
        return [convert(spec.argument, positional[0], f"{spec.kind}:")]

    def _options(self, spec: Spec, build: Callable[..., typing.Any], given: Mapping[str, typing.Any]) -> dict:
        """The converted options of a spec: {key: value}."""
        keys = self.keys(spec.kind, given)
        parameters = inspect.signature(build).parameters.values()
        rest = next((p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD), None)
        options: dict[str, typing.Any] = {}
        for key, value in spec.options.items():
            if key in keys:
                options[key] = convert(value, keys[key], f"{spec.kind} {key}=")
            elif rest:
                options[key] = value if rest.annotation is str else literal(value)
            else:
                known = ", ".join(keys) or "none"
                hint = did_you_mean(key, keys)
                raise UserError(f"{self.family} {spec.kind!r} has no key {key!r}{hint or '.'} Known: {known}")
        missing = [name for name, p in keys.items() if p.default is inspect.Parameter.empty and name not in options]
        if missing:
            raise UserError(f"{self.family} {spec.kind!r} needs {missing[0]}=")
        return options


def _positional_parameters(build: Callable[..., typing.Any]) -> list[inspect.Parameter]:
    """The positional-only parameters; the first one takes the argument of a spec."""
    parameters = inspect.signature(build).parameters.values()
    return [p for p in parameters if p.kind is inspect.Parameter.POSITIONAL_ONLY]


def _is_path(parameter: inspect.Parameter) -> bool:
    return Path in (parameter.annotation, *typing.get_args(parameter.annotation))


def _absolute(path: str) -> str:
    return path if path.lower() == "none" else str(Path(path).expanduser().absolute())


def literal(text: str) -> typing.Any:
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


def convert(text: str, parameter: inspect.Parameter, where: str) -> typing.Any:
    """Convert text to the annotated type of a parameter.

    Supported are bool, int, float, Path, str, Literal, tuples (written `a+b`) and unions of these, `None` included.
    where: the place of the text, with which an error begins. Raises UserError if no type fits.
    """
    annotation = parameter.annotation
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    options = typing.get_args(annotation) if is_union else (annotation,)
    if type(None) in options and text.lower() == "none":
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


def _convert_to(text: str, wanted: typing.Any) -> typing.Any:
    """Convert text to one type. Raises ValueError that says which values are allowed."""
    if typing.get_origin(wanted) is tuple:
        inner = typing.get_args(wanted)[0]
        return tuple(_convert_to(part, inner) for part in text.split("+") if part)
    if typing.get_origin(wanted) is typing.Literal:
        if text not in typing.get_args(wanted):
            raise ValueError(f"must be one of {', '.join(map(str, typing.get_args(wanted)))}")
        return text
    if wanted is bool:
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise ValueError("must be true or false")
        return text.lower() in ("true", "1", "yes")
    if wanted in (int, float):
        try:
            return wanted(text)
        except ValueError:
            raise ValueError("must be a whole number" if wanted is int else "must be a number") from None
    if wanted is Path:
        return Path(text).expanduser()
    return text
