"""A cache of decoded images in memory-mapped files, for repeated epochs over images that are slow to decode.

The cached pixels are exactly those that the decoder returned, each image with a checksum, so a run gives the same
bits with and without the cache. A file holds BLOCK images and appears under its name only when it is complete; an
image in a missing file is decoded when it is loaded. The format of the files is described in docs/store.md.
"""

import io
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from compress_ssl.pipeline.datasets.base import Dataset
from compress_ssl.pipeline.datasets.decode import GOOD, REASONS, UNREADABLE, BadImage
from compress_ssl.pipeline.distributed import collectives
from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.artifact import Mismatch
from compress_ssl.pipeline.runtime.device import available_cores
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.progress import progress_bar
from compress_ssl.pipeline.runtime.storage import Folder

KIND = "decoded images"  # the kind in the manifest of a cache folder

BLOCK = 32  # images per file; one block is in memory while its file is being built

ENTRY = np.dtype(
    [("offset", "<u8"), ("height", "<u4"), ("width", "<u4"), ("crc", "<u4"), ("content", "<u8"), ("status", "u1")]
)
"""One row of the table at the start of a file: byte offset of the pixels in the file, height and width in pixels,
CRC-32 of the pixels, content hash of the image file and its status code. 29 bytes, unaligned, little-endian."""


class CachedImages(Dataset):
    """A data set that reads its pixels from a cache folder. Everything else is taken from the original data set."""

    def __init__(self, original: Dataset, folder: Path):
        self._original, self._folder = original, folder
        self.ids, self.label, self.classes = original.ids, original.label, original.classes

    @property
    def remedy(self) -> str:
        # the file may have changed only while it was being decoded: then the cache alone is wrong
        return f"put it back and delete {self._folder}, which keeps what was decoded"

    def changed_rows(self, content: np.ndarray, since: float) -> list[int]:
        return self._original.changed_rows(content, since)

    def load(self, i: int) -> tuple[np.ndarray, int]:
        """((H, W, 3) uint8, content hash), as Dataset.load. Raises BadImage, and UserError for a damaged file."""
        try:
            return self._read(_map_file(self._folder / _file_name(i // BLOCK)), i)
        except FileNotFoundError:
            return self._original.load(i)  # its block has an unreadable image, so `build_cache` wrote no file

    def _read(self, file: np.ndarray, i: int) -> tuple[np.ndarray, int]:
        """Image i from the bytes of its file. Raises BadImage for a bad image, UserError for a damaged file."""
        start = i % BLOCK * ENTRY.itemsize
        row = file[start : start + ENTRY.itemsize]
        if len(row) == ENTRY.itemsize:  # else the file is truncated
            entry = row.view(ENTRY)[0]
            if entry["status"] != GOOD:
                raise BadImage(int(entry["status"]), REASONS[int(entry["status"])])
            height, width, offset = int(entry["height"]), int(entry["width"]), int(entry["offset"])
            flat = file[offset : offset + height * width * 3]
            if zlib.crc32(flat.data) == entry["crc"]:
                return flat.reshape(height, width, 3), int(entry["content"])
        raise UserError(
            f"{self._folder} is damaged at image {self.ids[i]}; delete the folder, then the images are decoded again"
        )


def open_cache(dataset: Dataset, folder: Path) -> CachedImages:
    """The data set with its pixels read from a cache folder. Rank 0 decodes first what the folder lacks.

    Shows a progress bar. Raises Mismatch if the folder is a cache of other images.
    """
    pending = count_pending(dataset, folder)
    with collectives.rank_zero_first(), progress_bar("decode", len(dataset), "images", len(dataset) - pending) as bar:
        return build_cache(dataset, folder, bar.advance)


def build_cache(dataset: Dataset, folder: Path, progress: Callable[[int], None] = lambda images: None) -> CachedImages:
    """Decode the blocks that the folder lacks, several images in parallel.

    progress: called with the number of images of each block that was decoded.
    A block with an unreadable image is not cached, because the image may be readable the next time.
    Raises Mismatch if the folder is a cache of other images.
    """
    storage = Folder(folder)
    identity = {"data": {"fingerprint": dataset.fingerprint, "images": len(dataset)}, "images_per_file": BLOCK}
    manifest = artifact.claimed(storage, KIND)
    differing = artifact.differences(manifest.identity, identity) if manifest else []
    if differing:
        raise Mismatch(
            f"--cache-images {folder} holds other decoded images, or was laid out by another version "
            f"({'; '.join(differing)}); delete it, or name another folder"
        )
    artifact.claim(storage, KIND, identity)
    storage.sweep()
    with ThreadPoolExecutor(available_cores()) as pool:
        for block in _missing_blocks(storage, len(dataset)):
            rows = range(block * BLOCK, min(len(dataset), (block + 1) * BLOCK))
            data = _to_bytes(pool.map(lambda i: _decode(dataset, i), rows), len(rows))
            if data is not None:
                storage.put(_file_name(block), data)
            progress(len(rows))
    return CachedImages(dataset, folder)


def count_pending(dataset: Dataset, folder: Path) -> int:
    """Number of images that `build_cache` would decode."""
    blocks = _missing_blocks(Folder(folder), len(dataset))
    return sum(min(BLOCK, len(dataset) - block * BLOCK) for block in blocks)


def _map_file(path: Path) -> np.ndarray:
    """The bytes of a file as a uint8 array, mapped copy-on-write: changes to the array do not reach the file."""
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.empty(0, np.uint8)
    return np.asarray(np.memmap(path, np.uint8, "c"))


def _missing_blocks(storage: Folder, images: int) -> list[int]:
    return [block for block in range(-(-images // BLOCK)) if not storage.exists(_file_name(block))]


def _file_name(block: int) -> str:
    return f"pixels-{block:06d}.bin"


def _decode(dataset: Dataset, i: int) -> tuple[np.ndarray, int, int]:
    """(pixels, content hash, status) of image i; a bad image has no pixels and hash 0."""
    try:
        return (*dataset.load(i), GOOD)
    except BadImage as bad:
        return np.empty((0, 0, 3), np.uint8), 0, bad.status


def _to_bytes(images: Iterator[tuple[np.ndarray, int, int]], count: int) -> bytes | None:
    """The content of a file: the table of `count` entries, then the pixels of the images one after the other.

    Returns None if an image is unreadable.
    """
    entries, file = np.zeros(count, ENTRY), io.BytesIO()
    file.seek(entries.nbytes)
    for n, (pixels, content, status) in enumerate(images):
        if status == UNREADABLE:
            return None
        flat = np.ascontiguousarray(pixels).reshape(-1)
        entries[n] = (file.tell(), *pixels.shape[:2], zlib.crc32(flat.data), content, status)
        file.write(flat.data)
    file.seek(0)
    file.write(entries.tobytes())
    return file.getvalue()  # CPython returns the buffer itself here, without a second copy
