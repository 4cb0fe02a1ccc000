"""A page: one HTML file with styles and figures inside, nothing fetched, no script.

Light or dark by the reader's setting. The HTML lies in TEMPLATES; what is filled in is always escaped.
"""

import base64
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from compress_ssl.pipeline.report import figures
from compress_ssl.pipeline.report.figures import Chart
from compress_ssl.pipeline.runtime import formatting
from compress_ssl.pipeline.runtime.storage import Folder

TEMPLATES = Path(__file__).parent / "templates"
FILTERS = ("bar_length", "format_count", "format_difference", "format_score", "format_value", "share")
"""Functions of runtime/formatting.py that the templates use."""

# Control characters other than tab and line break, marks that turn the direction of text, and lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def render_template(name: str, **data: Any) -> str:
    """The page that the template TEMPLATES/NAME makes of the data."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=printable,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {key: getattr(formatting, key) for key in FILTERS}
    return environment.get_template(name).render(data)


def printable(value: Any) -> Any:
    """A value as text, what cannot be printed written as in Python, like \\x1b; HTML of our macros as it is."""
    if hasattr(value, "__html__"):
        return value
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(value))


@dataclass(frozen=True)
class EmbeddedChart:
    """A drawn chart as the templates show it."""

    source: str  # a data URI
    alt: str
    note: str  # below it, where there is one
    width: float  # inches, at most


def embed_chart(name: str, chart: Chart, alt: str, note: str = "", *, folder: Folder | None = None) -> EmbeddedChart:
    """Draw a chart for the page; where there is a folder, also into FOLDER/figures/NAME.png."""
    drawn = figures.render(chart)
    if folder:
        save_figure(folder, name, drawn)
    return EmbeddedChart(data_uri(drawn), alt, note, chart.size[0])


def save_figure(folder: Folder, name: str, drawn: bytes) -> None:
    """Write a transparent PNG to FOLDER/figures/NAME.png, made opaque on white: alone, it may be read on anything."""
    ink, data = Image.open(io.BytesIO(drawn)).convert("RGBA"), io.BytesIO()
    Image.alpha_composite(Image.new("RGBA", ink.size, "white"), ink).convert("RGB").save(data, "PNG")
    folder.put(f"figures/{name}.png", data.getvalue())


def data_uri(image: bytes, kind: str = "png") -> str:
    """An image file as the address that holds it whole."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
