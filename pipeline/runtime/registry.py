"""Registries: objects that a user names by a spec "kind:argument,key=value", for example "timm:resnet18".

A registry is a table of "module:object" strings. A module is imported only when a spec names it, so a missing
optional package is an error only for the specs that need it. Errors suggest the nearest known name.

Two ways lead to objects that are not in the table. `python:FILE.py:NAME` and `python:MODULE:NAME` name a function or
class by its place, and an installed package adds kinds by entry points. Both are handled here for every family. A
family says only what it makes of such an object: the entry `python` of its table is a function (UserObject) -> the
function or class that builds a member, which is then treated like any other.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.formatting import shorten
from compress_ssl.pipeline.runtime.signatures import (
    any_key,
    convert,
    is_path,
    is_required,
    literal,
    positional_parameters,
    signature_of,
)
from compress_ssl.pipeline.runtime.spec import Spec, did_you_mean, parse
from compress_ssl.pipeline.runtime.storage import local_path

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from compress_ssl.pipeline.runtime.user_object import UserObject

Built_co = TypeVar("Built_co", covariant=True)

MAX_SHOWN = 80  # characters of an unknown kind that an error repeats

PYTHON = "python"
"""The kind of a spec that names a function or class by its place."""

_KIND = re.compile(r"[A-Za-z_][\w.+-]*")  # what the name of a kind looks like; a path with a / is none


@dataclass(frozen=True)
class Member:
    """What a spec names.

    name: in messages. build: the function or class whose signature defines the spec, see `Registry`. argument: of the
    spec; "" after the place of `python:`, which was used up. user: the object behind it if it is not ours.
    """

    name: str
    build: Callable[..., Any]  # each member has parameters of its own
    argument: str = ""
    user: "UserObject | None" = None

    @cached_property
    def signature(self) -> inspect.Signature:
        return signature_of(self.build)

    def keys(self, given: Iterable[str] = ()) -> dict[str, inspect.Parameter]:
        """The keys a spec of this member may have: {key: parameter}, without those in `given`."""
        keyword_only, either = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
        kinds = [keyword_only, either] if self.user else [keyword_only]  # users need not know the rule of ours
        return {name: p for name, p in self.signature.parameters.items() if p.kind in kinds and name not in given}


class Registry(Generic[Built_co]):
    """A family of objects that specs name: models, data sets, methods and so on.

    family: what error messages call a member. entries: {kind: "module:object"}. path_means: the kind of a spec that
    is only a path of an existing file or folder. packages: the group of entry points in which installed packages name
    further kinds; "" for a family without.

    Each object is a function or class whose signature defines the spec. Its positional-only parameter takes the
    argument. Its keyword-only parameters are the keys, except those that the caller of `build` passes in `given`.
    With `**options` any other key is allowed, and its value is converted by `literal`; with `**options: str` the
    value stays text. All other values are converted to the parameter's annotated type.
    """

    def __init__(self, family: str, entries: Mapping[str, str], path_means: str | None = None, packages: str = ""):
        self.family = family
        self.entries = dict(entries)
        self.path_means = path_means
        self.group = packages

    # ---------------------------------------------------------------- what there is

    @cached_property
    def _entry_points(self) -> "dict[str, list[EntryPoint]]":
        """{name: entry points of that name} of the installed packages; reading them takes milliseconds."""
        from importlib.metadata import entry_points

        found: dict[str, list[EntryPoint]] = {}
        for entry in sorted(entry_points(group=self.group) if self.group else (), key=lambda entry: entry.name):
            found.setdefault(entry.name, []).append(entry)
        return found

    @cached_property
    def packages(self) -> "dict[str, EntryPoint]":
        """{kind: entry point} of the kinds that installed packages add."""
        return {name: entries[0] for name, entries in self._entry_points.items() if not self._problem(name)}

    def problems(self) -> list[str]:
        """Sentences about the entry points that cannot be used because of their names."""
        return [problem for name in self._entry_points if (problem := self._problem(name))]

    def _problem(self, name: str) -> str:
        """Why the entry points of a name cannot be used, or ""."""
        from compress_ssl.pipeline.runtime.user_object import package_of

        packages = " and ".join(package_of(entry) for entry in self._entry_points.get(name, ()))
        if not packages:
            return ""
        if name in self.entries:
            return f"{self.family} {name!r} is the built-in one, not that of the package {packages} of the same name"
        if len(self._entry_points[name]) > 1:
            return f"{self.family} {name!r} is in several packages: {packages}; uninstall all but one of them"
        return "" if _KIND.fullmatch(name) else f"{self.family} {name!r} of {packages} has no name that a spec can have"

    def package(self, kind: str) -> str:
        """Name and version of the package that adds a kind."""
        from compress_ssl.pipeline.runtime.user_object import package_of

        return package_of(self.packages[kind])

    def kinds(self) -> list[str]:
        """The built-in kinds, then those of packages."""
        return [*self.entries, *self.packages]

    def summary(self, kind: str) -> str:
        """The first line of the docstring of a kind's object."""
        member = None if kind == PYTHON else self.member(Spec(kind))
        described = member.user.target if member and member.user else self.resolve(kind)
        return (inspect.getdoc(described) or "").partition("\n")[0]

    def keys(self, kind: str, given: Iterable[str] = ()) -> dict[str, inspect.Parameter]:
        """The keys a spec of this kind may have: {key: parameter}; for `python` those besides the object's own."""
        if kind != PYTHON:
            return self.member(Spec(kind)).keys(given)
        from compress_ssl.pipeline.runtime.user_object import UserObject

        try:
            return Member(PYTHON, self.resolve(PYTHON)(UserObject(PYTHON, dict, (PYTHON,)))).keys(given)
        except UserError:  # a family whose members are classes of one base, and have no keys but their own
            return {}

    # ---------------------------------------------------------------- from a spec to its object

    def parse(self, text: str) -> Spec:
        """Parse a spec and check its kind. An existing path alone becomes a spec of the kind `path_means`.

        Raises UserError for an unknown kind; the text lists the known kinds and suggests the nearest.
        """
        spec = parse(text)
        if spec.kind in self.entries:
            return spec
        if _KIND.fullmatch(spec.kind) and spec.kind in self.packages:
            return spec
        if self.path_means and (local_path(text).exists() or text.startswith((".", "/", "~"))):
            return Spec(self.path_means, text)
        problem = self._problem(spec.kind)
        if problem:
            raise UserError(problem)
        hint = did_you_mean(spec.kind, self.kinds()) or "."
        path = ", and there is no file or folder of that name" if self.path_means and text == spec.kind else ""
        kind = shorten(repr(spec.kind), MAX_SHOWN)
        raise UserError(f"unknown {self.family} {kind}{path}{hint} Known: {', '.join(self.kinds())}")

    def resolve(self, kind: str) -> Callable[..., Any]:  # its result is a Built_co, or a builder of one for `python`
        """Import the object of a kind of the table. Raises UserError if an optional package is not installed."""
        module, _, name = self.entries[kind].partition(":")
        try:
            found: Callable[..., Any] = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as missing:
            if missing.name and missing.name.split(".")[0] == "compress_ssl":
                raise
            raise UserError(
                f"{self.family} {kind!r} needs the package {missing.name!r}, which is not installed; "
                f"pip install {str(missing.name).replace('_', '-')}"
            ) from missing
        return found

    def member(self, spec: Spec) -> Member:
        """What a spec names; imports it. Raises UserError if it cannot be imported, or is not of this family."""
        if spec.kind == PYTHON and PYTHON in self.entries:
            from compress_ssl.pipeline.runtime.user_object import from_place

            if not spec.argument:
                raise UserError(f"{self.family} 'python' needs an argument: python:MODULE:NAME or python:FILE.py:NAME")
            user = from_place(spec.argument)
            return Member(user.name, self.resolve(PYTHON)(user), "", user)
        if spec.kind in self.entries:
            return Member(f"{self.family} {spec.kind!r}", self.resolve(spec.kind), spec.argument)
        from compress_ssl.pipeline.runtime.user_object import from_entry_point

        user = from_entry_point(self.packages[spec.kind], self.family)
        return Member(user.name, self.resolve(PYTHON)(user), spec.argument, user)

    def build(self, text: str | Spec, **given: object) -> Built_co:
        """Build the object that a spec names. `given` are arguments from the caller, not from the user.

        Raises UserError for an unknown kind or key, a missing argument or key, and a value of the wrong type.
        """
        spec = self.parse(text) if isinstance(text, str) else text
        member = self.member(spec)
        argument, options = _argument(member, spec.kind), _options(member, spec, given)
        from compress_ssl.pipeline.runtime.user_object import describing_errors

        with describing_errors(member.name) if member.user else nullcontext():
            built: Built_co = member.build(*argument, **options, **given)
        return built

    def check(self, text: str | Spec, given: Iterable[str] = ()) -> Spec:
        """Parse a spec and check it as `build` does, without building the object."""
        spec = self.parse(text) if isinstance(text, str) else text
        member = self.member(spec)
        _argument(member, spec.kind)
        _options(member, spec, given)
        return spec

    def locate(self, text: str) -> Spec:
        """The spec with absolute paths, to compare it with another; as it is if what it names cannot be imported."""
        try:
            return parse(self.absolute_spec(text))
        except UserError:
            return parse(text)

    def absolute_spec(self, text: str) -> str:
        """The spec with absolute paths, so that it names the same object from any working directory."""
        spec = self.parse(text)
        member = self.member(spec)
        positional, argument = positional_parameters(member.signature), spec.argument
        if spec.kind == PYTHON:
            is_file = argument.rpartition(":")[0].endswith(".py")
        else:
            is_file = bool(argument and positional and is_path(positional[0]))
        argument = _absolute(argument) if is_file else argument
        keys = member.keys()
        options = {k: _absolute(v) if k in keys and is_path(keys[k]) else v for k, v in spec.options.items()}
        return str(Spec(spec.kind, argument, options))


# ---------------------------------------------------------------- the parts of a spec, checked and converted


def _argument(member: Member, kind: str) -> list[object]:
    """The converted argument of a spec as a list of one, or [] if the spec has none."""
    positional, argument = positional_parameters(member.signature), member.argument
    if argument and not positional:
        raise UserError(f"{member.name} takes no argument, but {argument!r} was given")
    if not argument:
        if positional and is_required(positional[0]):
            raise UserError(f"{member.name} needs an argument: {kind}:{positional[0].name.upper()}")
        return []
    return [convert(argument, positional[0], f"{kind}:")]


def _options(member: Member, spec: Spec, given: Iterable[str]) -> dict[str, object]:
    """The converted options of a spec: {key: value}."""
    keys, rest = member.keys(given), any_key(member.signature)
    where = member.name if member.user else spec.kind
    options: dict[str, object] = {}
    for key, value in spec.options.items():
        if key in keys:
            options[key] = convert(value, keys[key], f"{where} {key}=")
        elif rest:
            options[key] = value if rest.annotation is str else literal(value)
        else:
            hint = did_you_mean(key, keys) or "."
            raise UserError(f"{member.name} has no key {key!r}{hint} {_describe_keys(member, keys)}")
    missing = [name for name, p in keys.items() if is_required(p) and name not in options]
    if missing:
        raise UserError(f"{member.name} needs {missing[0]}=")
    return options


def _describe_keys(member: Member, keys: Iterable[str]) -> str:
    """`Known: watts, bright`; the keys that a family adds to those of a user's own factory come last."""
    own = set(member.user.signature.parameters) if member.user else set(keys)
    of_user, of_family = [key for key in keys if key in own], [key for key in keys if key not in own]
    if not of_family:
        return f"Known: {', '.join(of_user) or 'none'}"
    return f"Keys of the factory: {', '.join(of_user) or 'none'}. Further keys: {', '.join(of_family)}"


def _absolute(path: str) -> str:
    """The absolute path, without `..`, so that two ways to write it from two folders are the same text."""
    if path.lower() == "none":
        return path
    absolute = local_path(path).absolute()
    return str(absolute.resolve() if ".." in absolute.parts else absolute)
