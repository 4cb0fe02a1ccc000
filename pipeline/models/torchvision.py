"""The kind `torchvision`: classification models of torchvision without the last layer of their classifier."""

import functools
from collections.abc import Callable
from typing import cast

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import WeightsEnum
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

from compress_ssl.pipeline.models.factory import ModelOptions, build_error, model_kind, safe_name
from compress_ssl.pipeline.models.network import Network
from compress_ssl.pipeline.models.selection import CheckpointFormat, State
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.spec import did_you_mean
from compress_ssl.pipeline.views.preprocessing import IMAGENET, Preprocessing

_SIZE_KEYS: dict[str, Callable[[int], dict[str, object]]] = {
    "vit_": lambda size: {"image_size": size},
    "maxvit_": lambda size: {"input_size": (size, size)},
}
"""Families that are built for one input size, by the beginning of their names: the key for it."""

_COMMON_KEYS = ("dropout", "stochastic_depth_prob", "width_mult")
"""Keys of torchvision's constructors; only for suggestions when a key is misspelt."""


@model_kind()
def model(options: ModelOptions, name: str, /, **keys: object) -> Network:
    """torchvision:NAME, a classification model without its last layer. Further keys go to torchvision."""
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise UserError(
            f"torchvision has no model {name!r}{did_you_mean(name, known) or '.'} It knows: {', '.join(known)}"
        )
    published = getattr(torchvision.models.get_model_weights(name), "DEFAULT", None)
    preprocessing = _preprocessing(published)
    size = options.size or preprocessing.size
    for family, size_key in _SIZE_KEYS.items():
        if name.startswith(family):
            keys = {**size_key(size), **keys}
    module = _create(name, size, published if options.pretrained else None, keys)
    last_layer, removed = _remove_last_layer(module)
    return Network(
        module,
        safe_name("torchvision", name),
        preprocessing,
        trained=bool(options.pretrained),
        checkpoint_format=functools.partial(CheckpointFormat, frozenset(removed), functools.partial(resized, module)),
        regions=_vit_regions if isinstance(module, VisionTransformer) else None,
        classifier=functools.partial(_return, last_layer) if options.pretrained else None,
    )


def _return(layer: nn.Module) -> nn.Module:
    """The layer itself: a function at module level is picklable, a lambda is not."""
    return layer


def _vit_regions(module: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens (B, R, c) without the class token, the model's output), computed as in VisionTransformer.forward."""
    vit = cast(VisionTransformer, module)
    patches = vit._process_input(images)
    tokens = vit.encoder(torch.cat([vit.class_token.expand(len(patches), -1, -1), patches], 1))
    return tokens[:, 1:], vit.heads(tokens[:, 0])


def _create(name: str, size: int, published: WeightsEnum | None, keys: dict[str, object]) -> nn.Module:
    """Build a model, with `published` weights unless None. Raises UserError for every exception of torchvision."""
    resize = published and name.startswith("vit_") and keys["image_size"] != published.meta["min_size"][0]
    try:
        module: nn.Module = torchvision.models.get_model(name, weights=None if resize else published, **keys)
        if published and resize:  # torchvision's builder loads weights only into a model of their own size
            state = published.get_state_dict(progress=False, check_hash=True)
            module.load_state_dict(resized(module, state))
        return module
    except Exception as error:  # the constructors and a download may raise anything
        raise build_error(f"torchvision:{name}", size, error, _COMMON_KEYS) from error


def _preprocessing(published: WeightsEnum | None) -> Preprocessing:
    """The preprocessing with which the published weights were evaluated; ImageNet's if there are none."""
    if published is None:
        return IMAGENET
    preset = published.transforms()
    size = preset.crop_size[0]
    crop_ratio = size / preset.resize_size[0]
    return Preprocessing(size, tuple(preset.mean), tuple(preset.std), preset.interpolation.value, crop_ratio)


def _remove_last_layer(module: nn.Module) -> tuple[nn.Module, set[str]]:
    """Replace the last layer of the classifier by nn.Identity. Returns that layer and the names of removed tensors."""
    before = set(module.state_dict())
    heads = [name for name in ("fc", "classifier", "head", "heads") if hasattr(module, name)]
    layers = [
        f"{head}.{name}".rstrip(".")
        for head in heads
        for name, layer in getattr(module, head).named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))  # SqueezeNet's last layer is a convolution
    ]
    parent, _, last = layers[-1].rpartition(".")
    layer = module.get_submodule(layers[-1])
    setattr(module.get_submodule(parent), last, nn.Identity())
    if hasattr(module, "aux_logits"):  # Inception and GoogLeNet return auxiliary classifiers' outputs in training
        for auxiliary, absent in {"aux_logits": False, "AuxLogits": None, "aux1": None, "aux2": None}.items():
            if hasattr(module, auxiliary):
                setattr(module, auxiliary, absent)
    return layer, before - set(module.state_dict())


def resized(module: nn.Module, state: State) -> State:
    """The state with a ViT's position embedding interpolated to the module's size; other models: unchanged."""
    if not isinstance(module, VisionTransformer):
        return state
    interpolated: State = interpolate_embeddings(module.image_size, module.patch_size, state)
    return interpolated
