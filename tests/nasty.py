"""Nasty image files, as they turn up in real folders: small, and always the same bytes.

`bad_files` no program can use; `odd_files` look wrong and are good. `furnish` puts both into a folder, with
what is no file of bytes: pipes, links that lead nowhere, names that break tables.
"""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from compress_ssl.pipeline.datasets.decode import GOOD, NOT_AN_IMAGE, TOO_LARGE, UNREADABLE


def noise(seed: int = 0, side: int = 16, tint: int = 0) -> np.ndarray:
    """(side, side, 3) uint8: dark noise with one bright channel, so that classes differ."""
    pixels = np.random.default_rng(seed).integers(0, 90, (side, side, 3))
    pixels[..., tint % 3] += 120
    return pixels.astype(np.uint8)


def encoded(pixels: Any, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image file; pixels are an array or a Pillow image."""
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, rows: bytes, depth: int = 8, colour: int = 2, *chunks: bytes) -> bytes:
    """A PNG assembled from chunks, whose header may be wrong."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    parts = [header, *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that claims width x height pixels."""
    return png(width, height, bytes(999))


def flipped(data: bytes, place: int) -> bytes:
    """The data with one changed byte."""
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


def bad_files() -> dict[str, bytes]:
    """{name: bytes} of files that no program can decode, one for each kind of damage."""
    jpeg, png_ = encoded(noise(1, 64), "JPEG"), encoded(noise(1, 64))
    progressive = encoded(noise(1, 64), "JPEG", progressive=True)
    gif, webp = encoded(noise(1, 64), "GIF"), encoded(noise(1, 64), "WEBP", lossless=True)
    bmp, tiff = encoded(noise(1, 64), "BMP"), encoded(noise(1, 64), "TIFF")
    files = {
        "bomb.png": bomb(60_000, 60_000),  # beyond Pillow's own limit
        "bomb-small.png": bomb(12_000, 12_000),  # beyond ours only
        "bomb-thin.png": bomb(2**31 - 1, 1),
        "bomb.gif": b"GIF89a\xff\xff\xff\xff" + gif[10:],
        "bomb.bmp": bmp[:18] + struct.pack("<ii", 50_000, 50_000) + bmp[26:],
        "bomb.ppm": b"P5 99999 99999 255\n" + bytes(99),
        "huge-claim.png": bomb(9_000, 9_000),  # within the limit, but without pixels
        "cut.gif": gif[: len(gif) // 2],
        "cut.webp": webp[: len(webp) // 2],
        "cut.bmp": bmp[: len(bmp) // 2],
        "cut.tiff": tiff[: len(tiff) // 2],
        "cut.ppm": encoded(noise(1, 64), "PPM")[:99],
        "empty.jpg": b"",
        "one-byte.jpg": b"\xff",
        "page.jpg": b"<html><body>404 Not Found</body></html>",
        "text.png": b"hello\n",
        "archive.jpg": b"PK\x03\x04" + bytes(99),
        "zeros.png": bytes(5000),
        "noise.jpg": b"\xff\xd8\xff\xe0" + np.random.default_rng(2).bytes(3000),
        "pointer.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n",
        "line-ends.png": png_.replace(b"\r\n", b"\n"),  # as after a transfer in text mode
        "crc-of-header.png": flipped(png_, 20),
        "crc-of-pixels.png": flipped(png_, len(png_) // 2),
        "no-pixels.png": png(16, 16, b""),
        "zero-wide.png": png(0, 16, bytes(16)),
        "nothing-inside.tiff": b"II*\0\x08\0\0\0\0\0\0\0\0\0",
        "circular.tiff": b"II*\0\x08\0\0\0\0\0\x08\0\0\0",  # the next directory is this one
    }
    for percent in (0, 1, 5, 10, 25, 50, 75, 90, 99):
        files[f"cut-{percent:02d}.jpg"] = jpeg[: max(2, len(jpeg) * percent // 100)]
    for percent in (10, 50, 90):
        files[f"cut-progressive-{percent:02d}.jpg"] = progressive[: len(progressive) * percent // 100]
        files[f"cut-{percent:02d}.png"] = png_[: len(png_) * percent // 100]
    return files


def odd_files() -> dict[str, bytes]:
    """{name: bytes} of files that look wrong but contain a valid picture."""
    pixels = noise(3, 24)
    image = Image.fromarray(pixels)
    palette = image.quantize(8)
    frames = [Image.fromarray(noise(seed, 24)) for seed in (5, 6)]
    jpeg, film = encoded(image, "JPEG"), {"save_all": True, "append_images": frames}
    turned = Image.Exif()
    turned[0x0112] = 6
    floats = np.linspace(0, 255, 24 * 24, dtype=np.float32).reshape(24, 24)
    holes = np.where(floats > 99, np.nan, floats).astype(np.float32)
    return {
        "really-a-png.jpg": encoded(image),
        "really-a-jpeg.png": jpeg,
        "really-a-gif.webp": encoded(image, "GIF"),
        "UPPER.JPG": jpeg,
        "cmyk.jpg": encoded(image.convert("CMYK"), "JPEG"),
        "ycck.jpg": ycck(encoded(image.convert("CMYK"), "JPEG")),
        "grey.jpg": encoded(image.convert("L"), "JPEG"),
        "progressive.jpg": encoded(image, "JPEG", progressive=True),
        "after-the-end.jpg": jpeg + b"garbage" * 99,
        "after-the-end.png": encoded(image) + bytes(999),
        "broken-profile.jpg": encoded(image, "JPEG", icc_profile=b"no profile"),
        "broken-profile.png": encoded(image, icc_profile=b"\xff" * 60),
        "turned.jpg": encoded(image, "JPEG", exif=turned),
        "broken-exif.jpg": encoded(image, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\xff" + b"\x01" * 40),
        "cut-exif.webp": encoded(image, "WEBP", exif=b"Exif\0\0II*\0"),
        "sixteen-bit.png": encoded(np.arange(24 * 24, dtype=np.uint16).reshape(24, 24) * 99),
        "sixteen-bit-colour.png": png(2, 1, b"\0" + np.array([9, 99, 999, 9999, 1, 2], ">u2").tobytes(), 16),
        "sixteen-bit.tiff": encoded(np.arange(24 * 24, dtype=np.uint16).reshape(24, 24) * 99, "TIFF"),
        "thirty-two-bit.tiff": encoded(Image.fromarray(np.arange(24 * 24, dtype=np.int32).reshape(24, 24)), "TIFF"),
        "floats.tiff": encoded(Image.fromarray(floats), "TIFF"),
        "not-a-number.tiff": encoded(Image.fromarray(holes), "TIFF"),
        "two-bit.png": png(4, 2, b"\0\x1b\0\xe4", 2, 0),
        "one-bit.png": encoded(Image.fromarray(pixels[..., 0] > 40)),
        "one-bit.tiff": encoded(Image.fromarray(pixels[..., 0] > 40), "TIFF", compression="group4"),
        "lab.tiff": encoded(Image.merge("LAB", [Image.fromarray(pixels[..., c]) for c in range(3)]), "TIFF"),
        "animated.gif": encoded(image, "GIF", **film),
        "animated.webp": encoded(image, "WEBP", **film),
        "animated.png": encoded(image, "PNG", **film),
        "many-pages.tiff": encoded(image, "TIFF", **film),
        "palette.png": encoded(palette),
        "palette-transparent.png": encoded(palette, transparency=bytes(range(0, 248, 31))),
        "palette-transparent.gif": encoded(palette, "GIF", transparency=1),
        "alpha.tiff": encoded(image.convert("RGBA"), "TIFF"),
        "grey-alpha.png": encoded(image.convert("LA")),
        "all-transparent.png": encoded(np.zeros((24, 24, 4), np.uint8)),
        "one-pixel.png": encoded(pixels[:1, :1]),
        "one-row.jpg": encoded(pixels[:1], "JPEG"),
        "one-column.png": encoded(np.repeat(pixels, 99, 0)[:, :1]),
        "long-and-thin.png": encoded(np.tile(pixels[:1], (1, 400, 1))),
    }


def ycck(cmyk: bytes) -> bytes:
    """A CMYK JPEG whose Adobe marker says that its colours are YCCK."""
    place = cmyk.index(b"Adobe") + 11
    return cmyk[:place] + b"\x02" + cmyk[place + 1 :]


ODD_NAMES = (
    b"caf\xe9.png",  # Latin-1, not UTF-8
    b"\xff\xfe\x80.png",
    b"percent%FFsign.png",
    b"tab\there.png",
    b"line\nbreak.png",
    b"-rf.png",
    b"--help.png",
    b" blank at both ends .png",
    b"quote'\"$(date)`.png",
    b"back\\slash.png",
    b"\xe2\x80\xaeright-to-left.png",
    b"z" * 251 + b".png",  # the longest that a file system takes
)


def furnish(root: Path) -> dict[str, int]:
    """Put everything nasty into root/nasty: {path: status an export should find there, -1 for any but good}."""
    nasty = root / "nasty"
    nasty.mkdir(parents=True)
    status: dict[str, int] = {}
    for name, data in odd_files().items():
        (nasty / name).write_bytes(data)
        status[name] = GOOD
    for name, data in bad_files().items():
        (nasty / name).write_bytes(data)
        large = name.startswith("bomb")
        status[name] = TOO_LARGE if large else -1  # Pillow decides whether it is damaged or no image at all
    for number, name in enumerate(ODD_NAMES):
        bad = number % 3 == 0
        with open(os.path.join(os.fsencode(nasty), name), "wb") as file:
            file.write(b"no image" if bad else encoded(noise(number, 20)))
        status[os.fsdecode(name)] = NOT_AN_IMAGE if bad else GOOD
    os.mkfifo(nasty / "pipe.jpg")
    (nasty / "dangling.jpg").symlink_to("nowhere.jpg")
    (nasty / "circle-a.jpg").symlink_to("circle-b.jpg")
    (nasty / "circle-b.jpg").symlink_to("circle-a.jpg")
    (nasty / "locked.jpg").write_bytes(encoded(noise(7), "JPEG"))
    (nasty / "locked.jpg").chmod(0)
    readable = os.access(nasty / "locked.jpg", os.R_OK)  # root reads everything
    status |= dict.fromkeys(("pipe.jpg", "dangling.jpg", "circle-a.jpg", "circle-b.jpg"), UNREADABLE)
    status["locked.jpg"] = GOOD if readable else UNREADABLE
    with open(nasty / "sparse.jpg", "wb") as file:
        file.write(encoded(noise(8), "JPEG"))
        file.truncate(3 * 2**30)
    status["sparse.jpg"] = TOO_LARGE
    (nasty / "a-link.png").symlink_to("one-pixel.png")
    status["a-link.png"] = GOOD
    (nasty / "folder.jpg").mkdir()  # a folder like any other
    (nasty / "folder.jpg/inside.png").write_bytes(encoded(noise(9)))
    status["folder.jpg/inside.png"] = GOOD
    (nasty / "up").symlink_to("..")  # following it would never end
    (nasty / ".hidden.png").write_bytes(b"")  # skipped, like any hidden file
    (nasty / "notes.txt").write_bytes(b"no image, and it does not say so")
    return {f"nasty/{name}": code for name, code in status.items()}
