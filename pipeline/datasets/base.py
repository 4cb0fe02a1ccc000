"""What every data set offers: an order frozen at construction, names, labels, pixels."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from compress_ssl.pipeline.runtime.artifact import fingerprint


class Dataset(ABC):
    """N images. `ids` and `label` say what row i is; `load` decodes it."""

    ids: list[str]  # relative path or key, unique, bytes that are not UTF-8 percent-escaped
    label: np.ndarray  # (N,) int64 into `classes`, -1 where there is none
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @abstractmethod
    def load(self, i: int) -> tuple[np.ndarray, int]:
        """((H, W, 3) uint8, 64-bit hash of the image as stored). Raises BadImage."""

    @cached_property
    def fingerprint(self) -> str:
        """Stands for the names, their order and their labels; contents are hashed as they are read."""
        names = [self.classes[y] if y >= 0 else None for y in self.label.tolist()]
        return fingerprint([self.ids, names])

    def describe_difference(self, ids: Any) -> str:
        """In words, how these images differ from the (N,) ids of a store: gone, added, or labelled otherwise."""
        there, here = set(map(str, ids)), set(self.ids)
        parts = []
        for names, words in ((there - here, "gone"), (here - there, "new")):
            if names:
                parts.append(f"{len(names)} {'is' if len(names) == 1 else 'are'} {words}, as {min(names)}")
        return "; ".join(parts) or "same names, but other labels or another order"

    def changed_rows(self, content: np.ndarray, since: float) -> list[int]:
        """Rows whose stored bytes no longer have these hashes ((N,) uint64, 0 where there is none to compare).

        Only what was touched after `since` (seconds of the epoch) is read again; data that are no files cannot change.
        """
        return []

    def restore_selection(self, made_of: Mapping[str, Any], ids: Callable[[], Any]) -> "Dataset":
        """What a store is made of: of `limit` images, evenly spread, those that were `selected`.

        made_of: the store's record of its data; ids: the (n,) sample ids of the store, read if it is a selection.
        """
        whole = self.subset(made_of["limit"]) if made_of["limit"] else self
        if not made_of.get("selected"):
            return whole
        number = {name: i for i, name in enumerate(whole.ids)}
        return Subset(whole, np.array([number[str(name)] for name in ids() if str(name) in number], np.int64))

    def subset(self, n: int) -> "Dataset":
        """The first n images of every n/N-th position: an even sample, in order."""
        return Subset(self, np.linspace(0, len(self) - 1, n).round().astype(int)) if n < len(self) else self


class Subset(Dataset):
    """Some rows of another data set."""

    def __init__(self, whole: Dataset, rows: Any):
        self.whole, self.rows = whole, rows
        self.ids = [whole.ids[i] for i in rows]
        self.label = whole.label[rows]
        self.classes = whole.classes

    def load(self, i: int) -> tuple[np.ndarray, int]:
        return self.whole.load(int(self.rows[i]))

    def changed_rows(self, content: np.ndarray, since: float) -> list[int]:
        of_all = np.zeros(len(self.whole), np.uint64)
        of_all[self.rows] = content
        return np.flatnonzero(np.isin(self.rows, self.whole.changed_rows(of_all, since))).tolist()


def content_hash(data: Any) -> int:
    """BLAKE2b-64 of bytes or an array's memory, as an integer."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
