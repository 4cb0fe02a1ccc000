"""Classification data sets of torchvision: `torchvision:CIFAR10,root=DIR,train=true`."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from compress_ssl.pipeline.datasets.decode import BROKEN, BadImage
from compress_ssl.pipeline.datasets.map_style import MapStyle, MapStyleItems
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.spec import did_you_mean


class Torchvision(MapStyle):
    """A classification set of torchvision.datasets; further keys go to its class (train=, split=, download=).

    The set is unlabelled unless it has one integer per image in `targets`, `labels` or `_labels`. The content hash
    is that of the decoded pixels, since torchvision does not hand out the stored bytes.
    """

    def __init__(self, name: str, /, *, root: Path = Path("data"), **options: object):
        items = _open_set(name, root, options)
        super().__init__(items, (f"{name}/{i:08d}" for i in range(len(items))))

    @property
    def remedy(self) -> str:
        return "put it back"

    def load(self, i: int) -> tuple[np.ndarray, int]:
        try:
            return super().load(i)
        except Exception as problem:  # torchvision's classes raise exceptions of many types
            raise BadImage(BROKEN, " ".join(str(problem).split())[:200]) from None


def _open_set(name: str, root: Path, options: Mapping[str, object]) -> MapStyleItems:
    """An instance of torchvision.datasets.NAME.

    Raises UserError for an unknown name, an option that the class does not accept, or files that it cannot open.
    """
    from torchvision import datasets

    known = [n for n in datasets.__all__ if inspect.isclass(getattr(datasets, n))]
    if name not in known:
        raise UserError(f"torchvision has no data set {name!r}{did_you_mean(name, known)}")
    build: Callable[..., MapStyleItems] = getattr(datasets, name)
    parameters = inspect.signature(build).parameters
    for key in options:
        if key not in parameters:
            raise UserError(
                f"torchvision:{name} has no key {key!r}{did_you_mean(key, parameters) or '.'} "
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
