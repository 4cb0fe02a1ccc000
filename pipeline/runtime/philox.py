"""The random number generator Philox4x32-10, and arithmetic on its bits that is the same on every machine.

Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. The generator is counter-based: a random word
is a function of (seed, stream, a, b, number) alone, so there is no generator state to advance, save or restore. Views
of images, sampling orders and the choice of anchors are drawn with it.
"""

import numpy as np
from numpy.typing import ArrayLike

# Numbers of the independent streams. They must never change, because the views of existing stores depend on them.
VIEW, ORDER, PAIRING, BANK, PICK = 0, 2, 3, 4, 5

# Multipliers and key increments (Weyl constants) of Philox4x32, from the paper's reference code Random123.
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)  # mask of the low 32 bits
_32 = np.uint64(32)


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10: four random 32-bit words for each counter.

    counter: (..., 4) uint64, each holding a 32-bit word. key: two 32-bit words. Returns (..., 4) uint64.
    """
    c0, c1, c2, c3 = (counter[..., j] for j in range(4))
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            (p1 >> _32) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _32) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1)


def words(seed: int, stream: int, a: ArrayLike, b: ArrayLike, count: int) -> np.ndarray:
    """(..., count) uint32: `count` random words for each pair of a 64-bit number a and a 32-bit number b.

    a and b are broadcast together. The key is the 64-bit seed. The four counter words are a's low half, a's high
    half, b, and stream * 2**24 + block, where each block gives four words.
    """
    wide, narrow = np.broadcast_arrays(np.asarray(a, np.uint64), np.asarray(b, np.uint64))
    blocks = -(-count // 4)
    counter = np.empty((*wide.shape, blocks, 4), np.uint64)
    counter[..., 0] = (wide & _LOW)[..., None]
    counter[..., 1] = (wide >> _32)[..., None]
    counter[..., 2] = (narrow & _LOW)[..., None]
    counter[..., 3] = np.uint64(stream << 24) + np.arange(blocks, dtype=np.uint64)
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    return philox(counter, key).reshape(*wide.shape, blocks * 4)[..., :count].astype(np.uint32)


def uniform(seed: int, stream: int, a: ArrayLike, b: ArrayLike, count: int) -> np.ndarray:
    """(..., count) float64, uniform in [0, 1): words / 2**32, which is exact in float64."""
    return words(seed, stream, a, b, count) * 2.0**-32


def permutation(seed: int, stream: int, number: int, n: int) -> np.ndarray:
    """(n,) int64, a permutation of range(n): rows sorted by a random 64-bit word each, ties by row."""
    pair = words(seed, stream, np.arange(n), number, 2).astype(np.uint64)
    return np.argsort(pair[:, 0] << _32 | pair[:, 1], kind="stable")


def exp(x: float) -> float:
    """e**x for |x| <= 1 by its power series, using only additions, products and quotients of IEEE doubles.

    IEEE 754 defines these operations to the last bit, so the result has the same bits on every machine; the exp of
    libm does not guarantee this. Twenty terms are enough for double precision.
    """
    total = 1.0
    for k in range(20, 0, -1):
        total = 1.0 + x * total / k
    return total
