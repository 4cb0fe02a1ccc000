"""What images can come from: `folder:PATH`, `digits`, `torchvision:NAME`. One line per kind."""

from pipeline.menu import Menu

DATASETS = Menu(
    "data",
    {
        "folder": "pipeline.datasets.folder:Folder",
        "digits": "pipeline.datasets.digits:Digits",
        "torchvision": "pipeline.datasets.torchvision:Torchvision",
    },
    path_means="folder",
)
