"""Import of a user's own function or class by `MODULE:NAME` or `FILE.py:NAME`, as in `python:` specs."""

import hashlib
import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from compress_ssl.pipeline.runtime import old_names
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.formatting import describe_exception
from compress_ssl.pipeline.runtime.spec import did_you_mean
from compress_ssl.pipeline.runtime.storage import local_path

PACKAGE = Path(__file__).parents[2]  # a checkout, in which users may have files of their own


def import_object(place: str) -> Callable[..., object]:
    """The function or class at `MODULE:NAME` or `FILE.py:NAME`; modules in the current folder are found too.

    Raises UserError if there is none, or if importing it fails.
    """
    where, _, name = place.rpartition(":")
    if not where or not name:
        raise UserError(f"python:{place} must be python:MODULE:NAME or python:FILE.py:NAME")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # at the end, so that a user's file shadows no installed package
    try:
        with old_names.importable():
            if where.endswith(".py"):
                module = import_file(local_path(where))
            else:
                module = importlib.import_module(old_names.translate(where))
    except UserError:
        raise
    except (Exception, SystemExit) as wrong:  # a script without `if __name__ == "__main__"` may call sys.exit
        raise UserError(f"python:{where} could not be imported: {describe_with_location(wrong)}") from wrong
    found: Callable[..., object] | None = getattr(module, name, None)
    if found is None or not callable(found):
        callables = [key for key, value in vars(module).items() if callable(value)]
        raise UserError(f"{where} has no function or class {name!r}{did_you_mean(name, callables)}")
    return found


def import_file(file: Path) -> ModuleType:
    """Execute a Python file as a module, or return the module if that file was executed before and is the same.

    Raises UserError if there is no such file.
    """
    if not file.is_file():
        raise UserError(f"python:{file} does not exist; give the path of a Python file or the name of a module")
    # Not the stem: a user's zarr.py must not replace the package zarr. No dot: pickle would import what is before it.
    name = "python:" + str(file.resolve()).replace("%", "%25").replace(".", "%2E")
    source = hashlib.blake2b(file.read_bytes()).digest()
    earlier = sys.modules.get(name)
    # A second module would have other classes: isinstance and pickle would not take an object of the first for one.
    if earlier and earlier.__spec__ and earlier.__spec__.loader_state == source:
        return earlier
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec and spec.loader  # a name that ends in .py always has a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look up classes by their module's name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    spec.loader_state = source
    return module


def passes_users_code(wrong: BaseException) -> bool:
    """Whether an exception came through code that is neither ours nor that of an installed package."""
    frames = traceback.extract_tb(wrong.__traceback__)
    return any(not frame.filename.startswith(_not_the_users()) for frame in frames)


def _not_the_users() -> tuple[str, ...]:
    """What the names of files begin with that are Python's own, of installed packages, or ours."""
    libraries = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    return (*libraries, *(str(PACKAGE / name) for name in ("pipeline", "stages", "cli.py")), "<")


def describe_with_location(wrong: BaseException) -> str:
    """The exception, and the user's file and line that raised it, or that called ours or a library which raised it.

    `KeyError: 'a' (mine.py, line 3)`. No place is given where no line of the user's was run: a module that does not
    exist, or a file that cannot be compiled, whose error names the line itself.
    """
    frames = traceback.extract_tb(wrong.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_not_the_users())]
    last = (own or frames)[-1]
    # A frozen module, this module, or the one that loads entry points.
    if last.filename.startswith("<") or Path(last.filename).parent == Path(__file__).parent:
        return describe_exception(wrong)
    return f"{describe_exception(wrong)} ({Path(last.filename).name}, line {last.lineno})"
