"""Translation of module names of the first version, which old manifests and users' own files still contain.

In the first version `pipeline`, `stages` and `cli` were top-level modules; now they are below `compress_ssl`, and many
modules have moved. A spec such as `python:pipeline.teachers.digits:Pixels` is translated when it is read, and a
user's own file may still contain `from pipeline.method import Method`. A user's own package of one of these names
takes precedence.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

from compress_ssl.pipeline.runtime.progress import echo

TOP = ("cli", "pipeline", "stages")  # top-level modules of the first version

_PLACES = {
    "runtime": (
        "errors process storage bucket:object_store artifact lease config menu:registry interrupt:signals "
        "progress imports:import_object wording:formatting device philox"
    ),
    "datasets": "images:decode decoded:image_cache",
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
    "evaluators": "results subject:scored_model scores:record",
    "report": "figures gallery:image_grids page:html report:evaluation comparison",
}
"""{package: modules of the first version's `pipeline` that it contains now}, as old:new if the name has changed."""

_NETWORKS = {"students": "cifar_resnet convnet", "teachers": "digits efficientnet_lite"}
"""{folder of the first version: its modules}, which are in `models.networks` now."""


def _moved() -> dict[str, str]:
    """{old module: new module} of modules whose new name is not only the old one with `compress_ssl.` before it."""
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

_NEW_NAMES = {
    "artifact": (
        "UserError=runtime.errors:UserError canonical=runtime.digests:canonical "
        "fingerprint=runtime.digests:fingerprint digest=runtime.digests:digest"
    ),
    "bank": (
        "single=models.precision:at_least_float32 unit=models.precision:l2_normalize "
        "MemoryBank=methods.version1:MemoryBank"
    ),
    "heads": (
        "HEADS=store.teacher_heads:HEADS_FILE files=store.teacher_heads:head_files "
        "beside=store.teacher_heads:load_heads groups=group_by_head Projection=ProjectionHead "
        "classifier=frozen_classifier"
    ),
    "labelhead": "LabelHead=LinearHead spell=to_bytes choose=choose_labelled STEEP=MIN_DEVIATION",
    "menu": (
        "Menu=Registry Spec=runtime.spec:Spec parse=runtime.spec:parse nearest=runtime.spec:did_you_mean "
        "literal=runtime.signatures:literal convert=runtime.signatures:convert"
    ),
    "method": (
        "Setting=MethodContext target_of=choose_target store_rows=initial_rows require=require_positive "
        "require_shares=require_fractions Method=methods.version1:Method"
    ),
    "methods.compress": (
        "TwoQueues=methods.version1:TwoQueues TwoQueuesMomentum=methods.version1:TwoQueuesMomentum "
        "OneQueue=methods.version1:OneQueue"
    ),
    "methods.crd": "Crd=methods.version1:Crd",
    "methods.dogo": "Dogo=methods.version1:Dogo DogoFrozen=methods.version1:DogoFrozen",
    "methods.esvit": "EsVit=methods.version1:EsVit",
    "methods.regression": "Regression=methods.version1:Regression",
    "methods.seed": "Seed=methods.version1:Seed",
    "methods.simclr_v2": "SimClrV2=methods.version1:SimClrV2",
    "model": (
        "one_line=runtime.formatting:describe_exception Preprocessing=views.preprocessing:Preprocessing "
        "IMAGENET=views.preprocessing:IMAGENET Interpolation=views.preprocessing:Interpolation "
        "Options=models.factory:ModelOptions entry=models.factory:model_kind "
        "unbuilt=models.factory:build_error safe_name=models.factory:safe_name digest=state_digest "
        "pooled=pool_output"
    ),
    "philox": "FRESH=views.groups:FRESH LOCAL=views.groups:LOCAL view_name=views.groups:view_name",
    "progress": (
        "duration=runtime.formatting:format_duration size=runtime.formatting:format_bytes Meter=ProgressBar "
        "meter=progress_bar say=echo EVERY=LINE_INTERVAL"
    ),
    "ranks": (
        "size=world_size averaged=wrap_ddp synchronised=convert_sync_batchnorm mean=all_reduce_mean "
        "largest=all_reduce_max told=broadcast in_turn=rank_zero_first together=process_group "
        "attempt=agree_on_attempt device=rank_device Stop=SharedStopRequest PATIENCE=TIMEOUT"
    ),
    "similarity": "FAINT=EXP_FLOOR MILD=MIN_TEMPERATURE_WITHOUT_MAX",
    "weights": (
        "Dialect=models.selection:CheckpointFormat Choice=models.selection:Selection Fit=models.selection:Fit "
        "spell=to_bytes"
    ),
}
"""{old module of `pipeline`: changed names that a user's own method or model may import}, as old=new, or as
old=module:new if the object is in another module now."""


def _renamed() -> dict[str, dict[str, str]]:
    """{old module: {old name: new name, or module:name}}"""
    new: dict[str, dict[str, str]] = {}
    for module, pairs in _NEW_NAMES.items():
        table = dict(pair.split("=") for pair in pairs.split())
        places = {old: f"compress_ssl.pipeline.{place}" if ":" in place else place for old, place in table.items()}
        new[f"pipeline.{module}"] = places
    return new


RENAMED: Mapping[str, Mapping[str, str]] = _renamed()

HOME = Path(__file__).resolve().parents[2]
"""The folder of the package `compress_ssl`.

If it is the working directory, Python finds our own files by their old names; they do not count as the user's own.
"""


def new_name(module: str) -> str | None:
    """The new dotted name of a module of the first version; None if the first version had no such module."""
    if module.partition(".")[0] not in TOP:
        return None
    name = MOVED.get(module, f"compress_ssl.{module}")
    try:
        return name if importlib.util.find_spec(name) else None
    except ModuleNotFoundError:
        return None


def recorded_name(module: str) -> str:
    """The first version's name of a module, or the module itself if it never had another name.

    Manifests hold names made of it. They stay as they are, whichever of the two names a command is given.
    """
    return next((old for old, new in MOVED.items() if new == module), module)


def translate(module: str) -> str:
    """The module to import for a name in a spec: the user's own if it exists, else the new name of an old one."""
    name = new_name(module)
    if name is None or _users_own(module):
        return module
    _warn(module, name)
    return name


def _users_own(module: str) -> bool:
    """Whether Python finds a module of this name that is not one of ours. Checking imports the parent package."""
    top = module.partition(".")[0]
    found = importlib.machinery.PathFinder.find_spec(top)
    places = [found.origin] if found and found.origin else list((found and found.submodule_search_locations) or [])
    ours = {HOME / "cli.py", HOME / "pipeline" / "__init__.py", HOME / "stages" / "__init__.py"}
    if all(Path(place).resolve() in ours for place in places):  # also if nothing was found
        return False
    try:
        return module == top or importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@cache
def _warn(old: str, new: str) -> None:
    """Print the new name of a module, once in a process."""
    echo(f"warning: the module {old} is called {new} now; the old name still works here")


@contextmanager
def importable() -> Iterator[None]:
    """Allow imports by old names in the block: `import pipeline.method` gives the module of the new name.

    A top-level name that the user has a module for is left alone.
    """
    finder = _Finder([top for top in TOP if not _users_own(top)])
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in finder.made:
            sys.modules.pop(name, None)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules by their old names and loads a `_Moved` for each; `made` lists the names loaded so far."""

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
    """A module under its old name; its attributes are looked up in the module of the new name."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        module, _, renamed = RENAMED.get(self.__name__, {}).get(name, name).rpartition(":")
        return getattr(importlib.import_module(module or str(new_name(self.__name__))), renamed)
