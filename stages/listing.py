"""`compress models`, `compress methods` and `compress protocols`: list what a spec can name."""

from dataclasses import dataclass
from typing import Any

from compress_ssl.pipeline.runtime.config import flag

GIVEN = ("context",)
"""Parameters of a constructor that the program passes itself; they are not keys of a spec, so they are not listed."""


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


def run(config: Models | Methods | Protocols) -> dict[str, Any]:
    """List one registry. Returns {"summary": text, "menu": {kind: {"summary", "keys": {key: default}}}}.

    With a search text: {"summary": text, "names": the matching specs}.
    """
    if isinstance(config, Methods):
        from compress_ssl.pipeline.methods import METHODS as registry
    elif isinstance(config, Protocols):
        from compress_ssl.pipeline.evaluators import PROTOCOLS as registry
    else:
        from compress_ssl.pipeline.models import MODELS as registry

        if config.search:
            return search_models(config.search)
    kinds, lines = {}, []
    for kind in registry.entries:
        parameters = registry.keys(kind, given=GIVEN)
        keys = {name: "..." if p.default is p.empty else str(p.default) for name, p in parameters.items()}
        kinds[kind] = {"summary": registry.summary(kind), "keys": keys}
        lines.append(f"{kind}  {kinds[kind]['summary']}")
        lines += [f"    {name}={default}" for name, default in keys.items()]
    return {"summary": "\n".join(lines), "menu": kinds}


def search_models(text: str) -> dict[str, Any]:
    """{"summary", "names"}: specs of the models of timm and torchvision whose names contain this text."""
    from compress_ssl.pipeline.models import names

    matching = [name for name in names() if text.lower() in name.lower()]
    summary = "\n".join(matching) or f"no model of timm or torchvision has {text!r} in its name"
    return {"summary": summary, "names": matching}
