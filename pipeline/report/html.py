"""Renders a page as one self-contained HTML file: styles and figures are inside it, and it has no links or scripts.

The page is light or dark by the reader's browser setting. The templates are Jinja files in TEMPLATES, and every
value that is filled in is escaped.
"""

import base64
import io
import re
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from compress_ssl.pipeline.report import figures
from compress_ssl.pipeline.report.figures import Chart
from compress_ssl.pipeline.runtime import formatting
from compress_ssl.pipeline.runtime.storage import Folder

TEMPLATES = Path(__file__).parent / "templates"

FILTERS = ("bar_length", "format_count", "format_difference", "format_score", "format_value", "share")
"""Functions of runtime/formatting.py that the templates use."""

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters other than tab and line break, marks that change the direction of text, and lone surrogates."""


def render_template(name: str, **data: object) -> str:
    """The HTML of the template TEMPLATES/NAME, filled with `data`. Raises jinja2.UndefinedError for a missing name."""
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


def printable(value: object) -> object:
    """A value as text in which unprintable characters are escaped as in Python source, like \\x1b.

    HTML that a macro of ours made is returned unchanged.
    """
    if hasattr(value, "__html__"):
        return value
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(value))


@dataclass(frozen=True)
class EmbeddedChart:
    """A rendered chart, as the templates show it."""

    source: str  # a data URI
    alt: str
    note: str  # the text below the chart, "" for none
    width: float  # inches: the page shows it no wider than this


def embed_chart(name: str, chart: Chart, alt: str, note: str = "", *, folder: Folder | None = None) -> EmbeddedChart:
    """Render a chart for the page; with a folder, also write it to FOLDER/figures/NAME.png."""
    png = figures.render(chart)
    if folder:
        save_figure(folder, name, png)
    return EmbeddedChart(data_uri(png), alt, note, chart.size[0])


def save_figure(folder: Folder, name: str, png: bytes) -> None:
    """Write a transparent PNG to FOLDER/figures/NAME.png on a white background.

    The page is transparent behind its charts; a single file may be opened in a viewer with a dark background.
    """
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    opaque = io.BytesIO()
    Image.alpha_composite(white, image).convert("RGB").save(opaque, "PNG")
    folder.put(f"figures/{name}.png", opaque.getvalue())


def data_uri(image: bytes, kind: str = "png") -> str:
    """The data URI that contains an image file; `kind` is its MIME subtype, "png" or "jpeg"."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
