"""Decoded images in files, mapped into memory: for repeated epochs over images that cost to decode.

The pixels are those the decoder gave, with a checksum each, so a run sees the same bits with and
without. Files of BLOCK images are put in place whole; what is not there is decoded when it is built.
"""

import io
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from compress_ssl.pipeline.datasets.decode import GOOD, REASONS, UNREADABLE, BadImage
from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.artifact import Mismatch, UserError
from compress_ssl.pipeline.runtime.device import available_cores
from compress_ssl.pipeline.runtime.storage import Folder

KIND = "decoded images"
BLOCK = 32  # images to a file, which is in memory while it is made
ENTRY = np.dtype(
    [("place", "<u8"), ("height", "<u4"), ("width", "<u4"), ("crc", "<u4"), ("content", "<u8"), ("status", "u1")]
)


class CachedImages:
    """A data set that takes its pixels from a folder of decoded images; all else is the data set's own."""

    def __init__(self, dataset: Any, folder: Path):
        self._dataset, self._folder = dataset, folder

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # while it is being unpickled there is no data set yet
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def remedy(self) -> str:
        """What to do about an image that is not the one the teacher saw: here, it may have been so for a moment."""
        return f"put it back and delete {self._folder}, which keeps what was decoded"

    def load(self, i: int) -> tuple[np.ndarray, int]:
        """((H, W, 3) uint8, content hash), as Dataset.load. Raises BadImage, UserError for a damaged file."""
        try:
            return self._read(_mapped(self._folder / _name(i // BLOCK)), i)
        except FileNotFoundError:
            return self._dataset.load(i)  # in a block that `build` could not keep

    def _read(self, file: np.ndarray, i: int) -> tuple[np.ndarray, int]:
        first = i % BLOCK * ENTRY.itemsize
        said = file[first : first + ENTRY.itemsize]
        for entry in said.view(ENTRY) if len(said) == ENTRY.itemsize else ():  # none in a file cut short
            if entry["status"] != GOOD:
                raise BadImage(int(entry["status"]), REASONS[int(entry["status"])])
            height, width, place = int(entry["height"]), int(entry["width"]), int(entry["place"])
            flat = file[place : place + height * width * 3]
            if zlib.crc32(flat.data) == entry["crc"]:
                return flat.reshape(height, width, 3), int(entry["content"])
        name = self._dataset.ids[i]
        raise UserError(f"{self._folder} is damaged at image {name}; delete the folder, it is decoded anew")


def build_cache(dataset: Any, folder: Path, progress: Callable[[int], None] = lambda images: None) -> CachedImages:
    """Decode what the folder lacks, several images at a time. Raises Mismatch if it holds other images.

    A block with an image that cannot be read is not kept: the next time it may be there.
    """
    home = Folder(folder)
    identity = {"data": {"fingerprint": dataset.fingerprint, "images": len(dataset)}, "images_per_file": BLOCK}
    there = artifact.claimed(home, KIND)
    if there and (unlike := artifact.differences(there["identity"], identity)):
        raise Mismatch(
            f"--cache-images {folder} holds other decoded images, or was laid out by another version "
            f"({'; '.join(unlike)}); delete it, or name another folder"
        )
    artifact.claim(home, KIND, identity)
    home.sweep()
    with ThreadPoolExecutor(available_cores()) as pool:
        for block in _missing(home, len(dataset)):
            rows = range(block * BLOCK, min(len(dataset), (block + 1) * BLOCK))
            if data := _to_bytes(pool.map(lambda i: _decode(dataset, i), rows), len(rows)):
                home.put(_name(block), data)
            progress(len(rows))
    return CachedImages(dataset, folder)


def _mapped(file: Path) -> np.ndarray:
    """A file's bytes, uint8. What is written to them stays here."""
    return np.asarray(np.memmap(file, np.uint8, "c")) if file.stat().st_size else np.empty(0, np.uint8)


def count_pending(dataset: Any, folder: Path) -> int:
    """Images that are still to be decoded."""
    blocks = _missing(Folder(folder), len(dataset))
    return sum(min(BLOCK, len(dataset) - block * BLOCK) for block in blocks)


def _missing(home: Folder, images: int) -> list[int]:
    return [block for block in range(-(-images // BLOCK)) if not home.exists(_name(block))]


def _name(block: int) -> str:
    return f"pixels-{block:06d}.bin"


def _decode(dataset: Any, i: int) -> tuple[np.ndarray, int, int]:
    """(pixels, content hash, status) of an image; no pixels for a bad one."""
    try:
        return (*dataset.load(i), GOOD)
    except BadImage as bad:
        return np.empty((0, 0, 3), np.uint8), 0, bad.status


def _to_bytes(images: Iterator[tuple[np.ndarray, int, int]], count: int) -> bytes | None:
    """A file: its table, then the pixels of one image after the other. None if an image could not be read."""
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
    return file.getvalue()  # no second copy: the buffer itself is handed out
