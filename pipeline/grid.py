"""How the arrays of a store are cut into Zarr shards and chunks, and what is in their files.

Zarr encodes in memory; whoever keeps the store puts the bytes in place whole.
"""

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numcodecs import Zstd
from zarr.codecs import Crc32cCodec, ZstdCodec

from compress_ssl.pipeline.codecs import Codec
from compress_ssl.pipeline.storage import Folder, Storage

GROUP = "features.zarr"
OUTPUTS = ("embedding", "projection", "logits", "regions")  # of a model, and the arrays they are kept in
VIEW_BLOCK = 4
CHUNK_ROWS = 1024
TABLE_ROWS = 2**20
ZSTD_LEVEL = 1  # higher ones take up to ten times as long and save nothing on features
UNWRITTEN = 255  # status of a row no writer has reached
READERS = 4  # threads that read shards of a local folder
_CRC = 4  # bytes of a checksum
_EMPTY = 2**64 - 1  # in a shard's index: a chunk of nothing but fill value


@dataclass(frozen=True)
class Grid:
    """How an array is cut: shards (one file each) and the chunks inside them (one read each)."""

    dtype: Any
    shards: tuple[int, ...]
    chunks: tuple[int, ...]
    fill: Any
    names: tuple[str, ...]
    compressor: str = ""

    def encode(self, data: np.ndarray) -> bytes | None:
        """One shard as Zarr writes it; rows and views short of the shard's shape stay fill value.

        None for nothing but fill value: Zarr writes no file then.
        """
        files: dict[str, Any] = {}
        array = _create(files, "a", self.shards, self)
        array[tuple(slice(0, n) for n in data.shape)] = data
        return next((buffer.to_bytes() for key, buffer in files.items() if "/c/" in key), None)

    def place(self, *block: int) -> str:
        """Where a shard lies within its array: the leading numbers of its key; the others are 0."""
        return f"c/{'/'.join(map(str, block + (0,) * (len(self.shards) - len(block))))}"


def grids(identity: Mapping[str, Any], codecs: Mapping[str, Codec]) -> dict[str, Grid]:
    """The grid of every array that shards fill: features, their scales, status and content."""
    rows = identity["shard_rows"]
    inner = max(n for n in range(1, min(rows, CHUNK_ROWS) + 1) if rows % n == 0)
    out = {}
    for name, shape in identity["arrays"].items():
        axes = ("image", "view", *[f"{name}_{j}" for j in range(len(shape))])
        kind = codecs[name]
        shape = kind.shape(tuple(shape))
        out[name] = Grid(kind.dtype, (rows, VIEW_BLOCK, *shape), (inner, 1, *shape), 0, axes, kind.compressor)
        if kind.scaled:
            shard = (rows, VIEW_BLOCK, *shape[:-1])
            out[f"{name}_scale"] = Grid("<f4", shard, shard, 0, axes[:-1])
    out["status"] = Grid("u1", (rows,), (rows,), UNWRITTEN, ("image",))
    out["content"] = Grid("<u8", (rows,), (rows,), 0, ("image",))
    return out


def layout(cuts: Mapping[str, Grid], images: int, views: Mapping[str, int]) -> dict[str, bytes]:
    """{key: bytes} of the Zarr metadata of the group and of these arrays; views: of each feature array."""
    small = {f"{GROUP}/zarr.json": json.dumps({"attributes": {}, "zarr_format": 3, "node_type": "group"}).encode()}
    for name, grid in cuts.items():
        files: dict[str, Any] = {}
        extent = views.get(name.removesuffix("_scale"), 0)
        _create(files, name, (images, extent, *grid.shards[2:])[: len(grid.shards)], grid)
        small[f"{GROUP}/{name}/zarr.json"] = files[f"{name}/zarr.json"].to_bytes()
    return small


def table_files(tables: Mapping[str, Any]) -> dict[str, bytes]:
    """{key: bytes} of the per-image tables, metadata and chunks: sample_id, label, view_key."""
    out: dict[str, bytes] = {}
    for name, column in tables.items():
        files: dict[str, Any] = {}
        kind, fill = {"sample_id": (str, ""), "label": ("<i8", -1), "view_key": ("<u8", 0)}[name]
        size = min(max(1, len(column)), TABLE_ROWS)
        array = _create(files, name, (len(column),), Grid(kind, (size,), (size,), fill, ("image",)))
        array[...] = np.asarray(column, object) if kind is str else np.asarray(column)
        out |= {f"{GROUP}/{key}": buffer.to_bytes() for key, buffer in files.items() if key.startswith(f"{name}/")}
    return out


def open_group(storage: Storage) -> zarr.Group:
    """The group, to read. Zarr raises a mixed bag of exceptions if its metadata is damaged."""
    files: Any = zarr.storage.LocalStore(storage.path, read_only=True) if isinstance(storage, Folder) else None
    return zarr.open_group(files or _Objects(storage), path=GROUP, mode="r", zarr_format=3)


class _Objects(zarr.storage.ObjectStore):
    """The objects of a bucket, to read; its failures in its own words."""

    def __init__(self, bucket: Any):
        super().__init__(bucket.objects, read_only=True)
        self.bucket = bucket

    async def get(self, *asked: Any, **how: Any) -> Any:
        with self.bucket.worded():
            return await super().get(*asked, **how)


def read_view(folder: Path, grid: Grid, view: int, start: int, stop: int) -> np.ndarray:
    """(stop - start, ...) rows of one view of the sharded array in a local folder.

    The same as through Zarr, checksums included, without its copies: docs/performance.md. Raises
    ValueError where a file is not what was written.
    """
    rows, dtype = grid.shards[0], np.dtype(grid.dtype)
    out = np.empty((stop - start, *grid.shards[2:]), dtype)

    def fill(block: int) -> None:
        first, last = max(start, block * rows), min(stop, (block + 1) * rows)
        _read_shard(folder / grid.place(block, view // VIEW_BLOCK), grid, view % VIEW_BLOCK, first - block * rows,
                    out[first - start : last - start])  # fmt: skip

    with ThreadPoolExecutor(READERS, thread_name_prefix="read") as pool:
        for _ in pool.map(fill, range(start // rows, -(-stop // rows))):
            pass
    return out


def _read_shard(path: Path, grid: Grid, place: int, skip: int, out: np.ndarray) -> None:
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


def _read_chunk(file: int, grid: Grid, offset: int, size: int, skip: int, out: np.ndarray) -> None:
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


def _create(files: dict[str, Any], name: str, shape: tuple[int, ...], grid: Grid) -> zarr.Array:
    sharded = grid.shards != grid.chunks
    compressors = [ZstdCodec(level=ZSTD_LEVEL)] if grid.compressor == "zstd" else []
    return zarr.create_array(
        zarr.storage.MemoryStore(store_dict=files),
        name=name,
        shape=shape,
        shards=grid.shards if sharded else None,
        chunks=grid.chunks,
        dtype=grid.dtype,
        compressors=[*compressors, Crc32cCodec()],
        fill_value=grid.fill,
        dimension_names=grid.names,
    )
