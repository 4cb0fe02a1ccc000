"""How features are stored, and the error each choice may cause. What each costs: docs/codecs.md.

A codec turns float32 features (n, D) into one array of the store and, where it needs one, a scale
per row; `decode` gives float32 back. Bytes per view: float32 4 D, float16 2 D, int8 D + 4, pq:M M + 4;
`+zstd` behind any of them compresses what lies on disk without loss.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import safetensors.numpy

from compress_ssl.pipeline.runtime.artifact import UserError

CENTROIDS = 256  # of a product quantiser's part: a byte tells which
PART_WIDTH = 4  # dimensions that a part keeps: wider parts cost time and gain nothing, docs/codecs.md
ENCODE_ROWS = 1024  # rows that are normalised and rotated at a time; bounds the memory, changes no bit
DECODE_ROWS = 4096
SAMPLE = 65_536  # vectors that a quantiser learns from at most


class Codec(ABC):
    """Stored form of features. `scaled`: a float32 per (i, v) lies beside the array."""

    name: str
    dtype: np.dtype
    scaled = False
    compressor = ""  # lossless compression of what lies on disk
    limit = float("inf")  # largest magnitude it can hold

    def shape(self, features: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in which features (..., D) are stored. Raises UserError if they do not fit."""
        return features

    def size(self, features: tuple[int, ...]) -> int:
        """Bytes that features of this shape take, before lossless compression."""
        stored = self.shape(features)
        return int(np.prod(stored)) * self.dtype.itemsize + 4 * int(np.prod(stored[:-1])) * self.scaled

    @abstractmethod
    def encode(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """(..., D) float32, finite -> ((..., D) stored, (...) float32 scale or None)."""

    @abstractmethod
    def decode(self, stored: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
        """The other way: (..., D) float32."""


class Trained(Codec):
    """A codec that needs a codebook, learnt from some of the features."""

    @abstractmethod
    def train(self, features: np.ndarray) -> bytes:
        """The codebook, learnt from float32 features (..., D)."""


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


class ProductQuantiser(Trained):
    """M bytes per row for its direction, and its norm, which comes back exact.

    Jégou et al. 2011 with the rotation of Ge et al., Optimized Product Quantization, 2014, in its closed
    form: the unit vector less the mean is projected on its principal axes, which are dealt out to M parts
    so that the products of their variances are alike. Each part takes the nearest of 256 centroids, which
    FAISS finds. FAISS's own iterations of the rotation, started from here, change nothing: docs/codecs.md.
    """

    dtype, scaled, limit = np.dtype("u1"), True, 1e36

    def __init__(self, parts: int, codebook: Callable[[], bytes]):
        """codebook: fetches what `train` made, at the first row that is encoded or decoded."""
        self.name, self.parts, self._fetch = f"pq:{parts}", parts, codebook

    def shape(self, features: tuple[int, ...]) -> tuple[int, ...]:
        if self.parts > features[-1]:
            raise UserError(
                f"--codec {self.name} keeps {self.parts} bytes of a vector that has only {features[-1]} numbers; "
                f"use pq:{features[-1]} or less, or int8"
            )
        return (*features[:-1], self.parts)

    @cached_property
    def _book(self) -> dict[str, np.ndarray]:
        """mean (D,), rotation (M d, D) with orthonormal rows, centroids (M, 256, d)."""
        return safetensors.numpy.load(self._fetch())

    @cached_property
    def _quantiser(self) -> Any:
        """FAISS's, for parts narrow enough that it treats every row alone."""
        import faiss

        centroids = self._book["centroids"]
        quantiser = faiss.ProductQuantizer(self.parts * centroids.shape[-1], self.parts, 8)
        faiss.copy_array_to_vector(centroids.reshape(-1), quantiser.centroids)
        return quantiser

    @cached_property
    def _squares(self) -> np.ndarray:
        """(M, 256) float64: what each centroid adds to the squared length of what is decoded."""
        mean, rotation, centroids = (self._book[key].astype(np.float64) for key in ("mean", "rotation", "centroids"))
        onto_mean = (rotation @ mean).reshape(self.parts, 1, -1)
        return (centroids * (centroids + 2 * onto_mean)).sum(-1) + mean @ mean / self.parts

    def encode(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean, rotation = self._book["mean"], self._book["rotation"]
        flat = features.reshape(-1, features.shape[-1])
        norm = np.sqrt(np.square(flat, dtype=np.float64).sum(1))
        turned = np.empty((len(flat), len(rotation)), np.float32)
        for start in range(0, len(flat), ENCODE_ROWS):
            rows = slice(start, start + ENCODE_ROWS)
            unit = flat[rows] / np.where(norm[rows] > 0, norm[rows], 1)[:, None]
            centred = (unit.astype(np.float32) - mean)[:, None]
            # One vector-matrix product per row: a row's bits in a matrix-matrix product depend on its place in the
            # block with OpenBLAS's Haswell and Zen kernels. 2 to 4 times slower, at most 25 us a row.
            turned[rows] = np.matmul(centred, rotation.T)[:, 0]
        codes = self._quantiser.compute_codes(turned).reshape(len(flat), self.parts)
        codes[norm == 0] = 0
        length = np.sqrt(np.maximum(self._squares[np.arange(self.parts), codes].sum(1), 1e-12))
        scale = (norm / length).astype("<f4")
        return codes.reshape(*features.shape[:-1], self.parts), scale.reshape(features.shape[:-1])

    def decode(self, stored: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
        assert scale is not None
        mean, rotation, centroids = self._book["mean"], self._book["rotation"], self._book["centroids"]
        table, first = centroids.reshape(-1, centroids.shape[-1]), np.arange(self.parts) * CENTROIDS
        codes = stored.reshape(-1, self.parts)
        out = np.empty((len(codes), len(mean)), np.float32)
        for start in range(0, len(codes), DECODE_ROWS):
            rows = slice(start, start + DECODE_ROWS)
            parts = table[codes[rows] + first].reshape(-1, 1, len(rotation))
            np.matmul(parts, rotation, out=out[rows, None])  # a product per row, as in `encode`
        out += mean
        out *= scale.reshape(-1, 1)
        return out.reshape(*stored.shape[:-1], len(mean))

    def train(self, features: np.ndarray) -> bytes:
        """Safetensors of mean, rotation and centroids. Raises UserError if all features are zero."""
        import faiss

        flat = features.reshape(-1, features.shape[-1])
        norm = np.sqrt(np.square(flat, dtype=np.float64).sum(1))
        flat, norm = flat[norm > 0], norm[norm > 0]
        if not len(flat):
            raise UserError(f"--codec {self.name} has nothing to learn from: every sampled feature is zero; use int8")
        take = np.linspace(0, len(flat) - 1, min(len(flat), SAMPLE)).astype(np.int64)
        take = np.resize(take, max(len(take), CENTROIDS))  # FAISS wants a vector per centroid
        units = (flat[take] / norm[take, None]).astype(np.float32)
        mean = units.mean(0, dtype=np.float64).astype(np.float32)
        units -= mean
        width = min(units.shape[1] // self.parts, PART_WIDTH)
        rotation = principal(units, self.parts, width)
        quantiser = faiss.ProductQuantizer(self.parts * width, self.parts, 8)
        quantiser.cp.min_points_per_centroid = 1  # small sets are known to be small
        quantiser.train(np.ascontiguousarray(units @ rotation.T))
        centroids = faiss.vector_to_array(quantiser.centroids).reshape(self.parts, CENTROIDS, width)
        return safetensors.numpy.save({"mean": mean, "rotation": rotation, "centroids": centroids})


def principal(centred: np.ndarray, parts: int, width: int) -> np.ndarray:
    """(parts * width, D): the principal axes, dealt in rounds, largest first, to the part with the smallest product."""
    variance, axes = np.linalg.eigh(centred.T.astype(np.float64) @ centred / len(centred))
    variance, axes = variance[::-1], axes[:, ::-1]
    weight = np.log(np.maximum(variance, max(variance[0] * 1e-12, 1e-30)))
    dealt: list[list[int]] = [[] for _ in range(parts)]
    total = np.zeros(parts)
    for axis in range(parts * width):
        part = min((m for m in range(parts) if len(dealt[m]) < width), key=lambda m: (len(dealt[m]), total[m]))
        dealt[part].append(axis)
        total[part] += weight[axis]
    return np.ascontiguousarray(axes[:, [axis for part in dealt for axis in part]].T.astype(np.float32))


CODECS: dict[str, type[Codec]] = {"int8": Int8, "float16": Float16, "float32": Float32}
COMPRESSORS = ("zstd",)
KNOWN = f"{', '.join(CODECS)}, pq:BYTES, each also with +{' or +'.join(COMPRESSORS)}"


def codec(name: str, codebook: Callable[[], bytes] | None = None) -> Codec:
    """Of `int8`, `pq:64`, `float16+zstd`; codebook fetches what a trained one was trained to.

    Raises UserError for an unknown name.
    """
    kind, _, compressor = name.partition("+")
    made: Codec
    if kind.startswith("pq:") and kind[3:].isdecimal() and int(kind[3:]) > 0:
        made = ProductQuantiser(int(kind[3:]), codebook or _untrained)
    elif kind in CODECS:
        made = CODECS[kind]()
    else:
        raise UserError(f"unknown codec {name!r}. Known: {KNOWN}")
    if "+" in name and compressor not in COMPRESSORS:
        raise UserError(f"unknown compression {compressor!r} of --codec {name}. Known: {', '.join(COMPRESSORS)}")
    made.name, made.compressor = name, compressor
    return made


def _untrained() -> bytes:
    raise UserError("this product quantiser has no codebook yet: it is trained when a store is exported")
