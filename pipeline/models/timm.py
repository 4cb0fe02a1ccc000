"""The kind `timm`: models of timm without their classifier."""

import functools
import re
import sys
from collections.abc import Callable, Mapping
from typing import Protocol, cast

import timm
import torch
from timm.layers import PatchEmbed
from timm.models import build_model_with_cfg, get_model_input_config, resolve_model_input_args
from torch import Tensor, nn

from compress_ssl.pipeline.models.factory import ModelOptions, build_error, model_kind, safe_name
from compress_ssl.pipeline.models.network import Network
from compress_ssl.pipeline.models.pooling import Pool
from compress_ssl.pipeline.models.selection import CheckpointFormat, State
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.formatting import describe_exception
from compress_ssl.pipeline.runtime.spec import did_you_mean
from compress_ssl.pipeline.views.preprocessing import Preprocessing

_TIMM_POOL = {"cls": "token", "none": ""}
"""timm's name of a value of pool=, for those that timm calls differently."""

_COMMON_KEYS = ("drop_rate", "drop_path_rate", "img_size", "dynamic_img_size", "dynamic_img_pad", "depth", "embed_dim")
"""Keys of timm.create_model that are used most; only for suggestions when a key is misspelt."""

_CLASSES = 1000
"""Outputs of the classifier of a model that is built to learn its names; the number does not change the names."""


class _TimmModel(Protocol):
    """Methods of timm's models beside those of nn.Module."""

    def forward_features(self, images: Tensor, /) -> Tensor: ...

    def forward_head(self, features: Tensor, /) -> Tensor: ...

    def get_classifier(self) -> nn.Module: ...

    def reset_classifier(self, classes: int, pool: str, /) -> None: ...


@model_kind()
def model(options: ModelOptions, name: str, /, **keys: object) -> Network:
    """timm:NAME, a timm model without classifier. Further keys go to timm.create_model."""
    if "num_classes" in keys:
        raise UserError(f"timm:{name} is used without classifier; leave num_classes= out")
    pretrained = bool(options.pretrained)
    module = _create(name, options.size, pretrained, keys)
    has_regions = hasattr(module, "forward_features") and hasattr(module, "forward_head")
    return Network(
        module,
        safe_name("timm", name),
        _preprocessing(module, name, options.size),
        trained=pretrained,
        checkpoint_format=functools.partial(_checkpoint_format, name, options.size, keys, module),
        pool=_apply_pool(module, name, options.pool),
        regions=_regions if has_regions else None,
        classifier=functools.partial(_classifier, name, options.size, keys) if pretrained else None,
    )


# ---------------------------------------------------------------- building


def _create(
    name: str,
    size: int | None,
    pretrained: "bool | _FilterRecorder",
    keys: Mapping[str, object],
    classes: int | None = 0,
) -> nn.Module:
    """Call timm.create_model for images of side `size` (pixels; None: the model's own).

    classes: outputs of the classifier; 0: no classifier; None: as many as the pretrained weights have.
    Raises UserError for an unknown name and for every exception of timm.
    """
    source = re.match(r"(hf-hub|hf_hub|local-dir):", name)
    if not source and not timm.is_model(name.partition(".")[0]):
        known = timm.list_models()
        raise UserError(f"timm has no model {name!r}{did_you_mean(name, known) or '.'} It knows {len(known)} others")
    try:
        input_args = {"img_size": size} if size else {}
        model_args = {**keys} if classes is None else {**keys, "num_classes": classes}
        resolved = resolve_model_input_args(name, input_args, **model_args)
        return timm.create_model(**resolved, pretrained=cast(bool, pretrained))  # timm only asks whether it is true
    except Exception as error:  # a thousand constructors and a download may raise anything
        raise build_error(f"timm:{name}", size, error, _COMMON_KEYS) from error


def _classifier(name: str, size: int | None, keys: Mapping[str, object]) -> nn.Module:
    """The pretrained classifier: the model is built a second time, with it."""
    return cast(_TimmModel, _create(name, size, True, keys, classes=None)).get_classifier()


def _apply_pool(module: nn.Module, name: str, pool: Pool) -> Pool | None:
    """Set timm's own pooling to the user's pool= and return what remains to be pooled; None if pool=auto."""
    if pool == "auto":
        return None
    try:
        cast(_TimmModel, module).reset_classifier(0, _TIMM_POOL.get(pool, pool))
    except Exception as error:
        raise UserError(f"timm:{name} has no pool={pool} ({describe_exception(error)}); leave it out") from error
    return "none" if pool == "none" else "auto"


def _regions(module: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """(regions (B, R, c) without class and register tokens, the model's output)"""
    network = cast(_TimmModel, module)
    features = network.forward_features(images)
    if features.dim() == 3:
        regions = features[:, getattr(module, "num_prefix_tokens", 0) :]
    elif getattr(module, "output_fmt", "NCHW") == "NHWC":  # Swin, for example
        regions = features.flatten(1, 2)
    else:
        regions = features.flatten(2).transpose(1, 2)
    return regions, network.forward_head(features)


# ---------------------------------------------------------------- preprocessing


def _preprocessing(module: nn.Module, name: str, size: int | None) -> Preprocessing:
    """The preprocessing of timm's own configuration, for images of side `size`. Raises UserError for a bad size."""
    config = timm.data.resolve_model_data_config(module)
    size = size or int(get_model_input_config(module)["input_size"][-1])
    _require_whole_patches(module, name, size)
    known = config["interpolation"] in ("bilinear", "bicubic", "nearest")  # timm also has "random", "lanczos", ...
    return Preprocessing(
        size,
        tuple(config["mean"]),
        tuple(config["std"]),
        config["interpolation"] if known else "bicubic",
        float(config["crop_pct"]),
    )


def _require_whole_patches(module: nn.Module, name: str, size: int) -> None:
    """Raise UserError if a ViT's patches do not cover the image: timm would ignore the last rows and columns."""
    embed = getattr(module, "patch_embed", None)
    if not isinstance(embed, PatchEmbed) or not embed.strict_img_size or embed.dynamic_img_pad:
        return
    side = embed.patch_size[0]
    if size % side:
        multiples = [n * side for n in (size // side, size // side + 1) if n]
        near = ", ".join(map(str, multiples))
        raise UserError(f"timm:{name} cuts images into patches of {side} pixels, and {size} is no multiple; use {near}")


# ---------------------------------------------------------------- checkpoints


class _FilterRecorder:
    """A value for `pretrained=` that counts as false and records the model's checkpoint filter.

    A checkpoint filter is timm's function that translates old or resized checkpoints of an architecture. timm has
    no interface for it: the architecture's code passes it as `pretrained_filter_fn` to build_model_with_cfg, which
    uses it only to load weights and does not keep it. But build_model_with_cfg tests `if pretrained:`, and that calls
    __bool__ below, where the caller's stack frame shows its local variables; so timm is not patched. If the model
    contains a backbone that is a timm model too, that backbone is built first, and the model's own filter is the
    one recorded last.
    """

    filter: Callable[[State, nn.Module], State] | None = None

    def __bool__(self) -> bool:
        caller = sys._getframe(1)
        if caller.f_code is build_model_with_cfg.__code__:
            self.filter = caller.f_locals["pretrained_filter_fn"]
        return False


def _checkpoint_format(name: str, size: int | None, keys: Mapping[str, object], bare: nn.Module) -> CheckpointFormat:
    """timm's checkpoint filter for a model, and the names of the classifier that `bare` was built without."""
    recorder = _FilterRecorder()
    with torch.device("meta"):  # only names are needed: no memory and no initialisation
        full = _create(name, size, recorder, keys, classes=_CLASSES)
    classifier = frozenset(full.state_dict()) - frozenset(bare.state_dict())
    if recorder.filter is None:
        return CheckpointFormat(classifier)
    return CheckpointFormat(classifier, functools.partial(_translate, recorder.filter, bare))


def _translate(checkpoint_filter: Callable[[State, nn.Module], State], bare: nn.Module, state: State) -> State:
    """The filter with its arguments in the order that CheckpointFormat needs; at module level, to be picklable."""
    return checkpoint_filter(state, bare)
