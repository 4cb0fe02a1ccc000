"""From a library's bare network to an Embedder: the options every model has, loading weights, error texts.

A kind of model is a function (ModelOptions, argument, /, *, own keys) -> Network under the decorator `model_kind`.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress_ssl.pipeline.models import weights
from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.models.network import Network
from compress_ssl.pipeline.models.pooling import Pool
from compress_ssl.pipeline.models.selection import Selection, State
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.formatting import describe_exception
from compress_ssl.pipeline.runtime.spec import did_you_mean
from compress_ssl.pipeline.views.preprocessing import Interpolation, Preprocessing

# ---------------------------------------------------------------- what kinds use


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The keys that a spec may have for any model, unless its kind excludes some.

    weights: file of a checkpoint; key, prefix, drop, head: which of its tensors, see selection.Selection.
    pretrained: load published weights. size: side of the input in pixels. mean, std: of pixels in [0, 1], by
    channel. crop: side of the centre crop divided by the side after resizing. pool: see pooling.Pool.

    A kind receives them with `size` resolved (None: the model's own) and `pretrained` true or false.
    """

    weights: Path | None = None
    key: str = ""
    prefix: str = ""
    drop: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    pretrained: bool | None = None
    size: int | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    interpolation: Interpolation | None = None
    crop: float | None = None
    pool: Pool = "auto"


def build_error(name: str, size: int | None, error: Exception, keys: Iterable[str] = ()) -> UserError:
    """A UserError for an exception that a library's constructor or download raised.

    keys: those that the constructor is known to accept, for suggestions besides those of ModelOptions.
    """
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if unknown:
        hint = did_you_mean(unknown[1], [*ModelOptions.__dataclass_fields__, *keys])
        return UserError(f"{name} has no key {unknown[1]!r}{hint or '; leave it out'}")
    if isinstance(error, OSError):
        return UserError(
            f"the weights of {name} could not be fetched ({describe_exception(error)}); "
            "give weights=FILE, or pretrained=false for random ones"
        )
    at = f" for images of {size} pixels" if size else ""
    return UserError(
        f"{name} cannot be built{at} ({describe_exception(error)}); choose another size or correct its keys"
    )


def safe_name(*parts: object) -> str:
    """Join parts of a spec to a name for files: `timm`, `resnet18` -> `timm-resnet18`."""
    return "-".join(re.sub(r"[^\w.]+", "-", str(part)).strip("-.") for part in parts)


def model_kind(*, without: tuple[str, ...] = ()) -> Callable[[Callable[..., Network]], Callable[..., Embedder]]:
    """Decorator: turn a function (ModelOptions, argument, /, *, own keys) -> Network into an entry of MODELS.

    The entry takes the argument, the function's own keys and all fields of ModelOptions but those in `without`.
    """

    def decorate(make_network: Callable[..., Network]) -> Callable[..., Embedder]:
        common = [p for p in inspect.signature(ModelOptions).parameters.values() if p.name not in without]
        own = list(inspect.signature(make_network).parameters.values())[1:]
        any_keys = [p for p in own if p.kind is inspect.Parameter.VAR_KEYWORD]

        @functools.wraps(make_network)
        def build(
            *argument: object,
            image_size: int | None = None,
            pretrained_default: bool = False,
            recorded: Preprocessing | None = None,
            **keys: object,
        ) -> Embedder:
            # Any: the types are those of ModelOptions, whose signature the registry has read.
            given: dict[str, Any] = {p.name: keys.pop(p.name) for p in common if p.name in keys}
            options = _resolve(ModelOptions(**given), image_size, pretrained_default)
            network = make_network(options, *argument, **keys)
            if recorded:
                network.preprocessing = replace(recorded, size=network.preprocessing.size)
            return _build_embedder(network, options)

        parameters = [*(p for p in own if p not in any_keys), *common, *any_keys]
        build.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # Registry reads it
        return build

    return decorate


# ---------------------------------------------------------------- checking options


def _resolve(options: ModelOptions, image_size: int | None, pretrained_default: bool) -> ModelOptions:
    """Check the options of a spec, then let image_size override size= and decide `pretrained`."""
    _check(options)
    if image_size is not None:
        options = replace(options, size=image_size)
    if options.pretrained is None:
        options = replace(options, pretrained=pretrained_default and options.weights is None)
    return options


def _check(options: ModelOptions) -> None:
    """Raise UserError for options that contradict each other or are out of range."""
    selection = str(_selection(options))
    if selection and not options.weights:
        raise UserError(f"{selection} selects from a file of weights, and none is given; add weights=FILE")
    if options.weights and options.pretrained:
        raise UserError("weights=FILE and pretrained=true contradict each other; keep one")
    if options.size is not None and options.size < 1:
        raise UserError(f"size={options.size} is no image size; give pixels, as in size=224")
    if options.crop is not None and not 0 < options.crop <= 1:
        raise UserError(f"crop={options.crop} is no share of the resized image; give a number in (0, 1], as 0.875")
    _check_channels("mean", options.mean)
    _check_channels("std", options.std)


def _check_channels(key: str, numbers: tuple[float, ...]) -> None:
    """Raise UserError unless there are no numbers or three; those of std must be positive."""
    if numbers and (len(numbers) != 3 or (key == "std" and min(numbers) <= 0)):
        text = "+".join(map(str, numbers))
        wanted = "three positive numbers" if key == "std" else "three numbers"
        raise UserError(f"{key}={text} must be {wanted}, one per channel, for pixels in [0, 1]: 0.5+0.5+0.5")


def _selection(options: ModelOptions) -> Selection:
    return Selection(options.key, options.prefix, options.drop, options.head)


# ---------------------------------------------------------------- the embedder


def _build_embedder(network: Network, options: ModelOptions) -> Embedder:
    """Load the file of weights= into a network, replace its preprocessing by the user's options, and measure it."""
    head: State = {}
    if options.weights:
        head = weights.load(
            network.module,
            options.weights,
            name=network.name,
            selection=_selection(options),
            checkpoint_format=network.checkpoint_format(),
        )
    elif options.pretrained and not network.trained:
        raise UserError(
            f"{network.name} comes without trained weights; give weights=FILE, or pretrained=false for random ones"
        )
    network.preprocessing = _override_preprocessing(network.preprocessing, options)
    return Embedder(network, network.pool or options.pool, head)


def _override_preprocessing(own: Preprocessing, options: ModelOptions) -> Preprocessing:
    """The model's own preprocessing, with the values that the user gave."""
    mean = options.mean or own.mean
    std = options.std or own.std
    return Preprocessing(
        size=options.size or own.size,
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
        interpolation=options.interpolation or own.interpolation,
        crop_ratio=options.crop or own.crop_ratio,
    )
