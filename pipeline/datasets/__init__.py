"""Data sets: where images come from. `DATASETS` builds one from `folder:PATH`, `digits` or `torchvision:NAME`.

A new kind is one file with a subclass of `compress_ssl.pipeline.datasets.base.Dataset` and one line in the table.
"""

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
