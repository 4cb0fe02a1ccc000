"""Models: whatever turns pixels into an embedding, as teacher or as student. One line per kind."""

from typing import TYPE_CHECKING

from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.registry import Registry

if TYPE_CHECKING:
    from compress_ssl.pipeline.models.embedder import Embedder

MODELS = Registry(
    "model",
    {
        "timm": "compress_ssl.pipeline.models.timm:model",
        "torchvision": "compress_ssl.pipeline.models.torchvision:model",
        "python": "compress_ssl.pipeline.models.python:model",
        "torchscript": "compress_ssl.pipeline.models.torchscript:model",
        "efficientnet-lite": "compress_ssl.pipeline.models.networks.efficientnet_lite:model",
        "digits-teacher": "compress_ssl.pipeline.models.networks.digits:model",
        "cifar-resnet": "compress_ssl.pipeline.models.networks.cifar_resnet:model",
        "convnet": "compress_ssl.pipeline.models.networks.convnet:model",
    },
)


def build(spec_text: str, *, image_size: int | None = None, pretrained_default: bool = False) -> "Embedder":
    """The model a spec names. Its input size is `image_size`, else its size=, else its own.

    Raises UserError for whatever the user can mend: names, keys, files, sizes.
    """
    spec = MODELS.parse(spec_text)
    if "image_size" in spec.options:
        raise UserError(f"{spec_text}: a model's key for its input size is size=, not image_size=")
    embedder: Embedder = MODELS.build(spec, image_size=image_size, pretrained_default=pretrained_default)
    embedder.spec = spec_text
    return embedder


def names() -> list[str]:
    """Every model of timm and torchvision, as a spec."""
    import timm
    import torchvision

    theirs = torchvision.models.list_models(module=torchvision.models)
    return [f"timm:{name}" for name in timm.list_models()] + [f"torchvision:{name}" for name in theirs]
