"""Models: whatever turns pixels into an embedding, as teacher or as student. One line per kind."""

from pipeline.menu import Menu

MODELS = Menu(
    "model",
    {
        "timm": "pipeline.models.timm:model",
        "torchvision": "pipeline.models.torchvision:model",
        "python": "pipeline.models.python:model",
        "torchscript": "pipeline.models.torchscript:model",
        "efficientnet-lite": "pipeline.teachers.efficientnet_lite:model",
        "cifar-resnet": "pipeline.students.cifar_resnet:model",
        "convnet": "pipeline.students.convnet:model",
    },
)
