"""Bytes of an image file -> RGB pixels, in one documented way.

EXIF orientation is applied; greyscale, palette, CMYK and the rest become RGB; transparency is
laid over white; 16-bit greys keep their upper eight bits; of an animation the first frame counts.
"""

import io
import re
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

_ORIENTATION = 0x0112  # EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MAX_PIXELS = 2**27  # 134 million: the largest photographs pass, decompression bombs do not
_SILENT = ("ignore", None, Warning, re.compile("PIL"), 0)  # as the warnings module keeps a filter

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


class BadImage(Exception):
    """An image that cannot be used: `status` is one of the codes above, the text says why."""

    def __init__(self, status: int, why: str):
        super().__init__(why)
        self.status = status


def decode(data: bytes) -> np.ndarray:
    """File bytes -> (H, W, 3) uint8. Raises BadImage."""
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
    except Exception as problem:  # PIL's plug-ins raise nearly anything on damaged files
        raise BadImage(BROKEN, _one_line(problem)) from None


def _silence_pillow() -> None:
    """Pillow warns of damage that it survives; what it does not survive is a BadImage.

    For the whole process and for good: `catch_warnings` puts back what other threads need at that moment.
    """
    if warnings.filters[:1] != [_SILENT]:
        warnings.filterwarnings("ignore", module="PIL")


def apply_orientation(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says. Damaged EXIF says nothing: the pixels are good without it."""
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return image
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode -> RGB."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image).astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        if values.max(initial=0) > 255 or image.mode.startswith("I;16") or image.format == "PPM":
            values = values / 256
        return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _one_line(problem: BaseException) -> str:
    return " ".join(str(problem).split())[:200] or type(problem).__name__
