"""Models of timm, without their classifier."""

import functools
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models import build_model_with_cfg, get_model_input_config, resolve_model_input_args
from torch import Tensor, nn

from compress_ssl.pipeline.models.embedder import Network, Pool
from compress_ssl.pipeline.models.factory import ModelOptions, build_error, model_kind, safe_name
from compress_ssl.pipeline.models.weights import CheckpointFormat, State
from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.formatting import describe_exception
from compress_ssl.pipeline.runtime.registry import did_you_mean
from compress_ssl.pipeline.views.preprocessing import Preprocessing

# timm's own name for each pool=, where it is another
_POOL = {"cls": "token", "none": ""}
# what users most often pass on to timm.create_model, for near misses
_KEYS = ("drop_rate", "drop_path_rate", "img_size", "dynamic_img_size", "dynamic_img_pad", "depth", "embed_dim")


@model_kind()
def model(asked: ModelOptions, name: str, /, **options: Any) -> Network:
    """timm:NAME, a timm model without classifier. Further keys go to timm.create_model."""
    if "num_classes" in options:
        raise UserError(f"timm:{name} is used without classifier; leave num_classes= out")
    module = _create(name, asked.size, bool(asked.pretrained), options)
    return Network(
        module,
        safe_name("timm", name),
        _preprocessing(module, name, asked.size),
        trained=bool(asked.pretrained),
        checkpoint_format=functools.partial(_dialect, name, asked.size, options, module),
        pool=_pool(module, name, asked.pool),
        regions=_regions if hasattr(module, "forward_features") and hasattr(module, "forward_head") else None,
        classifier=functools.partial(_classifier, name, asked.size, options) if asked.pretrained else None,
    )


def _regions(module: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens (B, R, c) without class and register tokens, the model's output)"""
    features = module.forward_features(images)
    if features.dim() == 3:
        tokens = features[:, getattr(module, "num_prefix_tokens", 0) :]
    elif getattr(module, "output_fmt", "NCHW") == "NHWC":
        tokens = features.flatten(1, 2)
    else:
        tokens = features.flatten(2).transpose(1, 2)
    return tokens, module.forward_head(features)


def _classifier(name: str, size: int | None, options: Mapping[str, Any]) -> nn.Module:
    return _create(name, size, True, options, classes=None).get_classifier()  # type: ignore[operator]


def _create(
    name: str, size: int | None, pretrained: "bool | _Pretrained", options: Mapping[str, Any], classes: int | None = 0
) -> nn.Module:
    """classes: None for as many as the weights know."""
    source = re.match(r"(hf-hub|hf_hub|local-dir):", name)
    if not source and not timm.is_model(name.partition(".")[0]):
        known = timm.list_models()
        raise UserError(f"timm has no model {name!r}{did_you_mean(name, known) or '.'} It knows {len(known)} others")
    try:
        wanted = {"img_size": size} if size else {}
        given = {**options} if classes is None else {**options, "num_classes": classes}
        resolved = resolve_model_input_args(name, wanted, **given)
        return timm.create_model(**resolved, pretrained=pretrained)  # type: ignore[arg-type]
    except Exception as wrong:  # whatever a thousand constructors and a download may raise
        raise build_error(f"timm:{name}", size, wrong, _KEYS) from wrong


def _preprocessing(module: nn.Module, name: str, size: int | None) -> Preprocessing:
    config = timm.data.resolve_model_data_config(module)
    size = size or int(get_model_input_config(module)["input_size"][-1])
    patches = getattr(module, "patch_embed", None)
    if isinstance(patches, PatchEmbed) and patches.strict_img_size and not patches.dynamic_img_pad:
        side = patches.patch_size[0]
        if size % side:  # timm would silently leave out the last rows and columns
            near = ", ".join(str(n * side) for n in (size // side, size // side + 1) if n)
            raise UserError(
                f"timm:{name} cuts images into patches of {side} pixels, and {size} is no multiple; use {near}"
            )
    known = config["interpolation"] in ("bilinear", "bicubic", "nearest")
    return Preprocessing(
        size,
        tuple(config["mean"]),
        tuple(config["std"]),
        config["interpolation"] if known else "bicubic",
        float(config["crop_pct"]),
    )


def _pool(module: nn.Module, name: str, pool: Pool) -> Pool | None:
    if pool == "auto":
        return None
    try:
        module.reset_classifier(0, _POOL.get(pool, pool))  # type: ignore[operator]
    except Exception as wrong:
        raise UserError(f"timm:{name} has no pool={pool} ({describe_exception(wrong)}); leave it out") from wrong
    return "none" if pool == "none" else "auto"


class _Pretrained:
    """A value of `pretrained=` that means no, and that keeps the checkpoint filter of the model that is built.

    The code of each architecture passes its filter to timm's `build_model_with_cfg`, which keeps it nowhere
    but asks whether to load weights. If the model has a backbone of timm, the backbone asks before the model.
    """

    filter: Callable[[State, nn.Module], State] | None = None

    def __bool__(self) -> bool:
        asks = sys._getframe(1)
        if asks.f_code is build_model_with_cfg.__code__:
            self.filter = asks.f_locals["pretrained_filter_fn"]
        return False


def _dialect(name: str, size: int | None, options: Mapping[str, Any], bare: nn.Module) -> CheckpointFormat:
    """timm's checkpoint filter for this model, and the names of the classifier it has been built without."""
    with torch.device("meta"):  # names only: no memory, no initialisation
        full = _create(name, size, asked := _Pretrained(), options, classes=1000)
    classifier = frozenset(full.state_dict()) - frozenset(bare.state_dict())
    if asked.filter is None:
        return CheckpointFormat(classifier)
    return CheckpointFormat(classifier, functools.partial(_translate, asked.filter, bare))


def _translate(translate: Callable[[State, nn.Module], State], bare: nn.Module, state: State) -> State:
    return translate(state, bare)
