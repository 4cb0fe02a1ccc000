"""Codecs: the formats in which features are stored, with the error that each may cause.

A codec encodes float32 features (n, D) to an array of the store and, if it needs one, a float32 scale per row;
`decode` returns float32 again. Bytes per image and view: float32 4 D, float16 2 D, int8 D + 4, pq:M M + 4. `+zstd`
behind any name compresses the files without loss. Sizes, speeds and errors are measured in docs/codecs.md.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import safetensors.numpy

from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.formatting import describe_exception

CENTROIDS = 256  # per part of a product quantiser: as many as the one byte of a code can number
PART_WIDTH = 4  # largest number of dimensions of a part; wider parts cost time and gain nothing, docs/codecs.md
ENCODE_ROWS = 1024  # rows that are normalised and rotated at a time; bounds the memory, changes no bit
DECODE_ROWS = 4096  # rows that are decoded at a time; bounds the memory, changes no bit
MAX_SHOWN = 80  # characters of a wrong name that an error repeats
SAMPLE = 65_536  # largest number of vectors that a quantiser is trained on; bounds the time of k-means

Stored = tuple[np.ndarray, np.ndarray | None]
"""What `encode` returns: (stored array, float32 scale of each row or None)."""


class Codec(ABC):
    """A format in which features are stored."""

    name: str  # as in --codec
    dtype: np.dtype  # of the stored array
    scaled = False  # whether a second array holds a float32 scale per (i, v)
    compressor = ""  # lossless compression of the files: "zstd" or none
    limit = float("inf")  # largest magnitude that can be stored

    def shape(self, features: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the stored array for features of shape (..., D). Raises UserError if the codec cannot store them."""
        return features

    def size(self, features: tuple[int, ...]) -> int:
        """Number of bytes that features of this shape take, scales included, before lossless compression."""
        stored = self.shape(features)
        return int(np.prod(stored)) * self.dtype.itemsize + 4 * int(np.prod(stored[:-1])) * self.scaled

    @abstractmethod
    def encode(self, features: np.ndarray) -> Stored:
        """Encode finite float32 features (..., D): (stored array, (...) float32 scale or None)."""

    @abstractmethod
    def decode(self, stored: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
        """Decode what `encode` returned: (..., D) float32."""


class Trained(Codec):
    """A codec with a codebook that is trained on a sample of the features."""

    @abstractmethod
    def fault_of(self, codebook: bytes, width: int) -> str:
        """Why the bytes of a file are no codebook for features (..., width), in words; "" if they are one."""

    @abstractmethod
    def train(self, features: np.ndarray) -> bytes:
        """Train a codebook on float32 features (..., D) and return it as the bytes of a file."""


class Float32(Codec):
    """Exact: 4 bytes per number."""

    name, dtype = "float32", np.dtype("<f4")

    def encode(self, features: np.ndarray) -> tuple[np.ndarray, None]:
        return features.astype(self.dtype), None

    def decode(self, stored: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
        return stored.astype(np.float32, copy=False)


class Float16(Codec):
    """2 bytes per number: relative error at most 2**-11, magnitudes up to 65504."""

    name, dtype, limit = "float16", np.dtype("<f2"), 65504.0

    def encode(self, features: np.ndarray) -> tuple[np.ndarray, None]:
        return features.astype(self.dtype), None

    def decode(self, stored: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
        return stored.astype(np.float32)


class Int8(Codec):
    """1 byte per number and a scale per row, which is the row's largest magnitude / 127.

    The error of a coordinate is at most half of the scale.
    """

    name, dtype, scaled = "int8", np.dtype("i1"), True

    def encode(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scale = np.abs(features).max(-1, initial=0.0).astype(np.float32) / np.float32(127)
        safe = np.where(scale > 0, scale, np.float32(1))
        # Clip, because a subnormal scale is rounded coarsely, and 128 would overflow to -128.
        return np.rint(features / safe[..., None]).clip(-127, 127).astype(self.dtype), scale.astype("<f4")

    def decode(self, stored: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
        assert scale is not None
        values: np.ndarray = stored.astype(np.float32) * scale[..., None]
        return values


class ProductQuantiser(Trained):
    """M bytes per row for the direction of a feature, and its norm exactly.

    Product quantization (Jégou et al., TPAMI 2011) with the rotation of Optimized Product Quantization (Ge et al.,
    TPAMI 2014) in its closed form: the mean is subtracted from the unit vectors, the result is projected on its
    principal axes, and the axes are distributed over M parts so that the products of their variances are balanced.
    Each part is stored as the index of the nearest of 256 centroids, which FAISS trains and finds. FAISS's iterations
    of the rotation, started from this one, improve nothing (docs/codecs.md).
    """

    dtype, scaled, limit = np.dtype("u1"), True, 1e36

    def __init__(self, parts: int, codebook: Callable[[], bytes]):
        """parts: M. codebook: returns the bytes that `train` made; it is called when the first row is processed."""
        self.name, self.parts, self._load_codebook = f"pq:{parts}", parts, codebook

    def shape(self, features: tuple[int, ...]) -> tuple[int, ...]:
        if self.parts > features[-1]:
            raise UserError(
                f"--codec {self.name} keeps {self.parts} bytes of a vector that has only {features[-1]} numbers; "
                f"use pq:{features[-1]} or less, or int8"
            )
        return (*features[:-1], self.parts)

    def fault_of(self, codebook: bytes, width: int) -> str:
        try:
            arrays = safetensors.numpy.load(codebook)
        except Exception as problem:  # of several types: a header that lies, a type of numbers that numpy has not
            return describe_exception(problem)
        part = min(width // self.parts, PART_WIDTH)
        shapes = {"mean": (width,), "rotation": (self.parts * part, width), "centroids": (self.parts, CENTROIDS, part)}
        for name, shape in shapes.items():
            array = arrays.get(name)
            if array is None or array.shape != shape or array.dtype != np.float32:
                found = "is missing" if array is None else f"has the shape {array.shape} and the type {array.dtype}"
                return f"{name} {found}, but must have {shape} and float32"
            if not np.isfinite(array).all():
                return f"{name} has values that are not finite"
        return ""

    @cached_property
    def _codebook(self) -> dict[str, np.ndarray]:
        """mean (D,), rotation (M d, D) with orthonormal rows, centroids (M, 256, d)."""
        return safetensors.numpy.load(self._load_codebook())

    @cached_property
    def _quantiser(self) -> Any:  # faiss has no types
        """The FAISS quantiser with our centroids. Parts of PART_WIDTH are narrow enough that it encodes row by row."""
        import faiss

        centroids = self._codebook["centroids"]
        quantiser = faiss.ProductQuantizer(self.parts * centroids.shape[-1], self.parts, 8)
        faiss.copy_array_to_vector(centroids.reshape(-1), quantiser.centroids)
        return quantiser

    @cached_property
    def _squares(self) -> np.ndarray:
        """(M, 256) float64: the contribution of each centroid to the squared norm of a decoded vector.

        |rotation^T c + mean|^2 = sum over parts of c . (c + 2 rotation mean), plus |mean|^2.
        """
        mean, rotation, centroids = (
            self._codebook[key].astype(np.float64) for key in ("mean", "rotation", "centroids")
        )
        rotated_mean = (rotation @ mean).reshape(self.parts, 1, -1)
        squares: np.ndarray = (centroids * (centroids + 2 * rotated_mean)).sum(-1) + mean @ mean / self.parts
        return squares

    def encode(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean, rotation = self._codebook["mean"], self._codebook["rotation"]
        flat = features.reshape(-1, features.shape[-1])
        norm = np.sqrt(np.square(flat, dtype=np.float64).sum(1))
        rotated = np.empty((len(flat), len(rotation)), np.float32)
        for start in range(0, len(flat), ENCODE_ROWS):
            rows = slice(start, start + ENCODE_ROWS)
            unit = flat[rows] / np.where(norm[rows] > 0, norm[rows], 1)[:, None]
            centred = (unit.astype(np.float32) - mean)[:, None]
            # One vector-matrix product per row. In a matrix-matrix product the bits of a row depend on its position
            # in the block with OpenBLAS's Haswell and Zen kernels. This is 2 to 4 times slower, but adds at most
            # 25 us per row for 2048 dimensions and 512 rotated ones.
            rotated[rows] = np.matmul(centred, rotation.T)[:, 0]
        codes = self._quantiser.compute_codes(rotated).reshape(len(flat), self.parts)
        codes[norm == 0] = 0
        length = np.sqrt(np.maximum(self._squares[np.arange(self.parts), codes].sum(1), 1e-12))
        scale = (norm / length).astype("<f4")
        return codes.reshape(*features.shape[:-1], self.parts), scale.reshape(features.shape[:-1])

    def decode(self, stored: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
        assert scale is not None
        mean, rotation, centroids = self._codebook["mean"], self._codebook["rotation"], self._codebook["centroids"]
        table, first = centroids.reshape(-1, centroids.shape[-1]), np.arange(self.parts) * CENTROIDS
        codes = stored.reshape(-1, self.parts)
        out = np.empty((len(codes), len(mean)), np.float32)
        for start in range(0, len(codes), DECODE_ROWS):
            rows = slice(start, start + DECODE_ROWS)
            parts = table[codes[rows] + first].reshape(-1, 1, len(rotation))
            np.matmul(parts, rotation, out=out[rows, None])  # one product per row, as in `encode`
        out += mean
        out *= scale.reshape(-1, 1)
        return out.reshape(*stored.shape[:-1], len(mean))

    def train(self, features: np.ndarray) -> bytes:
        """Train mean, rotation and centroids; return them as safetensors. Raises UserError if all features are zero."""
        import faiss

        flat = features.reshape(-1, features.shape[-1])
        norm = np.sqrt(np.square(flat, dtype=np.float64).sum(1))
        flat, norm = flat[norm > 0], norm[norm > 0]
        if not len(flat):
            raise UserError(f"--codec {self.name} cannot be trained: every sampled feature is zero; use int8")
        sample = np.linspace(0, len(flat) - 1, min(len(flat), SAMPLE)).astype(np.int64)
        sample = np.resize(sample, max(len(sample), CENTROIDS))  # FAISS needs at least one vector per centroid
        units = (flat[sample] / norm[sample, None]).astype(np.float32)
        mean = units.mean(0, dtype=np.float64).astype(np.float32)
        units -= mean
        width = min(units.shape[1] // self.parts, PART_WIDTH)
        rotation = principal_axes(units, self.parts, width)
        quantiser = faiss.ProductQuantizer(self.parts * width, self.parts, 8)
        quantiser.cp.min_points_per_centroid = 1  # no warning about a small training set
        quantiser.train(np.ascontiguousarray(units @ rotation.T))
        centroids = faiss.vector_to_array(quantiser.centroids).reshape(self.parts, CENTROIDS, width)
        return safetensors.numpy.save({"mean": mean, "rotation": rotation, "centroids": centroids})


def principal_axes(centred: np.ndarray, parts: int, width: int) -> np.ndarray:
    """(parts * width, D): orthonormal principal axes of centred vectors (n, D), grouped by part.

    The axes are assigned in the order of their variance, largest first, each to the part with the fewest axes; among
    those to the part with the smallest product of variances (Ge et al. 2014, "eigenvalue allocation").
    """
    variance, axes = np.linalg.eigh(centred.T.astype(np.float64) @ centred / len(centred))
    variance, axes = variance[::-1], axes[:, ::-1]
    log_variance = np.log(np.maximum(variance, max(variance[0] * 1e-12, 1e-30)))  # the floor keeps it finite
    assigned: list[list[int]] = [[] for _ in range(parts)]
    log_product = np.zeros(parts)
    for axis in range(parts * width):
        unfilled = [m for m in range(parts) if len(assigned[m]) < width]
        part = min(unfilled, key=lambda m: (len(assigned[m]), log_product[m]))
        assigned[part].append(axis)
        log_product[part] += log_variance[axis]
    order = [axis for part in assigned for axis in part]
    return np.ascontiguousarray(axes[:, order].T.astype(np.float32))


CODECS: dict[str, type[Codec]] = {"int8": Int8, "float16": Float16, "float32": Float32}
"""Codecs without a parameter, by name. `codec` builds `pq:BYTES`."""

COMPRESSORS = ("zstd",)
KNOWN = f"{', '.join(CODECS)}, pq:BYTES, each also with +{' or +'.join(COMPRESSORS)}"


def build_codec(name: str, codebook: Callable[[], bytes] | None = None) -> Codec:
    """Build the codec of a name such as `int8`, `pq:64` or `float16+zstd`.

    codebook: returns the bytes of a trained codec's codebook. Raises UserError for an unknown name.
    """
    kind, _, compressor = name.partition("+")
    shown = name[:MAX_SHOWN]
    built: Codec
    if re.fullmatch(r"pq:[1-9][0-9]{0,8}", kind, re.ASCII):
        built = ProductQuantiser(int(kind[3:]), codebook or _raise_untrained)
    elif kind in CODECS:
        built = CODECS[kind]()
    else:
        raise UserError(f"unknown codec {shown!r}. Known: {KNOWN}")
    if "+" in name and compressor not in COMPRESSORS:
        known = ", ".join(COMPRESSORS)
        raise UserError(f"unknown compression {compressor[:MAX_SHOWN]!r} of --codec {shown}. Known: {known}")
    built.name, built.compressor = name, compressor
    return built


def _raise_untrained() -> bytes:
    raise UserError("this product quantiser has no codebook yet: it is trained when a store is exported")
