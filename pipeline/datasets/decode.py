"""Decode the bytes of an image file to RGB pixels.

Every image is decoded in the same way: the EXIF orientation is applied; greyscale, palette, CMYK and other modes are
converted to RGB; transparency is composited over white; 16-bit greys keep their upper eight bits; of an animation
only the first frame is used.
"""

import io
import re
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

_ORIENTATION = 0x0112  # number of the EXIF tag "Orientation"
_TRANSPOSES = {  # value of the EXIF tag -> transposition that shows the image upright; 1 means upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MAX_PIXELS = 2**27  # 134 million pixels: admits the largest photographs, refuses decompression bombs
_IGNORE_PIL = ("ignore", None, Warning, re.compile("PIL"), 0)  # how `warnings.filters` represents our filter

# Codes of the array `status` in a store; 255 (UNWRITTEN in store/layout.py) is a row that is not written yet.
GOOD, UNREADABLE, NOT_AN_IMAGE, BROKEN, TOO_LARGE, CHANGED, NOT_FINITE = range(7)
REASONS = {
    GOOD: "good",
    UNREADABLE: "cannot be read",
    NOT_AN_IMAGE: "not an image",
    BROKEN: "broken or truncated",
    TOO_LARGE: f"more than {MAX_PIXELS} pixels",
    CHANGED: "changed while the store was being made",
    NOT_FINITE: "the teacher's feature is not finite",
}
"""Reason of each code, as it is stored in done records where no more precise reason is known."""


class BadImage(Exception):
    """An image that cannot be used. `status` is one of the codes above; the text is the reason that is stored."""

    def __init__(self, status: int, why: str):
        super().__init__(why)
        self.status = status


def decode(data: bytes) -> np.ndarray:
    """Decode the bytes of an image file to (H, W, 3) uint8 RGB pixels. Raises BadImage."""
    if not data:
        raise BadImage(NOT_AN_IMAGE, "the file is empty")
    _silence_pillow()
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise BadImage(TOO_LARGE, f"{image.width} x {image.height} pixels, the limit is {MAX_PIXELS}")
        image.load()
        return np.array(to_rgb(apply_orientation(image)))
    except BadImage:
        raise
    except Image.DecompressionBombError as bomb:
        raise BadImage(TOO_LARGE, _one_line(bomb)) from None
    except UnidentifiedImageError:
        raise BadImage(NOT_AN_IMAGE, "no known image format") from None
    except Exception as problem:  # Pillow's plug-ins raise exceptions of many types on damaged files
        raise BadImage(BROKEN, _one_line(problem)) from None


def _silence_pillow() -> None:
    """Silence Pillow's warnings: an image either decodes or raises BadImage.

    The filter stays in place for the whole process. `warnings.catch_warnings` would not work: it is not thread-safe,
    and its exit would remove the filter while other threads still decode.
    """
    if warnings.filters[:1] != [_IGNORE_PIL]:
        warnings.filterwarnings("ignore", module="PIL")


def apply_orientation(image: Image.Image) -> Image.Image:
    """Turn or mirror the image as its EXIF orientation demands.

    An image with damaged EXIF data is returned as it is: its pixels can still be used.
    """
    try:
        transpose = _TRANSPOSES.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return image
    return image if transpose is None else image.transpose(transpose)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any PIL mode to RGB."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image).astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        # 16-bit values keep their upper eight bits; smaller ones in a 32-bit or float mode are 8-bit values already
        if values.max(initial=0) > 255 or image.mode.startswith("I;16") or image.format == "PPM":
            values = values / 256
        return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _one_line(problem: BaseException) -> str:
    """The exception's message on one line of at most 200 characters, or the name of its type."""
    return " ".join(str(problem).split())[:200] or type(problem).__name__
