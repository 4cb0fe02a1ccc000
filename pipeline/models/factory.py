"""From a library's bare network to an Embedder: the options of a spec, weights, and errors in words."""

import functools
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress_ssl.pipeline.models import weights
from compress_ssl.pipeline.models.embedder import Embedder, Network, Pool
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.formatting import describe_exception
from compress_ssl.pipeline.runtime.registry import did_you_mean
from compress_ssl.pipeline.views.preprocessing import Interpolation, Preprocessing


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What a user may say of any model; a kind may leave some out.

    A kind gets them with `size` resolved (None: the model's own) and `pretrained` decided.
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


def build_error(name: str, size: int | None, wrong: Exception, keys: Iterable[str] = ()) -> UserError:
    """What a library's constructor or download raised, in words; `keys` are those it is known to take."""
    if unknown := re.search(r"unexpected keyword argument '(\w+)'", str(wrong)):
        hint = did_you_mean(unknown[1], [*ModelOptions.__dataclass_fields__, *keys])
        return UserError(f"{name} has no key {unknown[1]!r}{hint or '; leave it out'}")
    if isinstance(wrong, OSError):
        return UserError(
            f"the weights of {name} could not be fetched ({describe_exception(wrong)}); "
            "give weights=FILE, or pretrained=false for random ones"
        )
    at = f" for images of {size} pixels" if size else ""
    return UserError(f"{name} cannot be built{at} ({describe_exception(wrong)}); choose another size or mend its keys")


def safe_name(*parts: object) -> str:
    """Parts of a spec as a name for files: `timm`, `resnet18` -> `timm-resnet18`."""
    return "-".join(re.sub(r"[^\w.]+", "-", str(part)).strip("-.") for part in parts)


def model_kind(*, without: tuple[str, ...] = ()) -> Callable[[Callable[..., Network]], Callable[..., Embedder]]:
    """Make a menu entry of a function (Options, argument, /, *, own keys) -> Network.

    The entry takes the argument, the function's own keys and all Options but those in `without`.
    """

    def decorate(make: Callable[..., Network]) -> Callable[..., Embedder]:
        common = [p for p in inspect.signature(ModelOptions).parameters.values() if p.name not in without]
        own = list(inspect.signature(make).parameters.values())[1:]
        anything = [p for p in own if p.kind is inspect.Parameter.VAR_KEYWORD]

        @functools.wraps(make)
        def build(
            *argument: Any, image_size: int | None = None, pretrained_default: bool = False, **keys: Any
        ) -> Embedder:
            asked = ModelOptions(**{p.name: keys.pop(p.name) for p in common if p.name in keys})
            _check(asked)
            if image_size is not None:
                asked = replace(asked, size=image_size)
            if asked.pretrained is None:
                asked = replace(asked, pretrained=pretrained_default and asked.weights is None)
            return _assemble(make(asked, *argument, **keys), asked)

        parameters = [*(p for p in own if p not in anything), *common, *anything]
        build.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what a Menu reads
        return build

    return decorate


def _check(asked: ModelOptions) -> None:
    """Refuse options that contradict each other or are out of range. Raises UserError."""
    choice = str(_choice(asked))
    if choice and not asked.weights:
        raise UserError(f"{choice} selects from a file of weights, and none is given; add weights=FILE")
    if asked.weights and asked.pretrained:
        raise UserError("weights=FILE and pretrained=true contradict each other; keep one")
    if asked.size is not None and asked.size < 1:
        raise UserError(f"size={asked.size} is no image size; give pixels, as in size=224")
    if asked.crop is not None and not 0 < asked.crop <= 1:
        raise UserError(f"crop={asked.crop} is no share of the resized image; give a number in (0, 1], as 0.875")
    for key, numbers in (("mean", asked.mean), ("std", asked.std)):
        if numbers and (len(numbers) != 3 or (key == "std" and min(numbers) <= 0)):
            text = "+".join(map(str, numbers))
            raise UserError(f"{key}={text} must be three numbers, one a channel, for pixels in [0, 1]: 0.5+0.5+0.5")


def _choice(asked: ModelOptions) -> weights.Selection:
    return weights.Selection(asked.key, asked.prefix, asked.drop, asked.head)


def _assemble(network: Network, asked: ModelOptions) -> Embedder:
    """Load what is asked into a network, let the user's options win, and probe it."""
    head: weights.State = {}
    if asked.weights:
        head = weights.load(
            network.module,
            asked.weights,
            name=network.name,
            choice=_choice(asked),
            checkpoint_format=network.checkpoint_format(),
        )
    elif asked.pretrained and not network.trained:
        raise UserError(
            f"{network.name} comes without trained weights; give weights=FILE, or pretrained=false for random ones"
        )
    said = {
        "size": asked.size,
        "mean": asked.mean,
        "std": asked.std,
        "interpolation": asked.interpolation,
        "crop_ratio": asked.crop,
    }
    kept = network.preprocessing.record()
    network.preprocessing = Preprocessing.of({**kept, **{key: value for key, value in said.items() if value}})
    return Embedder(network, network.pool or asked.pool, head)
