"""Data sets that pass check_dataset, and one for each assertion that breaks it. Importing them is fast: no torch."""

import os
import time
from collections.abc import Callable

import numpy as np

from compress_ssl.pipeline.datasets.base import Dataset, content_hash
from compress_ssl.pipeline.datasets.decode import BROKEN, BadImage

N = 5


class Correct(Dataset):
    """A smallest data set that passes: N images of noise in two classes."""

    def __init__(self, seed: int = 0):
        self.ids = [f"noise/{i}" for i in range(N)]
        self.label = np.arange(N) % 3 - 1
        self.classes = ("x", "y")
        self.pixels = np.random.default_rng(seed).integers(0, 256, (N, 6, 4, 3), np.uint8)

    def load(self, i: int) -> tuple[np.ndarray, int]:
        return self.pixels[i], content_hash(self.pixels[i])


class SomeBad(Correct):
    def load(self, i: int) -> tuple[np.ndarray, int]:
        if i % 2:
            raise BadImage(BROKEN, "it is odd")
        return super().load(i)


class Greys:
    """A map-style data set of torch that passes."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> object:
        return np.full((6, 4), i, np.uint8), i % 2


# ---------------------------------------------------------------- one for each assertion


def changed(**members: object) -> Callable[[], Correct]:
    """A function that builds a data set with these members in place of its own."""

    def build() -> Correct:
        dataset = Correct()
        vars(dataset).update(members)
        return dataset

    return build


class AnotherLength(Correct):
    def __len__(self) -> int:
        return N + 1


class FingerprintOfItsOwn(Correct):
    fingerprint = "mine"  # type: ignore[assignment]


class ShuffledIds(Correct):
    def __init__(self) -> None:
        super().__init__()
        self.ids.sort(key=lambda _: os.urandom(8))


class ShuffledLabels(Correct):
    def __init__(self) -> None:
        super().__init__()
        self.classes = tuple(f"{self.classes[0]}-{os.urandom(4).hex()}-{name}" for name in self.classes)


class RaisesKeyError(Correct):
    def load(self, i: int) -> tuple[np.ndarray, int]:
        raise KeyError("pixels")


class RaisesGood(Correct):
    def load(self, i: int) -> tuple[np.ndarray, int]:
        raise BadImage(0, "but it is good")


class FloatPixels(Correct):
    def load(self, i: int) -> tuple[np.ndarray, int]:
        return self.pixels[i] / 255, 1


class ChannelsFirst(Correct):
    def load(self, i: int) -> tuple[np.ndarray, int]:
        return self.pixels[i].transpose(2, 0, 1), 1


class EmptyPixels(Correct):
    def load(self, i: int) -> tuple[np.ndarray, int]:
        return self.pixels[i][:0], 1


class NegativeHash(Correct):
    def load(self, i: int) -> tuple[np.ndarray, int]:
        return self.pixels[i], -1


class AllBad(Correct):
    def load(self, i: int) -> tuple[np.ndarray, int]:
        raise BadImage(BROKEN, "the disk is away")


class RandomPixels(Correct):
    def load(self, i: int) -> tuple[np.ndarray, int]:
        pixels = self.pixels[i] ^ np.uint8(os.urandom(1)[0])
        return pixels, content_hash(pixels)


class SharesARow(Correct):
    """A position that all calls of `load` share, as that of an open file is."""

    row = 0

    def load(self, i: int) -> tuple[np.ndarray, int]:
        self.row = i
        time.sleep(0.002)
        return super().load(self.row)


class OneHash(Correct):
    def load(self, i: int) -> tuple[np.ndarray, int]:
        return self.pixels[i], 7


class LosesItsPixels(Correct):
    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "pixels": np.zeros_like(self.pixels)}


class DiesInAnotherProcess(Correct):
    def __setstate__(self, state: dict[str, object]) -> None:
        raise RuntimeError("no such server")


class AllRowsChanged(Correct):
    def changed_rows(self, content: np.ndarray, since: float) -> list[int]:
        return list(range(N))


class AnyChangeIsOfTheLastRow(Correct):
    def changed_rows(self, content: np.ndarray, since: float) -> list[int]:
        return [N - 1] if any(int(h) != self.load(i)[1] for i, h in enumerate(content)) else []


class Items(Greys):
    def __getitem__(self, i: int) -> object:
        return np.full((3, 4, 4), i / N, np.float32)


class Iterable:
    def __iter__(self) -> object:
        return iter(())
