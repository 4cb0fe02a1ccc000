"""Every file decodes to RGB in the documented way, or raises BadImage with the right status."""

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from compress_ssl.pipeline.datasets.decode import BROKEN, MAX_PIXELS, NOT_AN_IMAGE, REASONS, TOO_LARGE, BadImage, decode

BEST: dict[str, dict[str, Any]] = {"JPEG": {"quality": 98}, "WEBP": {"lossless": True}, "ICO": {"sizes": [(16, 16)]}}
"""Options of `Image.save`, by format, with the smallest loss."""


def file(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8).squeeze()


def smooth(height: int = 24, width: int = 40) -> Image.Image:
    """An image that JPEG stores to within a few levels: red decreases, green increases, blue is a corner."""
    rows, columns = np.mgrid[:height, :width]
    red, green = 255 * rows / height, 255 * columns / width
    return Image.fromarray(np.stack([255 - red, green, (red + green) / 3], -1).astype(np.uint8))


def png(header: bytes, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file assembled from chunks, because Pillow cannot write everything that it can read."""
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in parts)
    return b"\x89PNG\r\n\x1a\n" + body


def refused(data: bytes) -> BadImage:
    with pytest.raises(BadImage) as caught:
        decode(data)
    assert caught.value.args[0] and "\n" not in str(caught.value)
    return caught.value


# ---------------------------------------------------------------- modes


def test_rgb_pixels_are_returned_unchanged() -> None:
    pixels = noise(13, 7)
    seen = decode(file(Image.fromarray(pixels)))
    assert seen.dtype == np.uint8 and seen.flags.writeable
    assert np.array_equal(seen, pixels)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "TGA", "WEBP", "GIF", "JPEG2000", "ICO", "AVIF"])
def test_every_listed_format_can_be_read(form: str) -> None:
    flat = Image.new("RGB", (16, 16), (200, 100, 50))
    seen = decode(file(flat, form, **BEST.get(form, {}))).astype(int)
    assert seen.shape == (16, 16, 3)
    assert np.abs(seen - [200, 100, 50]).max() <= 3


def test_grey_is_the_same_in_all_channels() -> None:
    grey = noise(9, 5, 1)
    for data in (file(Image.fromarray(grey)), file(Image.fromarray(grey), "PPM")):
        assert np.array_equal(decode(data), np.repeat(grey[..., None], 3, -1))


def test_a_grey_jpeg_is_grey() -> None:
    seen = decode(file(smooth().convert("L"), "JPEG", quality=95))
    assert np.ptp(seen, axis=-1).max() == 0


def test_a_one_bit_image_becomes_black_and_white() -> None:
    bits = noise(9, 5, 1) > 127
    seen = decode(file(Image.fromarray(bits)))
    assert np.array_equal(seen, np.repeat(np.where(bits, 255, 0)[..., None], 3, -1))


def test_a_palette_image_gets_the_colours_of_its_palette() -> None:
    image = Image.fromarray(noise(8, 8, 1) % 3, "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 10, 20, 30])
    seen = decode(file(image))
    assert np.array_equal(seen, np.array([(255, 0, 0), (0, 255, 0), (10, 20, 30)], np.uint8)[np.array(image)])


def test_a_transparent_palette_entry_becomes_white() -> None:
    image = Image.fromarray(noise(8, 8, 1) % 2, "P")
    image.putpalette([255, 0, 0, 0, 255, 0])
    wanted = np.array([(255, 0, 0), (255, 255, 255)], np.uint8)[np.array(image)]
    assert np.array_equal(decode(file(image, transparency=1)), wanted)
    assert np.array_equal(decode(file(image, "GIF", transparency=1)), wanted)


def test_a_palette_may_be_half_transparent() -> None:
    image = Image.new("P", (2, 2), 0)
    image.putpalette([255, 0, 0])
    assert np.abs(decode(file(image, transparency=bytes([128])))[0, 0].astype(int) - [255, 127, 127]).max() <= 1


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    a = alpha[..., None] / 255
    return colour * a + 255 * (1 - a)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
def test_an_image_with_alpha_is_composited_over_white(form: str) -> None:
    pixels = noise(8, 8, 4)
    pixels[0, 0, 3], pixels[0, 1, 3] = 0, 255
    data = file(Image.fromarray(pixels), form, **({"lossless": True, "exact": True} if form == "WEBP" else {}))
    seen = decode(data).astype(float)
    assert np.abs(seen - over_white(pixels[..., :3], pixels[..., 3])).max() <= 1
    assert seen[0, 0].tolist() == [255] * 3
    assert seen[0, 1].tolist() == pixels[0, 1, :3].tolist()


def test_a_grey_image_with_alpha_is_composited_over_white() -> None:
    pixels = noise(8, 8, 2)
    seen = decode(file(Image.fromarray(pixels, "LA"))).astype(float)
    assert np.abs(seen - over_white(pixels[..., :1].repeat(3, -1), pixels[..., 1])).max() <= 1


def test_pixels_of_the_transparent_colour_become_white() -> None:
    pixels = np.array([[(1, 2, 3), (200, 0, 0)]], np.uint8)
    assert decode(file(Image.fromarray(pixels), transparency=(1, 2, 3))).tolist() == [[[255] * 3, [200, 0, 0]]]
    grey = np.array([[7, 200]], np.uint8)
    assert decode(file(Image.fromarray(grey), transparency=7)).tolist() == [[[255] * 3, [200] * 3]]


def test_a_cmyk_jpeg_has_its_colours() -> None:
    cmyk = smooth().convert("CMYK")
    assert Image.open(io.BytesIO(file(cmyk, "JPEG"))).mode == "CMYK"
    seen = decode(file(cmyk, "JPEG", quality=98, subsampling=0)).astype(int)
    assert np.abs(seen - np.array(smooth()).astype(int)).max() <= 12


def test_other_colour_spaces_become_rgb() -> None:
    seen = decode(file(smooth().convert("YCbCr"), "TIFF")).astype(int)
    assert np.abs(seen - np.array(smooth()).astype(int)).max() <= 4


def test_sixteen_bit_greys_keep_their_upper_eight_bits() -> None:
    grey = np.array([[0, 255, 256, 511, 40_000, 65_535]], np.uint16)
    for data in (file(Image.fromarray(grey)), file(Image.fromarray(grey), "TIFF")):
        assert decode(data)[0, :, 0].tolist() == [0, 0, 1, 1, 156, 255]
        assert np.ptp(decode(data), axis=-1).max() == 0


def test_a_dark_sixteen_bit_grey_stays_dark() -> None:
    grey = np.array([[0, 100, 200, 255]], np.uint16)
    assert decode(file(Image.fromarray(grey))).max() == 0
    pgm = b"P5 4 1 65535\n" + grey.astype(">u2").tobytes()
    assert decode(pgm).max() == 0


def test_sixteen_bit_colours_keep_their_upper_eight_bits() -> None:
    colours = np.array([[(0x1234, 0xABCD, 0xFFFF), (0x00FF, 0x0100, 0x8000)]], ">u2")
    data = png(struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0), b"\0" + colours.tobytes())
    assert decode(data).tolist() == [[[0x12, 0xAB, 0xFF], [0x00, 0x01, 0x80]]]


def test_floating_point_greys_from_0_to_255_are_rounded_down() -> None:
    data = file(Image.fromarray(np.array([[0, 1.9, 254.2, 255]], np.float32)), "TIFF")
    assert decode(data)[0, :, 1].tolist() == [0, 1, 254, 255]


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_decoded(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    data = file(frames[0], form, save_all=True, append_images=frames[1:], **BEST.get(form, {}))
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    assert np.array_equal(decode(data), np.array(frames[0]))


# ---------------------------------------------------------------- orientation

TURNED: dict[
    int, Callable[[np.ndarray], np.ndarray]
] = {  # EXIF 2.3: the sides of the image at which its first row and column are shown
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x.swapaxes(0, 1)[:, ::-1],
    7: lambda x: x.swapaxes(0, 1)[::-1, ::-1],
    8: lambda x: x.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file(smooth(), form, exif=exif, **BEST.get(form, {}))
    wanted = TURNED[orientation](np.array(smooth())).astype(int)
    seen = decode(data)
    assert seen.shape == wanted.shape
    assert np.abs(seen.astype(int) - wanted).max() <= (16 if form == "JPEG" else 0)


def test_the_orientation_table_agrees_with_pillow() -> None:
    for orientation, turn in TURNED.items():
        image = smooth()
        image.getexif()[0x0112] = orientation
        assert np.array_equal(np.array(ImageOps.exif_transpose(image)), turn(np.array(smooth())))


@pytest.mark.parametrize("orientation", [0, 9, 1000])
def test_an_undefined_orientation_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decode(file(smooth(), exif=exif)), np.array(smooth()))


@pytest.mark.parametrize(
    "junk", [b"", b"II*\0", b"junk junk junk", b"MM\0*\0\0\0\x08\0\xff" + b"\x01" * 40, b"\xff" * 64]
)
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_damaged_exif_does_not_make_an_image_bad(junk: bytes, form: str) -> None:
    seen = decode(file(smooth(), form, exif=b"Exif\0\0" + junk, **BEST.get(form, {})))
    assert np.abs(seen.astype(int) - np.array(smooth()).astype(int)).max() <= (16 if form == "JPEG" else 0)


def test_grey_and_transparent_images_are_turned_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for image in (smooth().convert("L"), smooth().convert("RGBA")):
        wanted = decode(file(image))
        assert np.array_equal(decode(file(image, exif=exif)), TURNED[6](wanted))


# ---------------------------------------------------------------- what cannot be used


def test_an_empty_file_is_not_an_image() -> None:
    assert refused(b"").status == NOT_AN_IMAGE


@pytest.mark.parametrize(
    "data", [b"\0" * 4096, b"hello world\n", b"%PDF-1.4 ...", b"<html></html>", b"\x89PNG\r\n", b"\xff"]
)
def test_bytes_of_no_known_format_are_not_an_image(data: bytes) -> None:
    assert refused(data).status == NOT_AN_IMAGE


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("part", [0.4, 0.9])
def test_a_truncated_file_is_broken(form: str, part: float) -> None:
    data = file(Image.fromarray(noise(40, 60)), form)
    assert refused(data[: int(len(data) * part)]).status in (BROKEN, NOT_AN_IMAGE)
    if form in ("JPEG", "PNG", "BMP"):
        assert refused(data[: int(len(data) * part)]).status == BROKEN


def test_a_png_with_a_wrong_checksum_is_broken() -> None:
    data = bytearray(file(Image.fromarray(noise(40, 60))))
    data[len(data) // 2] ^= 0xFF
    assert refused(bytes(data)).status == BROKEN


def bomb(side: int) -> bytes:
    """A PNG of a few bytes whose header claims side x side pixels."""
    return png(struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), b"")


@pytest.mark.parametrize("side", [11_586, 20_000, 2**31 - 1])
def test_a_decompression_bomb_is_refused_before_it_is_unpacked(side: int) -> None:
    problem = refused(bomb(side))
    assert problem.status == TOO_LARGE
    assert f"{MAX_PIXELS}" in str(problem) or "bomb" in str(problem)


def test_an_image_that_pillow_only_warns_about_is_not_too_large() -> None:
    side = 9_600  # 92 million pixels: beyond Pillow's warning, below our limit
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert refused(bomb(side)).status == BROKEN  # it contains no pixel data


def test_the_largest_photographs_are_accepted() -> None:
    assert MAX_PIXELS >= 12_000 * 9_000


@given(st.binary(max_size=200))
def test_any_bytes_decode_or_raise_bad_image(data: bytes) -> None:
    try:
        assert decode(data).ndim == 3
    except BadImage as problem:
        assert problem.status in REASONS


@given(st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"]), st.data())
def test_any_damaged_file_decodes_or_raises_bad_image(form: str, data: st.DataObject) -> None:
    whole = bytearray(file(smooth(), form))
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=4)):
        whole[place] = data.draw(st.integers(0, 255))
    try:
        seen = decode(bytes(whole))
        assert seen.ndim == 3 and seen.shape[2] == 3 and seen.dtype == np.uint8
    except BadImage as problem:
        assert problem.status in (NOT_AN_IMAGE, BROKEN, TOO_LARGE)


def test_every_status_has_a_reason() -> None:
    assert sorted(REASONS) == list(range(len(REASONS)))
    assert all(REASONS.values())
