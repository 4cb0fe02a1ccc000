"""Module names of the first version, which manifests and users' own files still hold.

Then `pipeline`, `stages` and `cli` were top-level names; now all is below `compress_ssl`, and much has moved. A spec
such as `python:pipeline.teachers.digits:Pixels` is translated where it is read, and a user's own file may still say
`from pipeline.method import Method`. A user's own package of one of these names always wins.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from compress_ssl.pipeline.runtime.progress import say

TOP = ("cli", "pipeline", "stages")

_PLACES = {
    "runtime": (
        "errors process storage bucket:object_store artifact lease config menu:registry interrupt:signals "
        "progress imports:import_object wording:formatting device philox"
    ),
    "datasets": "images:decode decoded:image_cache",
    "views": "views:augment loader",
    "store": (
        "codecs grid:layout shelf:shards store:feature_store audit:integrity agreement:compatibility "
        "mirror:local_cache transfer:copy estimate originals:source_images pixels:render_probe"
    ),
    "models": "model:embedder weights heads labelhead:linear_head",
    "distributed": "ranks:collectives launch",
    "extraction": "embed workshop:worker scheduler:cluster codebook history:provenance validation:features",
    "methods": "method:base bank:memory_bank similarity",
    "training": (
        "pairs:sampler optimizers schedule apprentice:student lesson:learner session:run trainer checkpoint "
        "journal:metrics_log roster:run_folders"
    ),
    "search": "neighbors:exact",
    "evaluators": "results subject:scored_model",
    "report": "scores:metrics figures gallery:image_grids page:html report:evaluation comparison",
}
"""Package: the modules of the first version's `pipeline` that lie in it now, as old:new where the name changed too."""

_NETWORKS = {"students": "cifar_resnet convnet", "teachers": "digits efficientnet_lite"}
"""Folder of the first version: its modules, which lie in `models.networks` now."""


def _moved() -> dict[str, str]:
    """{old module: new module} of those that have another place than below `compress_ssl`."""
    new = {}
    for package, names in _PLACES.items():
        for name in names.split():
            old, _, renamed = name.partition(":")
            new[f"pipeline.{old}"] = f"compress_ssl.pipeline.{package}.{renamed or old}"
    for folder, names in _NETWORKS.items():
        new[f"pipeline.{folder}"] = "compress_ssl.pipeline.models.networks"
        for name in names.split():
            new[f"pipeline.{folder}.{name}"] = f"compress_ssl.pipeline.models.networks.{name}"
    return new


MOVED: Mapping[str, str] = _moved()

RENAMED: Mapping[str, Mapping[str, str]] = {
    "pipeline.bank": {
        "single": "compress_ssl.pipeline.models.precision:single",
        "unit": "compress_ssl.pipeline.models.precision:unit",
    },
    "pipeline.embed": {
        "PRECISIONS": "compress_ssl.pipeline.models.precision:PRECISIONS",
        "autocast": "compress_ssl.pipeline.models.precision:autocast",
    },
    "pipeline.launch": {
        "TOLD": "compress_ssl.pipeline.runtime.launch_env:TOLD",
        "started": "compress_ssl.pipeline.runtime.launch_env:started",
        "leads": "compress_ssl.pipeline.runtime.launch_env:leads",
        "local": "compress_ssl.pipeline.runtime.launch_env:local",
        "beside": "compress_ssl.pipeline.runtime.launch_env:beside",
    },
    "pipeline.model": {
        "one_line": "compress_ssl.pipeline.runtime.formatting:one_line",
        "Preprocessing": "compress_ssl.pipeline.views.preprocessing:Preprocessing",
        "IMAGENET": "compress_ssl.pipeline.views.preprocessing:IMAGENET",
        "Interpolation": "compress_ssl.pipeline.views.preprocessing:Interpolation",
        "Options": "compress_ssl.pipeline.models.factory:Options",
        "entry": "compress_ssl.pipeline.models.factory:entry",
        "unbuilt": "compress_ssl.pipeline.models.factory:unbuilt",
        "safe_name": "compress_ssl.pipeline.models.factory:safe_name",
    },
    "pipeline.neighbors": {
        "kmeans": "compress_ssl.pipeline.search.kmeans:kmeans",
        "assign": "compress_ssl.pipeline.search.kmeans:assign",
    },
    "pipeline.philox": {
        "FRESH": "compress_ssl.pipeline.views.numbering:FRESH",
        "LOCAL": "compress_ssl.pipeline.views.numbering:LOCAL",
        "view_name": "compress_ssl.pipeline.views.numbering:view_name",
    },
    "pipeline.progress": {
        "duration": "compress_ssl.pipeline.runtime.formatting:duration",
        "size": "compress_ssl.pipeline.runtime.formatting:size",
    },
    "pipeline.views": {
        "render": "compress_ssl.pipeline.views.render:render",
        "see": "compress_ssl.pipeline.views.render:see",
        "local_size": "compress_ssl.pipeline.views.render:local_size",
    },
}
"""Old module: {old name: new name, or module:name if it moved to another module}."""


HOME = Path(__file__).resolve().parents[2]
"""The folder that is `compress_ssl`: who stands in it can import our files by their old names, and must not."""


def new_name(module: str) -> str | None:
    """Where a module of the first version is now, as a dotted name; None if it never was one of ours."""
    if module.partition(".")[0] not in TOP:
        return None
    name = MOVED.get(module, f"compress_ssl.{module}")
    try:
        return name if importlib.util.find_spec(name) else None
    except ModuleNotFoundError:
        return None


def translate(module: str) -> str:
    """The module to import for a name in a spec: the user's own if there is one, else the new place of an old name."""
    name = new_name(module)
    if name is None or _users_own(module):
        return module
    _warn(module, name)
    return name


def _users_own(module: str) -> bool:
    """Whether a name leads to a module that is not ours. Importing its parent is part of finding out."""
    top = module.partition(".")[0]
    found = importlib.machinery.PathFinder.find_spec(top)
    places = [found.origin] if found and found.origin else list((found and found.submodule_search_locations) or [])
    if all(Path(place).resolve().is_relative_to(HOME) for place in places):  # or there is none
        return False
    try:
        return module == top or importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _warn(old: str, new: str) -> None:
    say(f"warning: the module {old} is called {new} now; the old name still works here")


@contextmanager
def importable() -> Iterator[None]:
    """While the block runs, `import pipeline.method` finds the module in its new place, unless the user has one."""
    finder = _Finder([top for top in TOP if not _users_own(top)])
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in finder.made:
            sys.modules.pop(name, None)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes a stand-in for a module of the first version, whose names are those of the module in its new place."""

    def __init__(self, tops: Sequence[str]):
        self.tops = tops
        self.made: list[str] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in self.tops or new_name(fullname) is None:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        self.made.append(spec.name)
        return _Moved(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        if "." in name:
            _warn(name, str(new_name(name)))


class _Moved(ModuleType):
    """A module under its old name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        module, _, renamed = RENAMED.get(self.__name__, {}).get(name, name).rpartition(":")
        return getattr(importlib.import_module(module or str(new_name(self.__name__))), renamed)
