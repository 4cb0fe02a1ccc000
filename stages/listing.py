"""`compress datasets`, `models`, `methods` and `protocols`: list what a spec can name."""

from dataclasses import dataclass

from compress_ssl.pipeline.runtime.config import CommandResult, flag
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.options import option_text, to_option
from compress_ssl.pipeline.runtime.records import JsonObject, UnsetType
from compress_ssl.pipeline.runtime.registry import Registry

GIVEN = ("context",)
"""Parameters of a constructor that the program passes itself; they are not keys of a spec, so they are not listed."""


@dataclass(frozen=True)
class Datasets:
    """List what can be given as --data, --train or --val."""


@dataclass(frozen=True)
class Models:
    """List what can be given as --teacher, --student or --model."""

    search: str = flag(
        "", "List only the model names of timm and torchvision that contain this text. Default: list the kinds."
    )


@dataclass(frozen=True)
class Methods:
    """List what can be given as --method, with every key and its default."""


@dataclass(frozen=True)
class Protocols:
    """List what can be given as --protocol, with every key and its default."""


def run(config: Datasets | Models | Methods | Protocols) -> CommandResult:
    """List one registry: {"summary": text, "menu": {kind: {"summary", "keys": {key: default}}}, "problems"}.

    A kind of an installed package also has "package". With a search text: {"summary", "names": the matching specs}.
    """
    if isinstance(config, Models) and config.search:
        return search_models(config.search)
    registry = find_registry(config)
    menu = {kind: describe(registry, kind) for kind in registry.kinds()}
    lines = []
    for kind, entry in menu.items():
        package = f"  [{entry['package']}]" if "package" in entry else ""
        lines.append(f"{kind}{package}  {entry['summary']}")
        lines += [f"    {name}={default}" for name, default in entry["keys"].items()]
    problems = registry.problems()
    return {"summary": "\n".join([*lines, *problems]), "menu": menu, "problems": problems}


def find_registry(config: Datasets | Models | Methods | Protocols) -> Registry[object]:
    """The registry that a command lists. It is imported here, so that the others are not."""
    if isinstance(config, Datasets):
        from compress_ssl.pipeline.datasets import DATASETS

        return DATASETS
    if isinstance(config, Methods):
        from compress_ssl.pipeline.methods import METHODS

        return METHODS
    if isinstance(config, Protocols):
        from compress_ssl.pipeline.evaluators import PROTOCOLS

        return PROTOCOLS
    from compress_ssl.pipeline.models import MODELS

    return MODELS


def describe(registry: Registry[object], kind: str) -> JsonObject:
    """{"summary", "keys"} of a kind, and "package" if it is of one; a kind that cannot be imported says so instead."""
    of = {"package": registry.package(kind)} if kind in registry.packages else {}
    try:
        keys = registry.keys(kind, given=GIVEN).items()
        defaults = {name: "..." if p.default is p.empty else typed_default(p.default) for name, p in keys}
        return {"summary": registry.summary(kind), "keys": defaults, **of}
    except UserError as problem:
        return {"summary": f"cannot be used: {problem}", "keys": {}, **of}


def search_models(text: str) -> CommandResult:
    """{"summary", "names"}: specs of the models of timm and torchvision whose names contain this text."""
    from compress_ssl.pipeline.models import names

    matching = [name for name in names() if text.lower() in name.lower()]
    summary = "\n".join(matching) or f"no model of timm or torchvision has {text!r} in its name"
    return {"summary": summary, "names": matching}


def typed_default(default: object) -> str:
    """A default as it would be typed in a spec: `false`, `16+32+64`, `none`."""
    option = to_option(default)
    return str(default) if isinstance(option, UnsetType) else option_text(option)
