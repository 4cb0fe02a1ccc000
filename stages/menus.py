"""`compress models|methods|protocols`: what can be named."""

from dataclasses import dataclass
from typing import Any

from compress_ssl.pipeline.runtime.config import flag

GIVEN = ("context",)  # what the training loop hands to a method, not the user


@dataclass(frozen=True)
class Models:
    """What can be named as --teacher, --student or --model."""

    search: str = flag("", "only names that hold this text (timm's and torchvision's models are searched too)")


@dataclass(frozen=True)
class Methods:
    """What can be named as --method, with every key and its default."""


@dataclass(frozen=True)
class Protocols:
    """What can be named as --protocol, with every key and its default."""


def run(config: Models | Methods | Protocols) -> dict[str, Any]:
    """The menu as text and as {kind: {"summary", "keys"}}."""
    if isinstance(config, Methods):
        from compress_ssl.pipeline.methods import METHODS as menu
    elif isinstance(config, Protocols):
        from compress_ssl.pipeline.evaluators import PROTOCOLS as menu
    else:
        from compress_ssl.pipeline.models import MODELS as menu

        if config.search:
            return found(config.search)
    kinds, lines = {}, []
    for kind in menu.entries:
        keys = {
            name: "..." if p.default is p.empty else str(p.default) for name, p in menu.keys(kind, given=GIVEN).items()
        }
        kinds[kind] = {"summary": menu.summary(kind), "keys": keys}
        lines.append(f"{kind}  {kinds[kind]['summary']}")
        lines += [f"    {name}={default}" for name, default in keys.items()]
    return {"summary": "\n".join(lines), "menu": kinds}


def found(text: str) -> dict[str, Any]:
    """Names of timm's and torchvision's models that hold this text, as specs."""
    from compress_ssl.pipeline.models import names

    fitting = [name for name in names() if text.lower() in name.lower()]
    said = "\n".join(fitting) or f"no model of timm or torchvision has {text!r} in its name"
    return {"summary": said, "names": fitting}
