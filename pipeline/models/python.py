"""A model that is not ours: any importable function or class that returns an nn.Module, or one of a package."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.models.factory import ModelOptions, model_kind, safe_name
from compress_ssl.pipeline.models.network import Network
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.records import read_record
from compress_ssl.pipeline.runtime.signatures import is_required
from compress_ssl.pipeline.runtime.spec import did_you_mean
from compress_ssl.pipeline.runtime.user_object import UserObject
from compress_ssl.pipeline.views.preprocessing import IMAGENET, Preprocessing

_REMEDY = "size is a whole number of pixels, mean and std have three numbers each, for pixels in [0, 1]"


def model(user: UserObject) -> Callable[..., Embedder]:
    """Your own model: any importable function or class that returns an nn.Module. Its arguments are the keys."""
    of_every_model = ModelOptions.__dataclass_fields__.keys() - {"pretrained"}  # these are not passed on to a factory
    parameters = [p for p in user.signature.parameters.values() if p.kind is not inspect.Parameter.VAR_POSITIONAL]
    for parameter in parameters:
        if parameter.name in of_every_model and is_required(parameter):
            raise UserError(
                f"{user.name} requires the argument {parameter.name}, which is a key of every model and is not "
                "passed on; give it another name, or a default"
            )
    own = [p for p in parameters if p.name not in of_every_model]

    def make_network(options: ModelOptions, /, *argument: object, **keys: object) -> Network:
        module = user(*argument, **keys)
        if not isinstance(module, nn.Module):
            raise UserError(f"{user.name} returned a {type(module).__name__}; it must return a torch.nn.Module")
        name = safe_name(*user.words, *argument)
        return Network(module, name, _preprocessing(module, user.name, options), trained=True)

    options = inspect.Parameter("_options", inspect.Parameter.POSITIONAL_ONLY)
    make_network.__signature__ = inspect.Signature([options, *own])  # type: ignore[attr-defined]  # read by model_kind
    return model_kind(without=("pretrained",))(make_network)


def _preprocessing(module: nn.Module, name: str, options: ModelOptions) -> Preprocessing:
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
            f"{name}: its attribute preprocessing has an unknown key {unknown[0]!r}{hint or '.'} "
            f"Known: {', '.join(names)}"
        )
    if "size" not in given and options.size is None:
        raise UserError(f"the image size of {name} is unknown; add size=, --image-size or an attribute `preprocessing`")
    return _checked({**{name: getattr(IMAGENET, name) for name in names}, "size": options.size or 1, **given}, name)


def _checked(values: Mapping[str, Any], name: str) -> Preprocessing:
    """The preprocessing of these values. Raises UserError for values of the wrong types or out of range."""
    try:
        numbers = {key: [float(number) for number in values[key]] for key in ("mean", "std")}
        crop = float(values["crop_ratio"])
    except (TypeError, ValueError) as wrong:
        raise UserError(f"{name}: its attribute preprocessing is not valid: {wrong}; {_REMEDY}") from None
    return read_record(
        Preprocessing, {**values, **numbers, "crop_ratio": crop}, f"{name}: its attribute preprocessing", remedy=_REMEDY
    )
