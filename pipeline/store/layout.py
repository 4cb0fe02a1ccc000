"""How the arrays of a store are cut into Zarr shards and chunks, and what is in their files.

Zarr encodes in memory; whoever keeps the store puts the bytes in place whole.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from compress_ssl.pipeline.runtime.storage import Folder, Storage
from compress_ssl.pipeline.store.codecs import Codec

GROUP = "features.zarr"
VIEW_BLOCK = 4
CHUNK_ROWS = 1024
TABLE_ROWS = 2**20
ZSTD_LEVEL = 1  # higher ones take up to ten times as long and save nothing on features
UNWRITTEN = 255  # status of a row no writer has reached


@dataclass(frozen=True)
class ArrayLayout:
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

    def chunk_key(self, *block: int) -> str:
        """Where a shard lies within its array: the leading numbers of its key; the others are 0."""
        return f"c/{'/'.join(map(str, block + (0,) * (len(self.shards) - len(block))))}"


def array_layouts(identity: Mapping[str, Any], codecs: Mapping[str, Codec]) -> dict[str, ArrayLayout]:
    """The grid of every array that shards fill: features, their scales, status and content."""
    rows = identity["shard_rows"]
    inner = max(n for n in range(1, min(rows, CHUNK_ROWS) + 1) if rows % n == 0)
    out = {}
    for name, shape in identity["arrays"].items():
        axes = ("image", "view", *[f"{name}_{j}" for j in range(len(shape))])
        kind = codecs[name]
        shape = kind.shape(tuple(shape))
        out[name] = ArrayLayout(kind.dtype, (rows, VIEW_BLOCK, *shape), (inner, 1, *shape), 0, axes, kind.compressor)
        if kind.scaled:
            shard = (rows, VIEW_BLOCK, *shape[:-1])
            out[f"{name}_scale"] = ArrayLayout("<f4", shard, shard, 0, axes[:-1])
    out["status"] = ArrayLayout("u1", (rows,), (rows,), UNWRITTEN, ("image",))
    out["content"] = ArrayLayout("<u8", (rows,), (rows,), 0, ("image",))
    return out


def zarr_metadata(cuts: Mapping[str, ArrayLayout], images: int, views: Mapping[str, int]) -> dict[str, bytes]:
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
        array = _create(files, name, (len(column),), ArrayLayout(kind, (size,), (size,), fill, ("image",)))
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
        with self.bucket.translated_errors():
            return await super().get(*asked, **how)


def _create(files: dict[str, Any], name: str, shape: tuple[int, ...], grid: ArrayLayout) -> zarr.Array:
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
