"""What a user can name: "kind:argument,key=value" -> an object, with did-you-mean errors.

A menu is a table of "module:object" strings. It imports nothing until somebody orders, so a
missing optional package hurts only who asks for it.
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

from compress_ssl.pipeline.runtime.artifact import UserError

_NEXT_KEY = re.compile(r",(?=[A-Za-z_][\w-]*=)")


@dataclass(frozen=True)
class Spec:
    """One order: `timm:resnet18,pretrained=true` is kind timm, argument resnet18, one option."""

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
    """Split a spec. The argument may hold commas and colons; options begin at the first `,key=`."""
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
    """`; did you mean 'seed'?` or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


class Registry:
    """One family of things that can be named.

    Each entry is a function or class: its positional-only parameter takes the argument, its
    keyword-only parameters are the keys a user may give (`**options`: any key, `**options: str`
    as it was written), and what the caller of `order` passes in `given` is not for users. Values
    become what the annotation says.
    """

    def __init__(self, family: str, entries: Mapping[str, str], path_means: str | None = None):
        self.family = family
        self.entries = dict(entries)
        self.path_means = path_means

    def parse(self, text: str) -> Spec:
        """The spec with a known kind. An existing path alone means the kind `path_means`.

        Raises UserError for an unknown kind, with the known ones and the nearest.
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
        """The object behind an entry. Raises UserError if an optional package is missing."""
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
        """First line of the entry's docstring."""
        return (inspect.getdoc(self.resolve(kind)) or "").partition("\n")[0]

    def keys(self, kind: str, given: typing.Iterable[str] = ()) -> dict[str, inspect.Parameter]:
        """The options a user may give to a kind."""
        parameters = inspect.signature(self.resolve(kind)).parameters
        return {
            name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY and name not in given
        }

    def build(self, text: str | Spec, **given: typing.Any) -> typing.Any:
        """Build what the spec names. Raises UserError for unknown kinds, keys and bad values."""
        spec = self.parse(text) if isinstance(text, str) else text
        build = self.resolve(spec.kind)
        return build(*self._argument(spec, build), **self._options(spec, build, given), **given)

    def check(self, text: str | Spec, given: typing.Iterable[str] = ()) -> Spec:
        """Parse and check kind, keys and values without building anything."""
        spec = self.parse(text) if isinstance(text, str) else text
        build = self.resolve(spec.kind)
        self._argument(spec, build)
        self._options(spec, build, dict.fromkeys(given))
        return spec

    def absolute_spec(self, text: str) -> str:
        """The spec with absolute paths, so that it means the same in any working directory."""
        spec = self.parse(text)
        build = self.resolve(spec.kind)
        takes, argument = _takes(build), spec.argument
        if argument and (_is_path(takes[0]) or ".py:" in argument):
            argument = _absolute(argument)
        keys = self.keys(spec.kind)
        options = {k: _absolute(v) if k in keys and _is_path(keys[k]) else v for k, v in spec.options.items()}
        return str(Spec(spec.kind, argument, options))

    def _argument(self, spec: Spec, build: Callable[..., typing.Any]) -> list[typing.Any]:
        takes = _takes(build)
        if spec.argument and not takes:
            raise UserError(f"{self.family} {spec.kind!r} takes no argument, but {spec.argument!r} was given")
        if not spec.argument:
            if takes and takes[0].default is inspect.Parameter.empty:
                raise UserError(f"{self.family} {spec.kind!r} needs an argument: {spec.kind}:{takes[0].name.upper()}")
            return []
        return [convert(spec.argument, takes[0], f"{spec.kind}:")]

    def _options(self, spec: Spec, build: Callable[..., typing.Any], given: Mapping[str, typing.Any]) -> dict:
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


def _takes(build: Callable[..., typing.Any]) -> list[inspect.Parameter]:
    """The parameter that takes the argument of a spec, if there is one."""
    parameters = inspect.signature(build).parameters.values()
    return [p for p in parameters if p.kind is inspect.Parameter.POSITIONAL_ONLY]


def _is_path(parameter: inspect.Parameter) -> bool:
    return Path in (parameter.annotation, *typing.get_args(parameter.annotation))


def _absolute(path: str) -> str:
    return path if path.lower() == "none" else str(Path(path).expanduser().absolute())


def literal(text: str) -> typing.Any:
    """`0.1`, `3`, `true`, `none`, `a+b` as Python values; all else stays a string."""
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
    """Text to the parameter's annotated type: bool, int, float, Path, str, `a+b` tuples, `X | None`."""
    wanted = parameter.annotation
    options = typing.get_args(wanted) if typing.get_origin(wanted) in (typing.Union, types.UnionType) else (wanted,)
    if type(None) in options and text.lower() == "none":
        return None
    problem = ""
    for option in options:
        if option is type(None):
            continue
        try:
            return _as(text, option)
        except ValueError as wrong:
            problem = str(wrong)
    raise UserError(f"{where}{text}: {problem}")


def _as(text: str, wanted: typing.Any) -> typing.Any:
    if typing.get_origin(wanted) is tuple:
        inner = typing.get_args(wanted)[0]
        return tuple(_as(part, inner) for part in text.split("+") if part)
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
