"""The kind `python`: any importable function or class that returns an nn.Module."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from compress_ssl.pipeline.models.factory import ModelOptions, model_kind, safe_name
from compress_ssl.pipeline.models.network import Network
from compress_ssl.pipeline.runtime import old_names
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.import_object import describe_with_location, import_object
from compress_ssl.pipeline.runtime.registry import did_you_mean
from compress_ssl.pipeline.views.preprocessing import IMAGENET, Preprocessing


@model_kind(without=("pretrained",))
def model(options: ModelOptions, source: str, /, **keys: Any) -> Network:
    """python:MODULE:FACTORY or python:FILE.py:FACTORY, which returns an nn.Module. Further keys go to the factory."""
    factory = import_object(source)
    where, _, name = source.rpartition(":")
    _check_keys(factory, f"python:{source}", keys)
    try:
        module = factory(**keys)
    except Exception as error:  # the user's code may raise anything
        raise UserError(f"python:{source} failed: {describe_with_location(error)}") from error
    if not isinstance(module, nn.Module):
        raise UserError(f"python:{source} returned a {type(module).__name__}; it must return a torch.nn.Module")
    stem = Path(where).stem if where.endswith(".py") else old_names.recorded_name(where)
    return Network(module, safe_name("python", stem, name), _preprocessing(module, source, options), trained=True)


def _check_keys(factory: Callable[..., Any], name: str, keys: Mapping[str, Any]) -> None:
    """Raise UserError for keys that the factory does not accept, before it runs."""
    try:
        signature = inspect.signature(factory)
    except ValueError:  # some builtins have no signature: the call itself then reports a wrong key
        return
    try:
        signature.bind(**keys)
    except TypeError as error:
        known = [p.name for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        unknown = [key for key in keys if key not in known]
        hint = did_you_mean(unknown[0], [*known, *ModelOptions.__dataclass_fields__]) if unknown else ""
        raise UserError(f"{name}: {error}{hint or '.'} Keys of the factory: {', '.join(known) or 'none'}") from None


def _preprocessing(module: nn.Module, source: str, options: ModelOptions) -> Preprocessing:
    """The module's attribute `preprocessing`, completed by ImageNet's mean, std, interpolation and crop.

    The attribute is a mapping, or any object with the attributes of Preprocessing. Raises UserError for unknown
    names, and if neither it nor the user's options have a size.
    """
    own = getattr(module, "preprocessing", {})
    names = list(Preprocessing.__dataclass_fields__)
    given = own if isinstance(own, Mapping) else {name: getattr(own, name) for name in names if hasattr(own, name)}
    unknown = [key for key in given if key not in names]
    if unknown:
        hint = did_you_mean(unknown[0], names)
        raise UserError(
            f"python:{source}: its attribute preprocessing has an unknown key {unknown[0]!r}{hint or '.'} "
            f"Known: {', '.join(names)}"
        )
    if "size" not in given and options.size is None:
        raise UserError(
            f"the image size of python:{source} is unknown; add size=, --image-size or an attribute `preprocessing`"
        )
    return Preprocessing.of({**replace(IMAGENET, size=options.size or 0).record(), **given})
