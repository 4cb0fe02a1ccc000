"""What images can come from: `folder:PATH`, `digits`, `torchvision:NAME`. One line per kind."""

from compress_ssl.pipeline.runtime.registry import Registry

DATASETS = Registry(
    "data",
    {
        "folder": "compress_ssl.pipeline.datasets.folder:Folder",
        "digits": "compress_ssl.pipeline.datasets.digits:Digits",
        "torchvision": "compress_ssl.pipeline.datasets.torchvision:Torchvision",
    },
    path_means="folder",
)
