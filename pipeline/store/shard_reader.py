"""Read one view of an array from the shard files of a local folder."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np
from numcodecs import Zstd

from compress_ssl.pipeline.store.layout import VIEW_BLOCK, ArrayLayout

READERS = 4  # threads that read shards of a local folder
_CRC = 4  # bytes of a checksum
_EMPTY = 2**64 - 1  # in a shard's index: a chunk of nothing but fill value


def read_view(folder: Path, grid: ArrayLayout, view: int, start: int, stop: int) -> np.ndarray:
    """(stop - start, ...) rows of one view of the sharded array in a local folder.

    The same as through Zarr, checksums included, without its copies: docs/performance.md. Raises
    ValueError where a file is not what was written.
    """
    rows, dtype = grid.shards[0], np.dtype(grid.dtype)
    out = np.empty((stop - start, *grid.shards[2:]), dtype)

    def fill(block: int) -> None:
        first, last = max(start, block * rows), min(stop, (block + 1) * rows)
        _read_shard(folder / grid.chunk_key(block, view // VIEW_BLOCK), grid, view % VIEW_BLOCK, first - block * rows,
                    out[first - start : last - start])  # fmt: skip

    with ThreadPoolExecutor(READERS, thread_name_prefix="read") as pool:
        for _ in pool.map(fill, range(start // rows, -(-stop // rows))):
            pass
    return out


def _read_shard(path: Path, grid: ArrayLayout, place: int, skip: int, out: np.ndarray) -> None:
    """Fill `out` with the rows from `skip` on of one view of a shard."""
    if not path.exists():  # Zarr writes no file of nothing but fill value
        out[...] = grid.fill
        return
    inner, chunks = grid.chunks[0], grid.shards[0] // grid.chunks[0]
    length = 16 * chunks * VIEW_BLOCK + _CRC
    with open(path, "rb", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size
        index = np.frombuffer(_checked(os.pread(file.fileno(), length, max(0, end - length))), "<u8")
        index = index.reshape(chunks, VIEW_BLOCK, 2)[:, place]
        for chunk in range(skip // inner, -(-(skip + len(out)) // inner)):
            first, last = max(skip, chunk * inner), min(skip + len(out), (chunk + 1) * inner)
            offset, size = map(int, index[chunk])
            _read_chunk(file.fileno(), grid, offset, size, first - chunk * inner, out[first - skip : last - skip])


def _read_chunk(file: int, grid: ArrayLayout, offset: int, size: int, skip: int, out: np.ndarray) -> None:
    """Fill `out` with the rows from `skip` on of a chunk that lies at `offset` of a file."""
    if offset == _EMPTY:
        out[...] = grid.fill
    elif size == out.nbytes + _CRC and not grid.compressor:  # all of it: straight to where it belongs
        checksum = bytearray(_CRC)
        got = os.preadv(file, [out.data.cast("B"), checksum], offset)
        if got != size or google_crc32c.value(out) != int.from_bytes(checksum, "little"):
            raise ValueError("a chunk does not fit its checksum")
    else:
        data = _checked(os.pread(file, size, offset))
        data = Zstd().decode(data) if grid.compressor else data
        out[...] = np.frombuffer(data, out.dtype).reshape(grid.chunks[0], *out.shape[1:])[skip : skip + len(out)]


def _checked(data: bytes) -> bytes:
    """Without the checksum behind it. Raises ValueError if it does not fit."""
    body, checksum = data[:-_CRC], data[-_CRC:]
    if len(checksum) < _CRC or google_crc32c.value(body) != int.from_bytes(checksum, "little"):
        raise ValueError("a chunk does not fit its checksum")
    return body
