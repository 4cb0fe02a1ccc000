"""A data set that is not ours, checked: what it says of its images when it is opened, each image when it is loaded."""

import pickle
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from compress_ssl.pipeline.datasets.base import Dataset
from compress_ssl.pipeline.datasets.decode import BROKEN, GOOD, REASONS, BadImage
from compress_ssl.pipeline.datasets.map_style import LABELS, MapStyle, integer_labels, to_pixels
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.formatting import shorten
from compress_ssl.pipeline.runtime.import_object import describe_with_location, import_file
from compress_ssl.pipeline.runtime.progress import echo
from compress_ssl.pipeline.runtime.user_object import describing_errors


class UserDataset(Dataset):
    """A user's data set. An exception while an image is loaded makes it a bad image, whose reason names file and line.

    Raises UserError if its ids, labels or classes are not what Dataset says.
    """

    def __init__(self, original: Dataset, name: str, file: Path | None):
        """name: in messages. file: the file of `python:FILE.py:NAME`, which a process must import to unpickle it."""
        self.original, self.name, self.file = original, name, file
        self.ids = _checked_ids(original, name)
        self.classes = _checked_classes(original, name)
        self.label = _checked_label(original, name, len(self.ids), len(self.classes))

    @property
    def remedy(self) -> str:
        return self.original.remedy

    def load(self, i: int) -> tuple[np.ndarray, int]:
        try:
            pixels, content = self.original.load(i)
        except BadImage as bad:
            if bad.status in REASONS and bad.status != GOOD:
                raise
            raise BadImage(BROKEN, str(bad)) from None
        except MemoryError:
            raise
        except UserError as wrong:
            raise BadImage(BROKEN, str(wrong)) from None
        except (Exception, SystemExit) as wrong:  # the code of others may raise anything, and may call sys.exit
            raise BadImage(BROKEN, describe_with_location(wrong)) from wrong
        problem = describe_problem(pixels, content)
        if problem:
            raise BadImage(BROKEN, f"its load returned {problem}")
        return np.require(pixels, requirements=("C", "W")), content  # of torch: no negative stride, nothing read-only

    def changed_rows(self, content: np.ndarray, since: float) -> list[int]:
        with describing_errors(f"changed_rows of {self.name}"):
            return self.original.changed_rows(content, since)

    def __reduce__(self) -> tuple[Callable[..., "UserDataset"], tuple[object, ...]]:
        """Pickled so that a fresh process imports the user's file before it meets the classes of that file."""
        return _unpickle, (pickle.dumps(self.original), self.name, self.file)


def _unpickle(original: bytes, name: str, file: Path | None) -> UserDataset:
    if file:
        import_file(file)
    return UserDataset(pickle.loads(original), name, file)


def adapt(made: object, name: str, file: Path | None) -> UserDataset:
    """What a user's class or function returned, as a data set of ours. Raises UserError if it can be none."""
    if isinstance(made, Dataset):
        return UserDataset(made, name, file)
    lacks = [method for method in ("__len__", "__getitem__") if not hasattr(made, method)]
    if lacks:
        raise UserError(
            f"{name} returned a {type(made).__name__} without {' and '.join(lacks)}; return a "
            "compress_ssl.pipeline.datasets.base.Dataset, or a data set with __len__ and __getitem__, as torch's"
        )
    with describing_errors(name):
        images = MapStyle(made, getattr(made, "ids", None))  # type: ignore[arg-type]  # it has both methods
    dataset = UserDataset(images, name, file)
    _check_first_item(made, dataset)
    return dataset


def _check_first_item(items: object, dataset: UserDataset) -> None:
    """Raise UserError if the first item holds no image, or if the labels are only found in the items."""
    try:
        item = items[0]  # type: ignore[index]  # `adapt` has made sure of it
    except Exception:  # one bad image is no reason to refuse the others
        return
    try:
        to_pixels(item)
    except UserError as wrong:
        raise UserError(f"{dataset.name}: {wrong}") from None
    if integer_labels(items) is None:  # type: ignore[arg-type]
        present = [name for name in LABELS if getattr(items, name, None) is not None]
        if present:
            raise UserError(
                f"{dataset.name}: its attribute {present[0]} must have one whole number per image, -1 for an image "
                "without a label"
            )
        if isinstance(item, tuple | list) and len(item) > 1:
            _say_unlabelled(dataset.name)


@cache
def _say_unlabelled(name: str) -> None:
    """Print, once in a process, that the labels in the items are not used: reading them means decoding all images."""
    echo(f"{name} is used without labels: its items have some, but it has no attribute `targets` with one per image")


# ---------------------------------------------------------------- checks


def describe_problem(pixels: object, content: object) -> str:
    """What is wrong with that which `load` returned, or ""."""
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        what = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else f"a {type(pixels).__name__}"
        return f"{what} as pixels, not an array (H, W, 3) of uint8"
    if 0 in pixels.shape:
        return f"an image of {pixels.shape[0]} x {pixels.shape[1]} pixels"
    if not isinstance(content, int | np.integer) or not 0 <= int(content) < 2**64:
        return f"{content!r} as content hash, not an integer from 0 to 2**64 - 1: use content_hash(bytes)"
    return ""


def _checked_ids(dataset: Dataset, name: str) -> list[str]:
    ids = list(getattr(dataset, "ids", ()))
    if not ids:
        raise UserError(f"{name} has no images: its `ids` are empty; are its files where it looks for them?")
    wrong = next((each for each in ids if not isinstance(each, str)), None)
    if wrong is not None:
        raise UserError(f"{name}: its `ids` must be texts, but one is {wrong!r}; use str(...)")
    unwritable = next((each for each in ids if not each.isascii() and _has_surrogate(each)), None)
    if unwritable is not None:
        raise UserError(f"{name}: its `ids` must be UTF-8, but {unwritable!r} is not; percent-escape such bytes")
    if len(set(ids)) < len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise UserError(f"{name}: its `ids` must differ, but {twice!r} is there twice")
    if len(dataset) != len(ids):
        raise UserError(f"{name} has {len(ids)} `ids` for {len(dataset)} images")
    return [str(each) for each in ids]


def _has_surrogate(text: str) -> bool:
    """Whether a text has half a character, as file names that are not UTF-8 have it in Python."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def _checked_classes(dataset: Dataset, name: str) -> tuple[str, ...]:
    classes = tuple(getattr(dataset, "classes", ()))
    if len(set(classes)) < len(classes) or not all(isinstance(each, str) for each in classes):
        raise UserError(f"{name}: its `classes` must be texts that differ, but they are {shorten(repr(classes), 80)}")
    if any(_has_surrogate(each) for each in classes):
        raise UserError(f"{name}: its `classes` must be UTF-8, but they are {shorten(repr(classes), 80)}")
    return classes


def _checked_label(dataset: Dataset, name: str, images: int, classes: int) -> np.ndarray:
    label = np.asarray(getattr(dataset, "label", np.full(images, -1)))
    if label.shape != (images,) or not np.issubdtype(label.dtype, np.integer):
        raise UserError(
            f"{name}: its `label` must be one whole number per image, an array ({images},) of int64, but it is "
            f"{label.dtype} {label.shape}"
        )
    if label.min() < -1 or label.max() >= classes:
        worst = label.min() if label.min() < -1 else label.max()
        raise UserError(
            f"{name}: the label {worst} is none of its {classes} `classes`; a label is an index into them, or -1"
        )
    return label.astype(np.int64)
