"""Map-style data sets, as torch and torchvision have them: anything with `__len__` and `__getitem__`."""

from collections.abc import Iterable
from typing import Protocol

import numpy as np
from PIL import Image

from compress_ssl.pipeline.datasets.base import Dataset, content_hash
from compress_ssl.pipeline.datasets.decode import to_rgb
from compress_ssl.pipeline.runtime.errors import UserError

LABELS = ("targets", "labels", "_labels")
"""Attributes that may hold one integer per image; the data sets of torchvision have the first or one of the others."""


MAX_CLASSES = 1_000_000
"""Most classes that are named by their numbers: a label beyond is no index, for instance a code or a time."""


class MapStyleItems(Protocol):
    """A data set of torch: item i is an image, or a tuple or list whose first member is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> object: ...


class MapStyle(Dataset):
    """A map-style data set as one of ours.

    It is unlabelled unless an attribute of LABELS has one integer per image; its attribute `classes` names the
    classes. The content hash is that of the decoded pixels, since the stored bytes are not handed out.
    """

    def __init__(self, items: MapStyleItems, ids: Iterable[str] | None = None):
        """ids: of the images; None numbers them."""
        self._set = items
        self.ids = [f"{i:08d}" for i in range(len(items))] if ids is None else list(ids)
        label = integer_labels(items)
        self.label = np.full(len(items), -1, np.int64) if label is None else label
        count = int(self.label.max(initial=-1)) + 1
        classes = getattr(items, "classes", None)
        if classes is None and count > MAX_CLASSES:
            raise UserError(f"the label {count - 1} is no number of a class; number the classes 0, 1, ... without gaps")
        names = list(classes if classes is not None else ()) or range(count)
        self.classes = tuple(str(c[0]) if isinstance(c, tuple) else str(c) for c in names)[:count]

    @property
    def remedy(self) -> str:
        return "put it back, take random transforms out of the data set"

    def load(self, i: int) -> tuple[np.ndarray, int]:
        """As Dataset.load; whatever the items raise is passed on."""
        pixels = to_pixels(self._set[i])
        return pixels, content_hash(pixels)


def integer_labels(items: MapStyleItems) -> np.ndarray | None:
    """(N,) int64 labels of a map-style data set; None if no attribute of LABELS has one integer per image."""
    labels = next((getattr(items, name) for name in LABELS if getattr(items, name, None) is not None), None)
    if labels is None or len(np.shape(labels)) != 1 or len(labels) != len(items):
        return None
    array = np.asarray(labels)
    return array.astype(np.int64) if np.issubdtype(array.dtype, np.integer) else None


def to_pixels(item: object) -> np.ndarray:
    """(H, W, 3) uint8 pixels of an item, see MapStyleItems. Raises UserError for an item that holds no image."""
    image = item[0] if isinstance(item, tuple | list) and item else item
    if isinstance(image, Image.Image):
        return np.array(to_rgb(image))
    array = np.asarray(image)
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        kind = type(image).__name__
        shape = f" of {array.dtype} {array.shape}" if array.dtype.kind in "biufc" else ""
        raise UserError(
            f"an item of a data set must be a PIL image or a uint8 array (H, W, 3), alone or first in a tuple; "
            f"it is a {kind}{shape}: take out transforms such as ToTensor"
        )
    return np.array(to_rgb(Image.fromarray(array)))
