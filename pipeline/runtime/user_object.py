"""Functions and classes that are not ours: from a user's file or module, or from an installed package."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from compress_ssl.pipeline.runtime import old_names
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.import_object import describe_with_location, import_object
from compress_ssl.pipeline.runtime.signatures import signature_of
from compress_ssl.pipeline.runtime.storage import local_path

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

Base = TypeVar("Base")


@dataclass(frozen=True)
class UserObject:
    """A function or class that a spec names by its place, or by the name of an entry point."""

    name: str  # in messages: python:mine.py:Cosine, or the kind and the package
    target: Callable[..., object]  # what it returns is known to nobody before it is called
    words: tuple[str, ...]  # parts of a name for files: ("python", "mine", "Cosine")
    file: Path | None = None  # of `python:FILE.py:NAME`: no module that a fresh process could import by a name

    @cached_property
    def signature(self) -> inspect.Signature:
        return signature_of(self.target)

    def __call__(self, *argument: object, **options: object) -> object:
        """Call the function or class. Raises UserError, with file and line, for every exception."""
        with describing_errors(self.name):
            return self.target(*argument, **options)

    def require_subclass(self, base: type[Base], because: str) -> type[Base]:
        """The target as a concrete subclass of `base`; raises UserError if it is none.

        because: what to do about an abstract class, a clause such as "write one that returns one loss per student".
        """
        if not (inspect.isclass(self.target) and issubclass(self.target, base)):
            raise UserError(
                f"{self.name} is no subclass of {base.__module__}.{base.__qualname__}; derive it from that class"
            )
        if inspect.isabstract(self.target):
            missing = min(name for name in dir(self.target) if is_abstract(getattr(self.target, name)))
            arguments = [name for name in signature_of(getattr(base, missing)).parameters if name != "self"]
            raise UserError(f"{self.name} has no {missing}({', '.join(arguments)}); {because}")
        return self.target


@contextmanager
def describing_errors(name: str) -> Iterator[None]:
    """Every exception in the block becomes a UserError: "NAME failed: KeyError: 'a' (mine.py, line 3)"."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as wrong:  # the code of others may raise anything, and may call sys.exit
        raise UserError(f"{name} failed: {describe_with_location(wrong)}") from wrong


def is_abstract(member: object) -> bool:
    return bool(getattr(member, "__isabstractmethod__", False))


def from_place(place: str) -> UserObject:
    """The object of `python:PLACE`. Raises UserError if it cannot be imported."""
    target = import_object(place)
    where, _, name = place.rpartition(":")
    file = local_path(where).absolute() if where.endswith(".py") else None
    stem = file.stem if file else old_names.recorded_name(where)
    return UserObject(f"python:{place}", target, ("python", stem, name), file)


def from_entry_point(entry: "EntryPoint", family: str) -> UserObject:
    """The object of a package's entry point. Raises UserError, with the package's name, if it cannot be imported."""
    package = package_of(entry)
    try:
        target = entry.load()
    except (Exception, SystemExit) as wrong:
        raise UserError(
            f"{family} {entry.name!r} is of the package {package}, which cannot be imported: "
            f"{describe_with_location(wrong)}; mend, upgrade or uninstall that package"
        ) from wrong
    if not callable(target):
        raise UserError(
            f"{family} {entry.name!r} of the package {package} is a {type(target).__name__}, not a function or class; "
            "upgrade or uninstall that package"
        )
    return UserObject(f"{family} {entry.name!r} of {package}", target, (entry.name,))


def package_of(entry: "EntryPoint") -> str:
    """`cosine-loss 1.2`: name and version of the package that has an entry point."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "without a name"
