"""Read one view of a sharded array from the files of a local folder, without Zarr.

The format is that of Zarr's sharding codec: chunks, then an index of (offset, size) pairs with a CRC-32C.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np
from numcodecs import Zstd

from compress_ssl.pipeline.store.layout import VIEW_BLOCK, ArrayLayout

READERS = 4  # threads per call; each reads one shard at a time
_CRC_BYTES = 4  # length of a CRC-32C
_INDEX_ENTRY_BYTES = 16  # offset and size of a chunk, 8 bytes each
_EMPTY = 2**64 - 1  # offset in the index of a chunk of nothing but fill value


def read_view(folder: Path, layout: ArrayLayout, view: int, start: int, stop: int) -> np.ndarray:
    """Rows start..stop-1 of one view of the sharded array in a local folder: (stop - start, ...).

    The result is what Zarr returns, and checksums are checked too, but without Zarr's copies (docs/performance.md).
    Raises ValueError if a chunk or an index does not fit its checksum.
    """
    rows, dtype = layout.shards[0], np.dtype(layout.dtype)
    out = np.empty((stop - start, *layout.shards[2:]), dtype)

    def fill(block: int) -> None:
        first, last = max(start, block * rows), min(stop, (block + 1) * rows)
        path = folder / layout.chunk_key(block, view // VIEW_BLOCK)
        _read_shard(path, layout, view % VIEW_BLOCK, first - block * rows, out[first - start : last - start])

    with ThreadPoolExecutor(READERS, thread_name_prefix="read") as pool:
        for _ in pool.map(fill, range(start // rows, -(-stop // rows))):
            pass
    return out


def _read_shard(path: Path, layout: ArrayLayout, column: int, skip: int, out: np.ndarray) -> None:
    """Fill `out` with rows of one view of a shard, starting at row `skip`; column: index of the view in the shard."""
    if not path.exists():  # a shard of nothing but fill value has no file
        out[...] = layout.fill
        return
    inner, chunks = layout.chunks[0], layout.shards[0] // layout.chunks[0]
    length = _INDEX_ENTRY_BYTES * chunks * VIEW_BLOCK + _CRC_BYTES
    with open(path, "rb", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size
        index = np.frombuffer(_strip_checksum(os.pread(file.fileno(), length, max(0, end - length))), "<u8")
        index = index.reshape(chunks, VIEW_BLOCK, 2)[:, column]
        for chunk in range(skip // inner, -(-(skip + len(out)) // inner)):
            first, last = max(skip, chunk * inner), min(skip + len(out), (chunk + 1) * inner)
            offset, size = map(int, index[chunk])
            _read_chunk(file.fileno(), layout, offset, size, first - chunk * inner, out[first - skip : last - skip])


def _read_chunk(file: int, layout: ArrayLayout, offset: int, size: int, skip: int, out: np.ndarray) -> None:
    """Fill `out` with rows of the chunk at `offset` of a file, starting at row `skip` of the chunk."""
    entire = size == out.nbytes + _CRC_BYTES and not layout.compressor
    if offset == _EMPTY:
        out[...] = layout.fill
    elif entire:  # `out` takes all rows of the chunk: read them into it without a copy
        checksum = bytearray(_CRC_BYTES)
        got = os.preadv(file, [out.data.cast("B"), checksum], offset)
        if got != size or google_crc32c.value(out) != int.from_bytes(checksum, "little"):
            raise ValueError("a chunk does not fit its checksum")
    else:
        data = _strip_checksum(os.pread(file, size, offset))
        data = Zstd().decode(data) if layout.compressor else data
        out[...] = np.frombuffer(data, out.dtype).reshape(layout.chunks[0], *out.shape[1:])[skip : skip + len(out)]


def _strip_checksum(data: bytes) -> bytes:
    """`data` without the CRC-32C at its end. Raises ValueError if the checksum does not fit."""
    body, checksum = data[:-_CRC_BYTES], data[-_CRC_BYTES:]
    if len(checksum) < _CRC_BYTES or google_crc32c.value(body) != int.from_bytes(checksum, "little"):
        raise ValueError("a chunk does not fit its checksum")
    return body
