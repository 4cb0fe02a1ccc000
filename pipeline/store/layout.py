"""The layout of a store's arrays: their Zarr shards and chunks, and the bytes of their files.

Zarr encodes in memory only. `FeatureStore` writes the bytes, each file as a whole.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import zarr
from numpy.typing import DTypeLike, NDArray
from zarr.abc.store import ByteRequest, Store
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.core.metadata import ArrayV3Metadata

from compress_ssl.pipeline.runtime.storage import Folder, Storage
from compress_ssl.pipeline.store.codecs import Codec

if TYPE_CHECKING:
    from compress_ssl.pipeline.runtime.object_store import Bucket

GROUP = "features.zarr"  # folder of the Zarr group inside a store
VIEW_BLOCK = 4  # views per shard file; part of the format
CHUNK_ROWS = 1024  # largest number of rows of a chunk, the unit of reading
TABLE_ROWS = 2**20  # rows per chunk of the per-image tables: one file for up to a million images
ZSTD_LEVEL = 1  # higher levels take up to ten times as long and save nothing on features
UNWRITTEN = 255  # status of a row that is not written yet; the other codes are in datasets/decode.py


# Arrays that are written once, as a whole: {name: (type, value of what is not written)}.
TABLES: Mapping[str, tuple[DTypeLike, int | str]] = {
    "sample_id": (str, ""),
    "label": ("<i8", -1),
    "view_key": ("<u8", 0),
}

Column = Sequence[str] | Sequence[int] | NDArray[np.generic]  # the (N,) values of a table
Files = dict[str, Buffer]  # what Zarr writes into memory, by key
ZarrGroup = zarr.Group
ZarrArray = zarr.Array[ArrayV3Metadata]


@dataclass(frozen=True)
class ArrayLayout:
    """How an array is divided: into shards (one file each) and into chunks inside a shard (one read each)."""

    dtype: DTypeLike
    shards: tuple[int, ...]  # shape of a shard
    chunks: tuple[int, ...]  # shape of a chunk
    fill: int | str  # value of what is not written
    names: tuple[str, ...]  # of the axes
    compressor: str = ""  # "zstd" or none

    def encode(self, data: np.ndarray) -> bytes | None:
        """The bytes of one shard as Zarr writes it. `data` may be smaller than a shard; the rest stays fill value.

        Returns None for nothing but fill value: Zarr writes no file then.
        """
        files: Files = {}
        array = _create(files, "a", self.shards, self)
        array[tuple(slice(0, n) for n in data.shape)] = data
        return next((buffer.to_bytes() for key, buffer in files.items() if "/c/" in key), None)

    def shape(self, images: int, views: int) -> tuple[int, ...]:
        """Shape of the whole array. Status and content have only the axis of the images."""
        return (images, views, *self.shards[2:])[: len(self.shards)]

    def chunk_key(self, *block: int) -> str:
        """Key of a shard within its array. `block` gives the leading indices; the others are 0."""
        return f"c/{'/'.join(map(str, block + (0,) * (len(self.shards) - len(block))))}"


def array_layouts(
    rows: int, arrays: Mapping[str, Sequence[int]], codecs: Mapping[str, Codec]
) -> dict[str, ArrayLayout]:
    """The layout of every array that is written by shards: features, their scales, status and content.

    rows: of a shard; arrays: {name: shape of one (i, v)}.
    """
    inner = max(n for n in range(1, min(rows, CHUNK_ROWS) + 1) if rows % n == 0)
    out = {}
    for name, features in arrays.items():
        axes = ("image", "view", *[f"{name}_{j}" for j in range(len(features))])
        kind = codecs[name]
        shape = kind.shape(tuple(features))
        out[name] = ArrayLayout(kind.dtype, (rows, VIEW_BLOCK, *shape), (inner, 1, *shape), 0, axes, kind.compressor)
        if kind.scaled:
            shard = (rows, VIEW_BLOCK, *shape[:-1])
            out[f"{name}_scale"] = ArrayLayout("<f4", shard, shard, 0, axes[:-1])
    out["status"] = ArrayLayout("u1", (rows,), (rows,), UNWRITTEN, ("image",))
    out["content"] = ArrayLayout("<u8", (rows,), (rows,), 0, ("image",))
    return out


def zarr_metadata(layouts: Mapping[str, ArrayLayout], images: int, views: Mapping[str, int]) -> dict[str, bytes]:
    """{key: bytes} of the Zarr metadata of the group and of these arrays.

    views: {feature array: number of views}; a scale array has the number of its feature array.
    """
    small = {f"{GROUP}/zarr.json": json.dumps({"attributes": {}, "zarr_format": 3, "node_type": "group"}).encode()}
    for name, layout in layouts.items():
        files: Files = {}
        columns = views.get(name.removesuffix("_scale"), 0)
        _create(files, name, layout.shape(images, columns), layout)
        small[f"{GROUP}/{name}/zarr.json"] = files[f"{name}/zarr.json"].to_bytes()
    return small


def table_files(tables: Mapping[str, Column]) -> dict[str, bytes]:
    """{key: bytes} of the metadata and chunks of the per-image tables sample_id, label and view_key."""
    out: dict[str, bytes] = {}
    for name, column in tables.items():
        files: Files = {}
        kind, fill = TABLES[name]
        size = min(max(1, len(column)), TABLE_ROWS)
        array = _create(files, name, (len(column),), ArrayLayout(kind, (size,), (size,), fill, ("image",)))
        array[...] = np.asarray(column, object if kind is str else None)
        out |= {f"{GROUP}/{key}": buffer.to_bytes() for key, buffer in files.items() if key.startswith(f"{name}/")}
    return out


def open_group(storage: Storage) -> zarr.Group:
    """Open the Zarr group for reading. Zarr raises exceptions of many types if its metadata is damaged."""
    files: Store
    if isinstance(storage, Folder):
        files = zarr.storage.LocalStore(storage.path, read_only=True)
    else:
        files = _BucketReader(cast("Bucket", storage))  # the only other Storage
    return zarr.open_group(files, path=GROUP, mode="r", zarr_format=3)


def array_in(group: ZarrGroup, name: str) -> ZarrArray:
    """An array of a group. Raises ValueError if the name is that of something else."""
    found = group[name]
    if not isinstance(found, zarr.Array):
        raise ValueError(f"{name} is no array")
    return found


class _BucketReader(zarr.storage.ObjectStore[Any]):  # Any: the class of the store is that of its provider
    """The objects of a bucket, read-only. Errors become those of our object store, which name bucket and remedy."""

    def __init__(self, bucket: "Bucket"):
        super().__init__(bucket.objects, read_only=True)
        self.bucket = bucket

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        with self.bucket.translated_errors():
            return await super().get(key, prototype, byte_range)


def _create(files: Files, name: str, shape: tuple[int, ...], layout: ArrayLayout) -> ZarrArray:
    """Create a Zarr array of this shape in memory; its files appear in `files`, {key: buffer}."""
    sharded = layout.shards != layout.chunks
    compressors = [ZstdCodec(level=ZSTD_LEVEL)] if layout.compressor == "zstd" else []
    return zarr.create_array(
        zarr.storage.MemoryStore(store_dict=files),
        name=name,
        shape=shape,
        shards=layout.shards if sharded else None,
        chunks=layout.chunks,
        dtype=layout.dtype,
        compressors=[*compressors, Crc32cCodec()],
        fill_value=layout.fill,
        dimension_names=layout.names,
    )
