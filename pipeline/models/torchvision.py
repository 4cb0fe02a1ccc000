"""Classification models of torchvision, without the last layer of their classifier."""

import functools
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

from compress_ssl.pipeline.models.embedder import Network
from compress_ssl.pipeline.models.factory import ModelOptions, build_error, model_kind, safe_name
from compress_ssl.pipeline.models.weights import CheckpointFormat, State
from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.registry import did_you_mean
from compress_ssl.pipeline.views.preprocessing import IMAGENET, Preprocessing

# families that fix their input size when they are built, and how they call it
_SIZED = {"vit_": lambda size: {"image_size": size}, "maxvit_": lambda size: {"input_size": (size, size)}}


@model_kind()
def model(asked: ModelOptions, name: str, /, **options: Any) -> Network:
    """torchvision:NAME, a classification model without its last layer. Further keys go to torchvision."""
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise UserError(
            f"torchvision has no model {name!r}{did_you_mean(name, known) or '.'} It knows: {', '.join(known)}"
        )
    published = getattr(torchvision.models.get_model_weights(name), "DEFAULT", None)
    preprocessing = _preprocessing(published)
    size = asked.size or preprocessing.size
    for family, keyword in _SIZED.items():
        if name.startswith(family):
            options = {**keyword(size), **options}
    module = _create(name, size, published if asked.pretrained else None, options)
    last, removed = _without_classifier(module)
    return Network(
        module,
        safe_name("torchvision", name),
        preprocessing,
        trained=bool(asked.pretrained),
        checkpoint_format=functools.partial(CheckpointFormat, frozenset(removed), functools.partial(resized, module)),
        regions=_vit_regions if isinstance(module, VisionTransformer) else None,
        classifier=functools.partial(_layer, last) if asked.pretrained else None,
    )


def _layer(last: nn.Module) -> nn.Module:
    return last


def _vit_regions(module: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens (B, R, c) without the class token, the model's output), as VisionTransformer.forward has them."""
    patches = module._process_input(images)
    tokens = module.encoder(torch.cat([module.class_token.expand(len(patches), -1, -1), patches], 1))
    return tokens[:, 1:], module.heads(tokens[:, 0])


def _create(name: str, size: int, published: Any, options: dict[str, Any]) -> nn.Module:
    resize = name.startswith("vit_") and published and options["image_size"] != published.meta["min_size"][0]
    try:
        module = torchvision.models.get_model(name, weights=None if resize else published, **options)
        if resize:  # the builder refuses to load into another size
            state = published.get_state_dict(progress=False, check_hash=True)
            module.load_state_dict(resized(module, state))
        return module
    except Exception as wrong:  # whatever the constructors and a download may raise
        raise build_error(
            f"torchvision:{name}", size, wrong, ("dropout", "stochastic_depth_prob", "width_mult")
        ) from wrong


def _preprocessing(published: Any) -> Preprocessing:
    """What the best published weights were evaluated with, asked of torchvision's own transforms."""
    if published is None:
        return IMAGENET
    preset = published.transforms()
    size, ratio = preset.crop_size[0], preset.crop_size[0] / preset.resize_size[0]
    return Preprocessing(size, tuple(preset.mean), tuple(preset.std), preset.interpolation.value, ratio)


def _without_classifier(module: nn.Module) -> tuple[nn.Module, set[str]]:
    """Replace the last layer of the classifier by nn.Identity -> (that layer, the names of all that is gone)."""
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
    if hasattr(module, "aux_logits"):  # Inception and GoogLeNet: classifiers on the way, which train() would return
        module.aux_logits = False  # type: ignore[assignment]
        for side in ("AuxLogits", "aux1", "aux2"):
            if hasattr(module, side):
                setattr(module, side, None)
    return layer, before - set(module.state_dict())


def resized(module: nn.Module, state: State) -> State:
    """A ViT's position embedding interpolated to the module's size, torchvision's way; all else as it is."""
    if not isinstance(module, VisionTransformer):
        return state
    return interpolate_embeddings(module.image_size, module.patch_size, state)
