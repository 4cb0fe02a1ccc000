"""How features are stored, and the error each choice may cause.

A codec turns float32 features (n, D) into one array of the store and, where it needs one, a scale
per row; `decode` gives float32 back. Bytes per view: float32 4 D, float16 2 D, int8 D + 4.
"""

from abc import ABC, abstractmethod

import numpy as np

from pipeline.artifact import UserError


class Codec(ABC):
    """Stored form of features. `scaled`: a float32 per (i, v) lies beside the array."""

    name: str
    dtype: np.dtype
    scaled = False
    limit = float("inf")  # largest magnitude it can hold

    @abstractmethod
    def encode(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """(..., D) float32, finite -> ((..., D) stored, (...) float32 scale or None)."""

    @abstractmethod
    def decode(self, stored: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
        """The other way: (..., D) float32."""


class Float32(Codec):
    """Exact."""

    name, dtype = "float32", np.dtype("<f4")

    def encode(self, features: np.ndarray) -> tuple[np.ndarray, None]:
        return features.astype(self.dtype), None

    def decode(self, stored: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
        return stored.astype(np.float32, copy=False)


class Float16(Codec):
    """Relative error at most 2**-11; magnitudes up to 65504."""

    name, dtype, limit = "float16", np.dtype("<f2"), 65504.0

    def encode(self, features: np.ndarray) -> tuple[np.ndarray, None]:
        return features.astype(self.dtype), None

    def decode(self, stored: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
        return stored.astype(np.float32)


class Int8(Codec):
    """One scale per row: error of a coordinate at most half of (largest magnitude of the row) / 127."""

    name, dtype, scaled = "int8", np.dtype("i1"), True

    def encode(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scale = np.abs(features).max(-1, initial=0.0).astype(np.float32) / np.float32(127)
        safe = np.where(scale > 0, scale, np.float32(1))
        # clip: a scale of a few denormal steps is rounded, and 128 would turn into -128
        return np.rint(features / safe[..., None]).clip(-127, 127).astype(self.dtype), scale.astype("<f4")

    def decode(self, stored: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
        assert scale is not None
        return stored.astype(np.float32) * scale[..., None]


CODECS: dict[str, type[Codec]] = {"int8": Int8, "float16": Float16, "float32": Float32}


def codec(name: str) -> Codec:
    """Raises UserError for an unknown name."""
    if name not in CODECS:
        raise UserError(f"unknown codec {name!r}. Known: {', '.join(CODECS)}")
    return CODECS[name]()
