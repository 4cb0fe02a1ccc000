"""Models: whatever turns pixels into an embedding, as teacher or as student. One line per kind."""

from typing import TYPE_CHECKING

from pipeline.artifact import UserError
from pipeline.menu import Menu

if TYPE_CHECKING:
    from pipeline.model import Embedder

MODELS = Menu(
    "model",
    {
        "timm": "pipeline.models.timm:model",
        "torchvision": "pipeline.models.torchvision:model",
        "python": "pipeline.models.python:model",
        "torchscript": "pipeline.models.torchscript:model",
        "efficientnet-lite": "pipeline.teachers.efficientnet_lite:model",
        "digits-teacher": "pipeline.teachers.digits:model",
        "cifar-resnet": "pipeline.students.cifar_resnet:model",
        "convnet": "pipeline.students.convnet:model",
    },
)


def build(spec_text: str, *, image_size: int | None = None, pretrained_default: bool = False) -> "Embedder":
    """The model a spec names. Its input size is `image_size`, else its size=, else its own.

    Raises UserError for whatever the user can mend: names, keys, files, sizes.
    """
    spec = MODELS.parse(spec_text)
    if "image_size" in spec.options:
        raise UserError(f"{spec_text}: a model's key for its input size is size=, not image_size=")
    embedder: Embedder = MODELS.order(spec, image_size=image_size, pretrained_default=pretrained_default)
    embedder.spec = spec_text
    return embedder


def names() -> list[str]:
    """Every model of timm and torchvision, as a spec."""
    import timm
    import torchvision

    theirs = torchvision.models.list_models(module=torchvision.models)
    return [f"timm:{name}" for name in timm.list_models()] + [f"torchvision:{name}" for name in theirs]
