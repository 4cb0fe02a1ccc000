"""Data sets: where images come from. `DATASETS` builds one from `folder:PATH`, `digits`, `python:FILE.py:NAME`, ...

A new kind is one file with a subclass of `compress_ssl.pipeline.datasets.base.Dataset` and one line in the table.
"""

from typing import TYPE_CHECKING

from compress_ssl.pipeline.runtime.registry import Registry

if TYPE_CHECKING:
    from compress_ssl.pipeline.datasets.base import Dataset

DATASETS: "Registry[Dataset]" = Registry(
    "data",
    {
        "folder": "compress_ssl.pipeline.datasets.folder:Folder",
        "digits": "compress_ssl.pipeline.datasets.digits:Digits",
        "torchvision": "compress_ssl.pipeline.datasets.torchvision:Torchvision",
        "python": "compress_ssl.pipeline.datasets.python:dataset",
    },
    path_means="folder",
    packages="compress_ssl.datasets",
)


def open_images(spec: str, limit: int | None = None) -> "Dataset":
    """The data set of a spec as it is now: files are listed again at every call.

    limit: use only this many images, spread evenly over the data set. Raises UserError for a wrong spec.
    """
    dataset = DATASETS.build(spec)
    return dataset.subset(limit) if limit else dataset
