"""Data sets that torchvision knows: `torchvision:CIFAR10,root=DIR,train=true`."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from compress_ssl.pipeline.datasets.base import Dataset, content_hash
from compress_ssl.pipeline.datasets.decode import BROKEN, BadImage, to_rgb
from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.registry import did_you_mean


class Torchvision(Dataset):
    """A classification set of torchvision.datasets; further keys go to its class (train=, split=, download=)."""

    def __init__(self, name: str, /, *, root: Path = Path("data"), **options: Any):
        from torchvision import datasets

        known = [n for n in datasets.__all__ if inspect.isclass(getattr(datasets, n))]
        if name not in known:
            raise UserError(f"torchvision has no data set {name!r}{did_you_mean(name, known)}")
        build = getattr(datasets, name)
        takes = inspect.signature(build).parameters
        for key in options:
            if key not in takes:
                raise UserError(
                    f"torchvision:{name} has no key {key!r}{did_you_mean(key, takes)} "
                    f"Known: {', '.join(list(takes)[1:])}"
                )
        try:
            self._set = build(*([str(root)] if "root" in takes else []), **options)
        except (RuntimeError, FileNotFoundError, OSError, ValueError, ModuleNotFoundError) as problem:
            why = " ".join(str(problem).split())
            raise UserError(
                f"torchvision:{name} could not be opened in {root}: {why} (root=DIR names its folder, "
                "download=true fetches it)"
            ) from None
        self.ids = [f"{name}/{i:08d}" for i in range(len(self._set))]
        labels = next((getattr(self._set, a) for a in ("targets", "labels", "_labels") if hasattr(self._set, a)), None)
        flat = labels is not None and len(np.shape(labels)) == 1 and len(labels) == len(self.ids)
        self.label = np.asarray(labels, np.int64) if flat else np.full(len(self.ids), -1, np.int64)
        count = int(self.label.max(initial=-1)) + 1
        names = getattr(self._set, "classes", None) or range(count)
        self.classes = tuple(str(c[0]) if isinstance(c, tuple) else str(c) for c in names)[:count]

    def load(self, i: int) -> tuple[np.ndarray, int]:
        try:
            image = self._set[i][0]
            pixels = np.array(to_rgb(image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))))
        except Exception as problem:
            raise BadImage(BROKEN, " ".join(str(problem).split())[:200]) from None
        return pixels, content_hash(pixels)
