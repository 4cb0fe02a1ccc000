"""Anything importable that returns an nn.Module."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from compress_ssl.pipeline.models.embedder import Network
from compress_ssl.pipeline.models.factory import ModelOptions, model_kind, safe_name
from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.import_object import describe_with_location, import_object
from compress_ssl.pipeline.runtime.registry import did_you_mean
from compress_ssl.pipeline.views.preprocessing import IMAGENET, Preprocessing


@model_kind(without=("pretrained",))
def model(asked: ModelOptions, source: str, /, **options: Any) -> Network:
    """python:MODULE:FACTORY or python:FILE.py:FACTORY, which returns an nn.Module. Further keys go to the factory."""
    factory = import_object(source)
    where, _, name = source.rpartition(":")
    _check_keys(factory, f"python:{source}", options)
    try:
        module = factory(**options)
    except Exception as wrong:
        raise UserError(f"python:{source} failed: {describe_with_location(wrong)}") from wrong
    if not isinstance(module, nn.Module):
        raise UserError(f"python:{source} returned a {type(module).__name__}; it must return a torch.nn.Module")
    stem = Path(where).stem if where.endswith(".py") else where
    return Network(module, safe_name("python", stem, name), _preprocessing(module, source, asked), trained=True)


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
        hint = did_you_mean(unknown[0], [*known, *ModelOptions.__dataclass_fields__]) if unknown else ""
        raise UserError(f"{name}: {wrong}{hint or '.'} Keys of the factory: {', '.join(known) or 'none'}") from None


def _preprocessing(module: nn.Module, source: str, asked: ModelOptions) -> Preprocessing:
    """What the module's `preprocessing` says (a record, or anything with its attributes), else ImageNet's."""
    own = getattr(module, "preprocessing", {})
    names = list(Preprocessing.__dataclass_fields__)
    said = own if isinstance(own, Mapping) else {name: getattr(own, name) for name in names if hasattr(own, name)}
    if wrong := [key for key in said if key not in names]:
        raise UserError(f"python:{source}: preprocessing has {wrong[0]!r}{did_you_mean(wrong[0], names)}")
    if "size" not in said and asked.size is None:
        raise UserError(f"python:{source} does not say its image size; add size=, --image-size or a `preprocessing`")
    return Preprocessing.of({**replace(IMAGENET, size=asked.size or 0).record(), **said})
