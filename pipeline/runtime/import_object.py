"""What a user names as MODULE:NAME or FILE.py:NAME -> the object."""

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from compress_ssl.pipeline.runtime import old_names
from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.registry import did_you_mean


def import_object(place: str) -> Any:
    """A callable from a module (the current folder counts too) or from a Python file.

    Raises UserError if there is none, or importing it fails.
    """
    where, _, name = place.rpartition(":")
    if not where or not name:
        raise UserError(f"python:{place} must be python:MODULE:NAME or python:FILE.py:NAME")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # appended, so that nothing installed is shadowed
    try:
        with old_names.importable():
            file = where.endswith(".py")
            module = (
                _from_file(Path(where).expanduser()) if file else importlib.import_module(old_names.translate(where))
            )
    except UserError:
        raise
    except (Exception, SystemExit) as wrong:  # a script without `if __name__ == "__main__"` may leave
        raise UserError(f"python:{where} could not be imported: {describe_with_location(wrong)}") from wrong
    found = getattr(module, name, None)
    if not callable(found):
        callables = [key for key, value in vars(module).items() if callable(value)]
        raise UserError(f"{where} has no function or class {name!r}{did_you_mean(name, callables)}")
    return found


def _from_file(file: Path) -> ModuleType:
    if not file.is_file():
        raise UserError(f"python:{file} does not exist; give the path of a Python file or the name of a module")
    name = f"python:{file.resolve()}"  # not the stem: a user's zarr.py must not become everybody's zarr
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec and spec.loader  # a name that ends in .py always has a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and pickle look for the classes of the file
    spec.loader.exec_module(module)
    return module


def describe_with_location(wrong: BaseException) -> str:
    """The exception and the line of the user's code that raised it."""
    frames = traceback.extract_tb(wrong.__traceback__)
    text = " ".join(str(wrong).split())[:200]
    said = f"{type(wrong).__name__}: {text}" if text else type(wrong).__name__
    return f"{said} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"
