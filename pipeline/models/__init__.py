"""Models: networks that turn pixels into an embedding, as teacher or as student.

`build` makes an Embedder from a spec such as `timm:resnet18,pretrained=true`. A new kind of model is one file
here or in networks/, and one line in MODELS.
"""

from typing import TYPE_CHECKING

from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.registry import Registry
from compress_ssl.pipeline.runtime.spec import did_you_mean

if TYPE_CHECKING:
    from compress_ssl.pipeline.models.embedder import Embedder
    from compress_ssl.pipeline.views.preprocessing import Preprocessing

OUTPUTS = ("embedding", "projection", "logits", "regions")
"""Names of a model's outputs; the arrays of a store have the same names."""

MODELS: "Registry[Embedder]" = Registry(
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
    packages="compress_ssl.models",
)


def build(
    spec_text: str,
    *,
    image_size: int | None = None,
    pretrained_default: bool = False,
    recorded: "Preprocessing | None" = None,
) -> "Embedder":
    """Build the model that a spec names.

    The side of its input, in pixels, is `image_size`, else size= of the spec, else the model's own.
    `pretrained_default`: load published weights if the spec has neither pretrained= nor weights=; True for
    teachers. `recorded`: the preprocessing with which a folder was begun, which counts in place of the model's own;
    keys of the spec and `image_size` come before it. Raises UserError for errors of the user: unknown names and keys,
    unreadable files, impossible sizes.
    """
    spec = MODELS.parse(spec_text)
    if "image_size" in spec.options:
        raise UserError(f"{spec_text}: a model's key for its input size is size=, not image_size=")
    embedder = MODELS.build(spec, image_size=image_size, pretrained_default=pretrained_default, recorded=recorded)
    embedder.spec = spec_text
    return embedder


def parse_outputs(text: str) -> tuple[str, ...]:
    """Names of outputs from a list such as `embedding,projection`, the embedding first and always among them.

    Raises UserError, which names --keep, for an output that no model has.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in OUTPUTS:
            hint = did_you_mean(name, OUTPUTS) or "."
            raise UserError(f"--keep {text}: there is no output {name!r}{hint} Known: {', '.join(OUTPUTS)}")
    return tuple(dict.fromkeys(["embedding", *names]))


def names() -> list[str]:
    """Specs of all models of timm and torchvision, for example `timm:resnet18`."""
    import timm
    import torchvision

    of_torchvision = torchvision.models.list_models(module=torchvision.models)
    return [f"timm:{name}" for name in timm.list_models()] + [f"torchvision:{name}" for name in of_torchvision]
