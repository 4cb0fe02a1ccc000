"""A page: one HTML file with styles and figures inside, nothing fetched, no script.

Light or dark by the reader's setting.
"""

import base64
import html
import io

from PIL import Image

from pipeline import figures
from pipeline.figures import Chart
from pipeline.storage import Folder


class Page:
    """Sections gathered into one HTML file."""

    def __init__(self, folder: Folder | None = None) -> None:
        """Where there is a folder, the figures also lie in FOLDER/figures, as PNG on white."""
        self.sections: list[str] = []
        self.folder = folder

    def add(self, heading: str, body: str) -> None:
        """A section of HTML; nothing if it has no body."""
        if body:
            self.sections.append(f"<section>{f'<h2>{html.escape(heading)}</h2>' if heading else ''}{body}</section>")

    def chart(self, name: str, chart: Chart, alt: str) -> str:
        """Draw it, save it as figures/NAME.png, return the HTML."""
        source = uri(self.figure(name, chart))
        return f'<img class="chart" style="max-width:{chart.size[0]:g}in" src="{source}" alt="{html.escape(alt)}">'

    def figure(self, name: str, chart: Chart) -> bytes:
        """Draw it, save it as figures/NAME.png, return it as transparent PNG."""
        drawn = figures.render(chart)
        if self.folder:
            self.folder.put(f"figures/{name}.png", on_white(drawn))
        return drawn

    def spell(self, title: str, role: str = "") -> bytes:
        """The file."""
        name, tag = html.escape(title), f'<span class="role">{html.escape(role)}</span>' if role else ""
        text = (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta name="color-scheme" content="light dark"><title>{name}</title><style>{STYLE}</style></head>\n'
            f"<body><main><h1>{name}{tag}</h1>\n" + "\n".join(self.sections) + "\n</main></body></html>\n"
        )
        return text.encode("utf-8", "backslashreplace")


def note(text: str, kind: str = "note") -> str:
    """A paragraph of plain text, small and grey, or of another class of STYLE; nothing if it is empty."""
    return f'<p class="{kind}">{html.escape(text)}</p>' if text else ""


def uri(image: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def on_white(drawn: bytes) -> bytes:
    """A transparent PNG made opaque: alone, it may be read on anything."""
    ink, data = Image.open(io.BytesIO(drawn)).convert("RGBA"), io.BytesIO()
    Image.alpha_composite(Image.new("RGBA", ink.size, "white"), ink).convert("RGB").save(data, "PNG")
    return data.getvalue()


STYLE = """
:root{--ink:#1b1f24;--muted:#667085;--line:#e4e7ec;--page:#f6f7f9;--card:#fff;--accent:#2563eb;--second:#c2410c;
--yes:#1a7f37;--no:#cf222e}
@media (prefers-color-scheme:dark){:root{--ink:#e8eaed;--muted:#9aa4b2;--line:#2e353f;--page:#0f1115;--card:#171a1f;
--accent:#6ea8fe;--second:#f0935b;--yes:#3fb950;--no:#f85149}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:70rem;margin:0 auto;padding:2rem 1rem 4rem}
h1{font-size:1.7rem;margin:0 0 1rem;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:0 0 .75rem}
.role{font-size:.8rem;font-weight:500;color:var(--muted);border:1px solid var(--line);border-radius:1rem;
padding:.15rem .65rem;margin-left:.75rem;vertical-align:middle}
section{background:var(--card);border:1px solid var(--line);border-radius:.75rem;padding:1.25rem;margin:0 0 1rem}
.chart{width:100%;height:auto;display:block}
@media (prefers-color-scheme:dark){.chart{filter:invert(.92) hue-rotate(180deg)}}
.note,small{color:var(--muted);font-size:.83rem}
.note{margin:.25rem 0 .75rem}
small{display:block;line-height:1.35}
.warning{border-left:3px solid var(--second);padding:.25rem .75rem;margin:0 0 1rem}
.lead{font-size:1.15rem;margin:0 0 .9rem}
.facts{display:flex;flex-wrap:wrap;gap:.4rem 1.75rem;margin:.9rem 0 0;
padding-top:.9rem;border-top:1px solid var(--line)}
.facts>div{max-width:22rem}.family{width:3rem;font-weight:600}
dt{color:var(--muted);font-size:.78rem}
dd{margin:0 0 .4rem;overflow-wrap:anywhere}
table{border-collapse:collapse;width:100%}
th{color:var(--muted);font-size:.78rem;font-weight:500;text-align:left;white-space:nowrap}
th,td{padding:.45rem .6rem;border-bottom:1px solid var(--line);vertical-align:middle}
tr:last-child td{border-bottom:0}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.big{font-weight:650;font-size:1.1rem}
.scores td:first-child{width:44%}
.w{width:26%;min-width:6rem}
.bar{position:relative;height:.55rem;border-radius:.3rem;background:var(--line)}
.bar i{display:block;height:100%;border-radius:.3rem;background:var(--accent)}
.bar b{position:absolute;top:-.25rem;bottom:-.25rem;
width:3px;margin-left:-1px;border-radius:2px;background:var(--second)}
.up{color:var(--yes)}.down{color:var(--no)}
.wide,.strips{overflow-x:auto}
.compare{font-size:.9rem}.compare th,.compare td{padding:.45rem .5rem}
.compare td:first-child{font-weight:500;white-space:nowrap}
.compare b{color:var(--accent)}
.teacher td{background:color-mix(in srgb,var(--second) 9%,transparent)}
.strip{display:flex;gap:5px;align-items:center;margin:0 0 5px;min-width:max-content}
.who{width:11.5rem;flex:none;font-size:.85rem;line-height:1.3;overflow-wrap:anywhere;padding-right:.5rem}
.strip img{width:64px;height:64px;border-radius:5px;border:3px solid transparent;display:block}
.strip .query{border-color:var(--ink);margin-right:10px}
.strip .yes{border-color:var(--yes)}
.strip .no{border:3px dashed var(--no)}
.px{image-rendering:pixelated}
.pair{display:flex;flex-wrap:wrap;gap:1rem 2rem;align-items:flex-start}
.pair .chart{flex:1 1 24rem}.pair table{flex:1 1 14rem;width:auto}
pre{overflow-x:auto;font-size:.8rem}
summary{cursor:pointer;color:var(--muted)}
@media (max-width:40rem){.w{display:none}}
"""
