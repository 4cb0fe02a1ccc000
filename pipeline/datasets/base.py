"""The interface of a data set: N images in a fixed order, with ids, labels and pixels.

The index i of an image is its position in `ids`; it is the i of (i, v) everywhere else.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import cached_property

import numpy as np

from compress_ssl.pipeline.runtime.digests import fingerprint


class Dataset(ABC):
    """N images in the order in which the constructor found them. The order does not change afterwards."""

    ids: list[str]
    """N unique relative paths or keys. Bytes that are not UTF-8 are percent-escaped."""

    label: np.ndarray
    """(N,) int64 index into `classes`; -1 for an image without a label."""

    classes: tuple[str, ...]
    """Names of the classes."""

    @property
    def remedy(self) -> str:
        """What the user can do when an image no longer has the content it was exported with: a clause for an error."""
        return "put it back"

    def __len__(self) -> int:
        return len(self.ids)

    @abstractmethod
    def load(self, i: int) -> tuple[np.ndarray, int]:
        """Decode image i: ((H, W, 3) uint8 RGB pixels, 64-bit hash of the stored bytes).

        Raises BadImage for an image that cannot be used.
        """

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the ids, their order and their class names. `load` hashes the contents, not this."""
        names = [self.classes[y] if y >= 0 else None for y in self.label.tolist()]
        return fingerprint([self.ids, names])

    def describe_difference(self, ids: Iterable[object]) -> str:
        """Describe how this data set differs from one with these (N,) ids: images removed, added or relabelled."""
        there, here = set(map(str, ids)), set(self.ids)
        parts = []
        for names, words in ((there - here, "gone"), (here - there, "new")):
            if names:
                verb = "is" if len(names) == 1 else "are"
                parts.append(f"{len(names)} {verb} {words}, as {min(names)}")
        return "; ".join(parts) or "same names, but other labels or another order"

    def changed_rows(self, content: np.ndarray, since: float) -> list[int]:
        """Rows whose stored bytes no longer have the hashes in `content`.

        content: (N,) uint64, 0 for a row that is not to be compared. since: seconds of the epoch; only files touched
        at or after this time are read again. This default returns no rows: data outside files cannot change.
        """
        return []

    def restore_selection(self, limit: int | None, selected: bool, ids: Callable[[], Iterable[object]]) -> "Dataset":
        """Select the images that a store was made of: `limit` evenly spread ones, of which some may be `selected`.

        ids: returns the sample ids of the store; it is called only if the store holds a selection.
        """
        limited = self.subset(limit) if limit else self
        if not selected:
            return limited
        row_of = {name: i for i, name in enumerate(limited.ids)}
        rows = [row_of[str(name)] for name in ids() if str(name) in row_of]
        return Subset(limited, np.array(rows, np.int64))

    def subset(self, n: int) -> "Dataset":
        """n images at evenly spaced positions, in order; the data set itself if it has at most n images."""
        if n >= len(self):
            return self
        return Subset(self, np.linspace(0, len(self) - 1, n).round().astype(int))


class Subset(Dataset):
    """The given rows of another data set."""

    def __init__(self, whole: Dataset, rows: np.ndarray):
        """rows: (n,) integers, indices into `whole`."""
        self.whole, self.rows = whole, rows
        self.ids = [whole.ids[i] for i in rows]
        self.label = whole.label[rows]
        self.classes = whole.classes

    @property
    def remedy(self) -> str:
        return self.whole.remedy

    def load(self, i: int) -> tuple[np.ndarray, int]:
        return self.whole.load(int(self.rows[i]))

    def changed_rows(self, content: np.ndarray, since: float) -> list[int]:
        content_of_whole = np.zeros(len(self.whole), np.uint64)
        content_of_whole[self.rows] = content
        changed = self.whole.changed_rows(content_of_whole, since)
        return np.flatnonzero(np.isin(self.rows, changed)).tolist()


def content_hash(data: bytes | np.ndarray) -> int:
    """BLAKE2b-64 of bytes or of an array's elements in their order, as an integer (little-endian)."""
    buffer = data if isinstance(data, bytes) else np.ascontiguousarray(data).data
    return int.from_bytes(hashlib.blake2b(buffer, digest_size=8).digest(), "little")
