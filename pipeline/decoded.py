"""Decoded images in files that are mapped into memory: for repeated epochs over images that cost to decode.

The pixels are those the decoder gave, with a checksum each, so a run sees the same bits with and
without. Files of BLOCK images are put in place whole; what is not there is decoded when it is built.
"""

import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import artifact
from pipeline.artifact import UserError
from pipeline.images import GOOD, REASONS, BadImage
from pipeline.storage import Folder

BLOCK = 256  # images to a file
ENTRY = np.dtype(
    [("place", "<u8"), ("height", "<u4"), ("width", "<u4"), ("crc", "<u4"), ("content", "<u8"), ("status", "u1")]
)


class Decoded:
    """A data set that takes its pixels from a folder of decoded images; all else is the data set's own."""

    def __init__(self, dataset: Any, folder: Path):
        self._dataset, self._folder = dataset, folder
        self._open: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # while it is being unpickled there is no data set yet
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a loader process maps the files itself

    def load(self, i: int) -> tuple[np.ndarray, int]:
        """((H, W, 3) uint8, content hash), as Dataset.load. Raises BadImage, UserError for a damaged file."""
        entries, pixels = self._block(i // BLOCK)
        entry = entries[i % BLOCK]
        if entry["status"] != GOOD:
            raise BadImage(int(entry["status"]), REASONS[int(entry["status"])])
        height, width, place = int(entry["height"]), int(entry["width"]), int(entry["place"])
        flat = pixels[place : place + height * width * 3]
        if zlib.crc32(flat.data) != entry["crc"]:
            name = self._dataset.ids[i]
            raise UserError(f"{self._folder} is damaged at image {name}; delete the folder, it is decoded anew")
        return np.array(flat).reshape(height, width, 3), int(entry["content"])

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        if block not in self._open:
            mapped = np.memmap(self._folder / _name(block), np.uint8, "r")
            size = min(BLOCK, len(self) - block * BLOCK) * ENTRY.itemsize
            self._open[block] = mapped[:size].view(ENTRY), mapped[size:]
        return self._open[block]


def build(dataset: Any, folder: Path, progress: Callable[[int], None] = lambda images: None) -> Decoded:
    """Decode what the folder lacks, several images at a time. Raises UserError if it holds other images."""
    home = Folder(folder)
    artifact.claim(home, "decoded images", {"data": {"fingerprint": dataset.fingerprint, "images": len(dataset)}})
    home.sweep()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for block in _missing(home, len(dataset)):
            rows = range(block * BLOCK, min(len(dataset), (block + 1) * BLOCK))
            home.put(_name(block), _spell(pool.map(lambda i: _decode(dataset, i), rows), len(rows)))
            progress(len(rows))
    return Decoded(dataset, folder)


def pending(dataset: Any, folder: Path) -> int:
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


def _spell(images: Iterator[tuple[np.ndarray, int, int]], count: int) -> bytes:
    """A file: its table, then the pixels of one image after the other."""
    entries, parts, place = np.zeros(count, ENTRY), [], 0
    for n, (pixels, content, status) in enumerate(images):
        data = np.ascontiguousarray(pixels).tobytes()
        entries[n] = (place, *pixels.shape[:2], zlib.crc32(data), content, status)
        parts.append(data)
        place += len(data)
    return b"".join([entries.tobytes(), *parts])
