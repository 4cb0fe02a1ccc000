"""scikit-learn's handwritten digits: 1797 images of 8 x 8 pixels in ten classes; nothing is downloaded."""

from typing import Literal

import numpy as np

from compress_ssl.pipeline.datasets.base import Dataset, content_hash


class Digits(Dataset):
    """scikit-learn's digits (8 x 8, ten classes, inside the package). Every fifth image is the test split.

    Each image is greyscale with values 0 to 16, scaled to 0 to 255 and repeated for the three channels.
    """

    def __init__(self, *, split: Literal["train", "test", "all"] = "train"):
        from sklearn.datasets import load_digits

        digits = load_digits()
        number = np.arange(len(digits.images))
        rows = number if split == "all" else number[(number % 5 == 4) == (split == "test")]
        grey = np.round(digits.images[rows] * (255 / 16)).astype(np.uint8)
        self._pixels = np.repeat(grey[..., None], 3, axis=-1)  # (N, 8, 8, 3)
        self.ids = [f"digits/{i:04d}" for i in rows]
        self.label = digits.target[rows].astype(np.int64)
        self.classes = tuple("0123456789")

    def load(self, i: int) -> tuple[np.ndarray, int]:
        return self._pixels[i], content_hash(self._pixels[i])
