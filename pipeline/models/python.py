"""Anything importable that returns an nn.Module."""

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from pipeline.artifact import UserError
from pipeline.menu import nearest
from pipeline.model import IMAGENET, Network, Options, Preprocessing, entry, one_line, safe_name


@entry(without=("pretrained",))
def model(asked: Options, source: str, /, **options: Any) -> Network:
    """python:MODULE:FACTORY or python:FILE.py:FACTORY, which returns an nn.Module. Further keys go to the factory."""
    where, _, name = source.rpartition(":")
    if not where or not name:
        raise UserError(f"python:{source} must be python:MODULE:FACTORY or python:FILE.py:FACTORY")
    factory = _factory(where, name)
    _check_keys(factory, f"python:{source}", options)
    try:
        module = factory(**options)
    except Exception as wrong:
        raise UserError(f"python:{source} failed: {_located(wrong)}") from wrong
    if not isinstance(module, nn.Module):
        raise UserError(f"python:{source} returned a {type(module).__name__}; it must return a torch.nn.Module")
    stem = Path(where).stem if where.endswith(".py") else where
    return Network(module, safe_name("python", stem, name), _preprocessing(module, source, asked), trained=True)


def _factory(where: str, name: str) -> Callable[..., Any]:
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # appended, so that nothing installed is shadowed
    try:
        module = _from_file(Path(where).expanduser()) if where.endswith(".py") else importlib.import_module(where)
    except UserError:
        raise
    except Exception as wrong:
        raise UserError(f"python:{where} could not be imported: {_located(wrong)}") from wrong
    factory = getattr(module, name, None)
    if not callable(factory):
        callables = [key for key, value in vars(module).items() if callable(value)]
        raise UserError(f"{where} has no function or class {name!r}{nearest(name, callables)}")
    return factory


def _from_file(file: Path) -> ModuleType:
    if not file.is_file():
        raise UserError(f"python:{file} does not exist; give the path of a Python file or the name of a module")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec and spec.loader  # a name that ends in .py always has a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(file.stem, module)  # where pickle looks for the classes of the file
    spec.loader.exec_module(module)
    return module


def _check_keys(factory: Callable[..., Any], name: str, options: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(factory)
    except ValueError:  # builtins have none: calling will tell
        return
    try:
        signature.bind(**options)
    except TypeError as wrong:
        known = [p.name for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        unknown = [key for key in options if key not in known]
        hint = nearest(unknown[0], [*known, *Options.__dataclass_fields__]) if unknown else ""
        raise UserError(f"{name}: {wrong}{hint or '.'} Keys of the factory: {', '.join(known) or 'none'}") from None


def _preprocessing(module: nn.Module, source: str, asked: Options) -> Preprocessing:
    """What the module's `preprocessing` says (a record, or anything with its attributes), else ImageNet's."""
    own = getattr(module, "preprocessing", {})
    names = list(Preprocessing.__dataclass_fields__)
    said = own if isinstance(own, Mapping) else {name: getattr(own, name) for name in names if hasattr(own, name)}
    if wrong := [key for key in said if key not in names]:
        raise UserError(f"python:{source}: preprocessing has {wrong[0]!r}{nearest(wrong[0], names)}")
    if "size" not in said and asked.size is None:
        raise UserError(f"python:{source} does not say its image size; add size=, --image-size or a `preprocessing`")
    return Preprocessing.of({**replace(IMAGENET, size=asked.size or 0).record(), **said})


def _located(wrong: BaseException) -> str:
    """The exception and the line of the user's code that raised it."""
    frames = traceback.extract_tb(wrong.__traceback__)
    return f"{one_line(wrong)} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"
