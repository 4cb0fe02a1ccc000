"""Classification data sets of torchvision: `torchvision:CIFAR10,root=DIR,train=true`."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from compress_ssl.pipeline.datasets.base import Dataset, content_hash
from compress_ssl.pipeline.datasets.decode import BROKEN, BadImage, to_rgb
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.registry import did_you_mean


class Torchvision(Dataset):
    """A classification set of torchvision.datasets; further keys go to its class (train=, split=, download=).

    The set is unlabelled unless it has one integer per image in `targets`, `labels` or `_labels`. The content hash
    is that of the decoded pixels, since torchvision does not hand out the stored bytes.
    """

    def __init__(self, name: str, /, *, root: Path = Path("data"), **options: Any):
        self._set = _open_set(name, root, options)
        self.ids = [f"{name}/{i:08d}" for i in range(len(self._set))]
        self.label = _integer_labels(self._set)
        count = int(self.label.max(initial=-1)) + 1
        names = getattr(self._set, "classes", None) or range(count)
        self.classes = tuple(str(c[0]) if isinstance(c, tuple) else str(c) for c in names)[:count]

    def load(self, i: int) -> tuple[np.ndarray, int]:
        try:
            image = self._set[i][0]
            if not isinstance(image, Image.Image):
                image = Image.fromarray(np.asarray(image))
            pixels = np.array(to_rgb(image))
        except Exception as problem:  # torchvision's classes raise exceptions of many types
            raise BadImage(BROKEN, " ".join(str(problem).split())[:200]) from None
        return pixels, content_hash(pixels)


def _open_set(name: str, root: Path, options: Mapping[str, Any]) -> Any:
    """An instance of torchvision.datasets.NAME.

    Raises UserError for an unknown name, an option that the class does not accept, or files that it cannot open.
    """
    from torchvision import datasets

    known = [n for n in datasets.__all__ if inspect.isclass(getattr(datasets, n))]
    if name not in known:
        raise UserError(f"torchvision has no data set {name!r}{did_you_mean(name, known)}")
    build: Callable[..., Any] = getattr(datasets, name)
    parameters = inspect.signature(build).parameters
    for key in options:
        if key not in parameters:
            raise UserError(
                f"torchvision:{name} has no key {key!r}{did_you_mean(key, parameters)} "
                f"Known: {', '.join(list(parameters)[1:])}"
            )
    try:
        return build(*([str(root)] if "root" in parameters else []), **options)
    except (RuntimeError, FileNotFoundError, OSError, ValueError, ModuleNotFoundError) as problem:
        why = " ".join(str(problem).split())
        raise UserError(
            f"torchvision:{name} could not be opened in {root}: {why} (root=DIR names its folder, "
            "download=true fetches it)"
        ) from None


def _integer_labels(dataset: Any) -> np.ndarray:
    """(N,) int64 labels of a torchvision data set; all -1 if it does not have one integer per image."""
    attributes = ("targets", "labels", "_labels")
    labels = next((getattr(dataset, a) for a in attributes if hasattr(dataset, a)), None)
    if labels is not None and len(np.shape(labels)) == 1 and len(labels) == len(dataset):
        return np.asarray(labels, np.int64)
    return np.full(len(dataset), -1, np.int64)
