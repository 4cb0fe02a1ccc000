"""Bad image files, as they turn up in real folders: a name and the bytes, small and always the same."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def noise(seed: int = 0, side: int = 16, tint: int = 0) -> np.ndarray:
    """(side, side, 3) uint8: dark noise with one bright channel, so that classes can be told apart."""
    pixels = np.random.default_rng(seed).integers(0, 90, (side, side, 3))
    pixels[..., tint % 3] += 120
    return pixels.astype(np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that claims width x height pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(999))) + chunk(b"IEND", b"")
    )


def bad_files() -> dict[str, bytes]:
    """{name: bytes} that no program can use, one for each way to be bad."""
    jpeg, png = encoded(noise(1, 64), "JPEG"), encoded(noise(1, 64))
    return {
        "bomb.png": bomb(60_000, 60_000),  # beyond Pillow's own limit
        "bomb-small.png": bomb(12_000, 12_000),  # beyond ours only
        "cut-00.jpg": jpeg[:2],
        "cut-25.jpg": jpeg[: len(jpeg) // 4],
        "cut-90.jpg": jpeg[: len(jpeg) * 9 // 10],
        "cut-50.png": png[: len(png) // 2],
        "empty.jpg": b"",
        "page.jpg": b"<html><body>404 Not Found</body></html>",
        "text.png": b"hello\n",
        "zeros.png": bytes(5000),
        "noise.jpg": b"\xff\xd8\xff\xe0" + np.random.default_rng(2).bytes(3000),
        "pointer.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n",
    }
