"""The pages people look at: report.html of one evaluation, and a comparison of many.

A page is one file: styles inside, figures as data URIs, nothing fetched, no script; light or dark
by the reader's setting. The figures also lie in figures/ as PNG on white.
"""

import base64
import html
import io
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image

from pipeline.storage import Folder

Pictures = Callable[[str, int], np.ndarray]  # ("train" | "val", row i) -> (H, W, 3) uint8

DASH = "\N{EN DASH}"
STRIPS, CLUSTERS, PER_CLUSTER = 8, 10, 12  # rows of pictures; of neighbours there are as many as nn kept
TILE = 96  # pixels of a picture's side in figures/; in the page at most 112
PIXEL_ART = 64  # pictures up to this side are enlarged by whole pixels, not smoothed


class Labelled(Protocol):
    """What the report reads of a split (evaluators.base.Split is one)."""

    @property
    def label(self) -> np.ndarray: ...  # (n,) int64, -1 where there is none
    @property
    def rows(self) -> np.ndarray: ...  # (n,) row numbers i in the data set
    @property
    def classes(self) -> tuple[str, ...]: ...


class Found(Protocol):
    """What the report reads of a protocol's result (evaluators.base.Result is one)."""

    @property
    def arrays(self) -> dict[str, np.ndarray]: ...


Draw = Callable[[Figure], None]
INK, MUTED, GRID, ACCENT, SECOND = "#1b1f24", "#667085", "#e4e7ec", "#2563eb", "#c2410c"  # the light page's own


# ---------------------------------------------------------------- numbers


def readings(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The scores of a metrics.json by short title, in the order of the page; missing ones are absent.

    Augmented and centre-crop linear probes have titles of their own: they are not comparable.
    """
    nn, cluster, linear = (metrics.get(key) or {} for key in ("nn", "cluster", "linear"))
    augmented = " (augmented)" if "augmented" in str(linear.get("protocol", "")) else ""
    last, best = linear.get("last") or {}, linear.get("best") or {}
    knn = sorted((metrics.get("knn") or {}).items(), key=lambda item: (len(item[0].partition(",")[0]), item[0]))
    found = {
        "NN": nn.get("top1"),
        **{f"kNN {key}".replace(",temperature=", " T="): value.get("top1") for key, value in knn},
        "Cluster": cluster.get("top1"),
        "Hungarian": cluster.get("hungarian_top1"),
        "NMI": cluster.get("nmi"),
        "ARI": cluster.get("ari"),
        f"Linear{augmented}": last.get("top1"),
        f"Linear{augmented} top-5": last.get("top5"),
        f"Linear{augmented} best": best.get("top1"),
    }
    return {title: float(v) for title, v in found.items() if isinstance(v, int | float) and math.isfinite(v)}


NOTES = {
    "NN": "top-1 by the nearest training image, L2-normalised features",
    "kNN": "top-1 by a vote of the k nearest, weight exp(cosine / temperature), 0.07 unless said",
    "Cluster": "CompRess: k-means on training; clusters mapped one to one to categories by shared images / cluster "
    "size on training; top-1 on validation by that map",
    "Hungarian": "usual clustering accuracy: one-to-one map by raw counts, fitted and scored on validation",
    "NMI": "normalised mutual information of clusters and categories on validation, times 100",
    "ARI": "adjusted Rand index on validation, times 100; 0 is chance",
    "Linear": "top-1 of a linear layer on frozen features after its last epoch",
    "top-5": "the same layer: the category is among the five likeliest",
    "best": "its best epoch on validation: selected on the very set it is scored on",
}


def _note(title: str, metrics: Mapping[str, Any]) -> str:
    first, last = title.split()[0], title.split()[-1]
    note = NOTES[last if last in ("top-5", "best") else first]
    return f"{note} ({metrics['linear'].get('protocol', '')})" if last in ("Linear", "(augmented)") else note


# ---------------------------------------------------------------- one evaluation


def write(
    folder: Path,
    metrics: Mapping[str, Any],
    *,
    train: Labelled,
    val: Labelled,
    results: Mapping[str, Found],
    teacher: Mapping[str, Any] | None = None,
    curves: Sequence[Mapping[str, Any]] | None = None,
    pictures: Pictures | None = None,
    seed: int = 0,
) -> Path:
    """Write FOLDER/report.html and FOLDER/figures/*.png, return the page's path.

    `metrics` is this model's metrics.json and `teacher` the teacher's on the same data; `results` are
    by protocol ("nn", "knn:k=20", "cluster", ...); `curves` are the rows of metrics.jsonl. What is not
    given is left out of the page. Pictures are drawn by `seed`, not picked. Each file is written whole
    or not at all, the page last.
    """
    page = _Page(Folder(folder))
    by_name = {key.partition(":")[0]: found.arrays for key, found in reversed(list(results.items()))}
    random = np.random.default_rng(seed)
    page.add("", _headline(metrics, teacher))
    page.add("Training", _training(page, curves or ()))
    if pictures and "cluster" in by_name:
        page.add("Random images of random clusters", _clusters(page, by_name["cluster"], train, pictures, random))
    if pictures and "nn" in by_name:
        page.add("Nearest neighbours", _neighbours(page, by_name["nn"], train, val, pictures, random))
    if "confusion" in by_name.get("cluster", {}):
        page.add("Clusters against categories", _confusion(page, by_name["cluster"]["confusion"], val.classes))
    if "curve" in by_name.get("linear", {}):
        page.add(
            "Linear layer",
            _probe(page, by_name["linear"]["curve"], str((metrics.get("linear") or {}).get("protocol", ""))),
        )
    raw = html.escape(json.dumps(metrics, indent=1, default=str))
    page.add("", f"<details><summary>metrics.json</summary><pre>{raw}</pre></details>")
    name, role = (str(_model(metrics).get(key, there)) for key, there in (("name", "Evaluation"), ("role", "")))
    page.storage.put("report.html", page.spell(name, role))
    return Path(folder) / "report.html"


class _Page:
    """Sections gathered into one HTML file, and the figures saved beside it."""

    def __init__(self, storage: Folder | None = None) -> None:
        self.sections: list[str] = []
        self.figures = storage
        self.storage = storage or Folder(".")

    def add(self, heading: str, body: str) -> None:
        if body:
            self.sections.append(f"<section>{f'<h2>{html.escape(heading)}</h2>' if heading else ''}{body}</section>")

    def chart(self, name: str, draw: Draw, size: tuple[float, float], alt: str) -> str:
        """Draw (size in inches), save as figures/NAME.png, return the HTML."""
        drawn = render(draw, size)
        self.save(name, drawn)
        width = f"max-width:{size[0]:g}in"
        return f'<img class="chart" style="{width}" src="{_uri(drawn)}" alt="{html.escape(alt)}">'

    def save(self, name: str, drawn: bytes) -> None:
        """On white: what is transparent here may be read on anything."""
        if self.figures:
            ink, data = Image.open(io.BytesIO(drawn)).convert("RGBA"), io.BytesIO()
            Image.alpha_composite(Image.new("RGBA", ink.size, "white"), ink).convert("RGB").save(data, "PNG")
            self.figures.put(f"figures/{name}.png", data.getvalue())

    def spell(self, title: str, role: str = "") -> bytes:
        name, tag = html.escape(title), f'<span class="role">{html.escape(role)}</span>' if role else ""
        text = (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta name="color-scheme" content="light dark"><title>{name}</title><style>{STYLE}</style></head>\n'
            f"<body><main><h1>{name}{tag}</h1>\n" + "\n".join(self.sections) + "\n</main></body></html>\n"
        )
        return text.encode("utf-8", "backslashreplace")


def _headline(metrics: Mapping[str, Any], teacher: Mapping[str, Any] | None) -> str:
    """Each score as number, bar and distance from the teacher's; then the facts about model and data."""
    own, other = readings(metrics), readings(teacher or {})
    rows = "".join(_score_row(title, value, other.get(title), metrics, bool(other)) for title, value in own.items())
    if not rows:
        rows = '<tr><td colspan="3">no scores: without labels there is nothing to agree with</td></tr>'
    extra = '<th class="n">teacher</th><th class="n">difference</th>' if other else ""
    table = f'<table class="scores"><tr><th>score</th><th class="n">%</th><th></th>{extra}</tr>{rows}</table>'
    legend = '<p class="note">The mark on each bar is the teacher.</p>' if other else ""
    return _summary(metrics, teacher or {}) + table + legend + _facts(metrics)


def _summary(metrics: Mapping[str, Any], teacher: Mapping[str, Any]) -> str:
    """How much of the teacher is kept, at what size, in one sentence."""
    own, other = readings(metrics), readings(teacher)
    title = next((title for title in own if other.get(title, 0) > 0), None)
    if title is None:
        return ""
    text = f"<b>{100 * own[title] / other[title]:.0f} %</b> of the teacher's {title} accuracy"
    text += f" ({own[title]:.1f} of {other[title]:.1f})"
    small, large = _model(metrics).get("parameters"), _model(teacher).get("parameters")
    if small and large:
        text += f" with <b>{100 * small / large:.0f} %</b> of its parameters ({_amount(small)} of {_amount(large)})"
    return f'<p class="lead">{text}.</p>'


def _facts(metrics: Mapping[str, Any]) -> str:
    lists = []
    for family in ("model", "data"):
        pairs = [(k, v) for k, v in _flat(metrics.get(family) or {}) if (family, k) not in HEADED]
        items = (
            f"<div><dt>{html.escape(k.replace('_', ' '))}</dt><dd>{html.escape(_text(v))}</dd></div>" for k, v in pairs
        )
        lists.append(f'<dl class="facts"><div class="family">{family}</div>{"".join(items)}</dl>' if pairs else "")
    return "".join(lists)


HEADED = {("model", "name"), ("model", "role")}  # they stand in the page's title


def _score_row(title: str, own: float, other: float | None, metrics: Mapping[str, Any], beside: bool) -> str:
    mark = f'<b style="left:{min(max(other, 0), 100):.2f}%"></b>' if other is not None else ""
    bar = f'<div class="bar"><i style="width:{min(max(own, 0), 100):.2f}%"></i>{mark}</div>'
    cells = f'<td class="n big">{own:.1f}</td><td class="w">{bar}</td>'
    if beside:
        gain = None if other is None else own - other
        tone = "" if gain is None or not round(gain, 1) else " up" if gain > 0 else " down"
        cells += f'<td class="n">{_number(other)}</td><td class="n{tone}">{_signed(gain)}</td>'
    return f"<tr><td>{html.escape(title)}<small>{html.escape(_note(title, metrics))}</small></td>{cells}</tr>"


# ---------------------------------------------------------------- training curves


MANY = 60  # points from which a running mean over a thirtieth of them is drawn
PANELS = {
    "loss": "loss",
    "val_nn": "NN on validation, top-1 (%)",
    "agreement": "agreement with the teacher's NN (%)",
    "spread": "feature spread (0: collapse)",
    "lr": "learning rate",
}


def _training(page: _Page, rows: Sequence[Mapping[str, Any]]) -> str:
    """Loss, accuracy and health against the step, one panel each; rows that lack a value are skipped."""
    lines = {key: _series(rows, key) for key in PANELS}
    lines = {key: line for key, line in lines.items() if len(line) > 1}
    if not lines:
        return ""

    wide = min(3, len(lines))
    tall = -(-len(lines) // wide)

    def draw(figure: Figure) -> None:
        for number, (key, line) in enumerate(lines.items()):
            axes = _axes(figure.add_subplot(tall, wide, number + 1), PANELS[key])
            _line(axes, line[:, 0], line[:, 1], ACCENT)
            axes.set_xlabel("step", color=MUTED)
            if key in ("val_nn", "agreement"):
                axes.set_ylim(bottom=0)

    chart = page.chart("training", draw, (3.4 * wide, 2.6 * tall), "training curves: " + ", ".join(lines))
    many = any(len(line) >= MANY for line in lines.values())
    note = "The faint line is every logged step, the strong one their running mean."
    return chart + (f'<p class="note">{note}</p>' if many else "")


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """(m, 2) float64 of step and value, by step, finite ones only."""
    pairs = [(row["step"], row[key]) for row in rows if _finite(row.get("step")) and _finite(row.get(key))]
    return np.array(sorted(pairs), dtype=np.float64).reshape(-1, 2)


def _line(axes: Axes, x: np.ndarray, y: np.ndarray, color: str) -> None:
    if len(y) < MANY:
        axes.plot(x, y, color=color, linewidth=1.6, marker="o" if len(y) < 25 else "", markersize=3)
        return
    window = len(y) // 30
    axes.plot(x, y, color=color, linewidth=0.8, alpha=0.3)
    mean = np.convolve(y, np.full(window, 1 / window), "valid")
    axes.plot(x[window // 2 :][: len(mean)], mean, color=color, linewidth=1.8)


def _probe(page: _Page, curve: np.ndarray, protocol: str) -> str:
    """The linear layer by epoch: (epochs, 3) training loss, top-1, top-5."""
    epoch = np.arange(1, len(curve) + 1)

    def draw(figure: Figure) -> None:
        loss = _axes(figure.add_subplot(1, 2, 1), "training loss (nats)")
        loss.plot(epoch, curve[:, 0], color=ACCENT, linewidth=1.6)
        score = _axes(figure.add_subplot(1, 2, 2), "validation (%)")
        for column, color, name in ((1, ACCENT, "top-1"), (2, SECOND, "top-5")):
            score.plot(epoch, curve[:, column], color=color, linewidth=1.6)
            last = (epoch[-1], curve[-1, column])
            score.annotate(name, last, (5, 0), textcoords="offset points", va="center", color=color, fontsize=9)
        for axes in (loss, score):
            axes.set_xlabel("epoch", color=MUTED)

    note = f'<p class="note">Protocol: {html.escape(protocol)}.</p>' if protocol else ""
    return page.chart("linear", draw, (9.6, 2.8), "loss and accuracy of the linear layer by epoch") + note


# ---------------------------------------------------------------- pictures


def _clusters(
    page: _Page, found: Mapping[str, np.ndarray], train: Labelled, pictures: Pictures, random: np.random.Generator
) -> str:
    """The picture of the CompRess paper: a row is a cluster; both clusters and images drawn at random."""
    assignment = found["train_assignment"]
    filled = np.unique(assignment)
    chosen = np.sort(random.choice(filled, min(CLUSTERS, len(filled)), replace=False))
    strips = []
    for cluster in chosen.tolist():
        members = np.flatnonzero(assignment == cluster)
        some = random.choice(members, min(PER_CLUSTER, len(members)), replace=False).tolist()
        tiles = [_Tile(pictures("train", int(train.rows[n])), _name(train, n)) for n in some]
        lines = [f"{len(members)} training images"]
        if "majority" in found:
            commonest = int(found["majority"][cluster])
            if commonest >= 0:
                labels = train.label[members]
                share = 100 * np.mean(labels[labels >= 0] == commonest)
                lines.append(f"{share:.0f} % {train.classes[commonest]}")
            mapped = int(found["mapping"][cluster])
            lines.append(f"mapped to {train.classes[mapped]}" if mapped >= 0 else "mapped to no category")
        strips.append(_Strip(f"cluster {cluster}", lines, tiles))
    note = (
        f"A row is a cluster of the training images. Neither clusters nor images are picked: {len(chosen)} of "
        f"{len(filled)} clusters, up to {PER_CLUSTER} images of each, drawn with the page's seed."
    )
    return _strips(page, "clusters", strips, note)


def _neighbours(
    page: _Page,
    found: Mapping[str, np.ndarray],
    train: Labelled,
    val: Labelled,
    pictures: Pictures,
    random: np.random.Generator,
) -> str:
    """Random validation images, each with its nearest training images."""
    near = found["neighbors"]
    strips = []
    for query in np.sort(random.choice(len(near), min(STRIPS, len(near)), replace=False)).tolist():
        tiles = [_Tile(pictures("val", int(val.rows[query])), _name(val, query), "query")]
        same = 0
        for n in near[query].tolist():
            agrees = train.label[n] == val.label[query]
            same += int(agrees)
            tiles.append(_Tile(pictures("train", int(train.rows[n])), _name(train, n), "yes" if agrees else "no"))
        strips.append(_Strip(_name(val, query), [f"{same} of {near.shape[1]} agree"], tiles))
    note = (
        "First in each row a validation image drawn at random, then its nearest training images, nearest first. Green: "
        "of the same category; red and dashed: of another. Only the first neighbour counts for the NN score."
    )
    return _strips(page, "neighbours", strips, note)


@dataclass(frozen=True)
class _Tile:
    picture: np.ndarray  # (H, W, 3) uint8
    title: str
    tone: str = ""  # "yes", "no", "query" or nothing


@dataclass(frozen=True)
class _Strip:
    title: str
    lines: list[str]
    tiles: list[_Tile]


def _strips(page: _Page, name: str, strips: list[_Strip], note: str) -> str:
    page.save(name, render(lambda figure: _mosaic(figure, strips), _mosaic_size(strips), dpi=100))
    rows = []
    for strip in strips:
        small = "".join(f"<small>{html.escape(line)}</small>" for line in strip.lines)
        images = "".join(_image(tile) for tile in strip.tiles)
        rows.append(f'<div class="strip"><div class="who">{html.escape(strip.title)}{small}</div>{images}</div>')
    return f'<p class="note">{html.escape(note)}</p><div class="strips">{"".join(rows)}</div>'


def _image(tile: _Tile) -> str:
    square = _square(tile.picture)
    small = len(square) <= PIXEL_ART
    if not small:
        square = _resize(square, min(len(square), 112))
    data, kind = io.BytesIO(), "PNG" if small else "JPEG"
    Image.fromarray(square).save(data, kind, quality=88)
    look = " ".join(filter(None, (tile.tone, "px" if small else "")))
    text = html.escape(tile.title)
    return f'<img class="{look}" src="{_uri(data.getvalue(), kind.lower())}" alt="{text}" title="{text}">'


def _square(picture: np.ndarray) -> np.ndarray:
    """The central square of (H, W, 3) uint8."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"a picture is (H, W, 3) uint8, not {picture.shape} {picture.dtype}")
    side = min(picture.shape[:2])
    top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
    return np.ascontiguousarray(picture[top : top + side, left : left + side])


def _resize(square: np.ndarray, side: int) -> np.ndarray:
    how = Image.Resampling.NEAREST if len(square) <= PIXEL_ART else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(square).resize((side, side), how))


GAP, RIM, MARGIN = 6, 4, 190  # pixels of figures/: between tiles, of a tile's border, left of them for text


def _mosaic_size(strips: list[_Strip]) -> tuple[float, float]:
    most, pitch = max(len(strip.tiles) for strip in strips), TILE + 2 * RIM + GAP
    return (MARGIN + most * pitch + GAP) / 100, (len(strips) * pitch + GAP) / 100


def _mosaic(figure: Figure, strips: list[_Strip]) -> None:
    """The same rows as one picture for figures/, pixel by pixel at 100 to the inch."""
    wide, high = (round(100 * inches) for inches in _mosaic_size(strips))
    pitch = TILE + 2 * RIM + GAP
    canvas = np.full((high, wide, 3), 255, np.uint8)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    rims = {"yes": (26, 127, 55), "no": (207, 34, 46), "query": (27, 31, 36)}
    for row, strip in enumerate(strips):
        top = GAP + row * pitch
        for column, tile in enumerate(strip.tiles):
            left = MARGIN + GAP + column * pitch
            canvas[top : top + TILE + 2 * RIM, left : left + TILE + 2 * RIM] = rims.get(tile.tone, (255, 255, 255))
            inner = canvas[top + RIM : top + RIM + TILE, left + RIM : left + RIM + TILE]
            inner[:] = _resize(_square(tile.picture), TILE)
        text = "\n".join(_short(line, 26) for line in (strip.title, *strip.lines))
        label = axes.text(MARGIN - 4, top + RIM + TILE / 2, text, ha="right", va="center", parse_math=False)
        label.set(fontsize=9, linespacing=1.4, color=INK)
    axes.imshow(canvas, interpolation="nearest", aspect="auto", extent=(0, wide, high, 0))


# ---------------------------------------------------------------- confusion


def _confusion(page: _Page, counts: np.ndarray, classes: tuple[str, ...]) -> str:
    """(C, C + 1) validation images of each category by the category of their cluster, as a share of the row."""
    lost = int(counts[:, -1].sum())
    shown = counts if lost else counts[:, :-1]
    images = counts.sum(axis=1, keepdims=True)
    share = np.divide(100.0 * shown, images, out=np.zeros(shown.shape), where=images > 0)
    names = [_short(name, 18) for name in classes] + ["(none)"] * bool(lost)
    side = min(7.5, 3.2 + 0.28 * len(classes))

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        ramp = LinearSegmentedColormap.from_list(
            "share", [ACCENT + "00", ACCENT]
        )  # from nothing: any page may show through
        drawn = axes.imshow(share, cmap=ramp, vmin=0, vmax=100, aspect="equal")
        _heat_labels(axes, share, names)
        bar = figure.colorbar(drawn, ax=axes, fraction=0.045, pad=0.03)
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.ax.tick_params(colors=MUTED, length=0, labelsize=8)
        bar.set_label("% of the category's images", color=MUTED, fontsize=9)

    chart = page.chart("confusion", draw, (side + 0.9, side), "confusion matrix of categories and mapped clusters")
    note = (
        "Validation images by their category (rows) and the category their cluster is mapped to on training (columns)."
    )
    if lost:
        note += f" {lost} lie in clusters that have no category."
    return f'<p class="note">{note}</p><div class="pair">{chart}{_mixed(counts[:, :-1], classes)}</div>'


def _heat_labels(axes: Axes, share: np.ndarray, names: list[str]) -> None:
    high, wide = share.shape
    axes.set_ylabel("category", color=MUTED)
    axes.set_xlabel("category of its cluster", color=MUTED)
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)
    axes.tick_params(colors=MUTED, length=0, labelsize=8)
    for spine in axes.spines.values():
        spine.set_color(GRID)
    if high > 30:
        return
    axes.set_yticks(range(high), labels=names[:high], parse_math=False)
    axes.set_xticks(range(wide), labels=names, parse_math=False, rotation=45, ha="right", rotation_mode="anchor")
    if high > 15:
        return
    for row, column in zip(*np.nonzero(share >= 0.5), strict=True):
        color = "white" if share[row, column] > 55 else INK
        axes.text(column, row, f"{share[row, column]:.0f}", ha="center", va="center", fontsize=8, color=color)


def _mixed(counts: np.ndarray, classes: tuple[str, ...]) -> str:
    """The largest confusions as a table: of a thousand categories the picture shows only the diagonal."""
    off = counts.copy()
    np.fill_diagonal(off, 0)
    order = [(n // len(off), n % len(off)) for n in np.argsort(-off, axis=None, kind="stable")[:8].tolist()]
    rows = "".join(
        f'<tr><td>{html.escape(classes[a])} &rarr; {html.escape(classes[b])}</td><td class="n">{off[a, b]}</td></tr>'
        for a, b in order
        if off[a, b]
    )
    head = '<tr><th>most often mixed up</th><th class="n">images</th></tr>'
    return f"<table>{head}{rows}</table>" if rows else ""


# ---------------------------------------------------------------- many evaluations


def compare(rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """(plain table, HTML page) of many metrics.json: teachers first, then in the order given.

    The best score of a column is marked, among the rows that are not a teacher if there are any. A
    protocol that a row lacks is a dash. Says so when the rows were not evaluated on the same data.
    """
    rows = sorted(rows, key=lambda row: not _is_teacher(row))
    scores = [readings(row) for row in rows]
    titles = list(dict.fromkeys(title for titled in map(readings, _widest_first(rows)) for title in titled))
    rivals = [n for n, row in enumerate(rows) if not _is_teacher(row)] or list(range(len(rows)))
    best = {
        title: max((round(scores[n][title], 1) for n in rivals if title in scores[n]), default=None) for title in titles
    }
    head = ["model", "role", "parameters", "width", *titles]
    body: list[list[str]] = []
    marked: list[set[int]] = []
    for n, row in enumerate(rows):
        model = _model(row)
        cells = [str(model.get("name", DASH)), str(model.get("role") or DASH)]
        cells += [_amount(model.get("parameters")), _amount(model.get("width"), short=False)]
        body.append(cells + [_number(scores[n].get(title)) for title in titles])
        wins = {
            4 + t for t, title in enumerate(titles) if title in scores[n] and round(scores[n][title], 1) == best[title]
        }
        marked.append(wins if n in rivals else set())
    notes = [f"best of the {'students' if len(rivals) < len(rows) else 'rows'}"] if titles else []
    return _plain(head, body, marked, notes, _unlike(rows)), _compare_page(rows, head, body, marked, notes)


def _widest_first(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """So that the columns stand in the order of the fullest row."""
    return sorted(rows, key=lambda row: -len(readings(row)))


def _unlike(rows: Sequence[Mapping[str, Any]]) -> str:
    """A warning if the rows' data records differ, with the keys that do."""
    records = [dict(_flat(row.get("data") or {})) for row in rows]
    keys = sorted({key for record in records for key in record})
    odd = [key for key in keys if len({json.dumps(r.get(key), sort_keys=True, default=str) for r in records}) > 1]
    return f"Not all rows were evaluated on the same data; they differ in: {', '.join(odd)}." if odd else ""


def _plain(head: list[str], body: list[list[str]], marked: list[set[int]], notes: list[str], warning: str) -> str:
    """The table as text: names to the left, numbers to the right, * for the best."""
    cells = [head] + [
        [_short(c, 60) + ("*" if n in m else "") for n, c in enumerate(r)] for r, m in zip(body, marked, strict=True)
    ]
    cells = [[c if c.endswith("*") or n < 4 else c + " " for n, c in enumerate(row)] for row in cells]
    width = [max(len(row[n]) for row in cells) for n in range(len(head))]
    lines = [
        "  ".join(c.ljust(w) if n < 2 else c.rjust(w) for n, (c, w) in enumerate(zip(row, width, strict=True)))
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * w for w in width))
    lines += [f"* {note}" for note in notes] + [warning] * bool(warning)
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _compare_page(
    rows: Sequence[Mapping[str, Any]], head: list[str], body: list[list[str]], marked: list[set[int]], notes: list[str]
) -> str:
    page = _Page()
    lines = [_row("th", map(html.escape, head))]
    for row, cells, wins in zip(rows, body, marked, strict=True):
        text = [f"<b>{html.escape(c)}</b>" if n in wins else html.escape(c) for n, c in enumerate(cells)]
        lines.append(_row("td", text, "teacher" if _is_teacher(row) else ""))
    warning = f'<p class="warning">{html.escape(_unlike(rows))}</p>' if _unlike(rows) else ""
    legend = "".join(f'<p class="note">Bold: {html.escape(note)}.</p>' for note in notes)
    page.add("", f'{warning}<div class="wide"><table class="compare">{"".join(lines)}</table></div>{legend}')
    page.add("Accuracy against size", _scatter(page, rows))
    used = [key for key in NOTES if any(key in title.split() for title in head)]
    terms = "".join(f"<dt>{key}</dt><dd>{html.escape(NOTES[key])}</dd>" for key in used)
    page.add("What the columns are", f"<dl>{terms}</dl>" if terms else "")
    return page.spell("Comparison").decode()


def _row(tag: str, cells: Iterable[str], tone: str = "") -> str:
    """Two columns of words, then numbers."""
    text = (f"<{tag}>{cell}</{tag}>" if n < 2 else f'<{tag} class="n">{cell}</{tag}>' for n, cell in enumerate(cells))
    return f'<tr class="{tone}">{"".join(text)}</tr>' if tone else f"<tr>{''.join(text)}</tr>"


def _scatter(page: _Page, rows: Sequence[Mapping[str, Any]]) -> str:
    """Parameters against up to three scores; the teacher is a star."""
    sized = [row for row in rows if _finite(_model(row).get("parameters")) and _model(row)["parameters"] > 0]
    wanted = ("NN", "Cluster", "Linear", "Linear (augmented)")
    have = [title for title in wanted if any(title in readings(row) for row in sized)][:3]
    if not have:
        return ""
    size = (10.2, 3.4) if len(have) > 1 else (6.4, 3.6)

    def draw(figure: Figure) -> None:
        for number, title in enumerate(have):
            axes = _axes(figure.add_subplot(1, len(have), number + 1), f"{title} (%)")
            axes.set_xscale("log")
            axes.set_xlabel("parameters", color=MUTED)
            points = [row for row in sized if title in readings(row)]
            _points(axes, points, title, (size[0] / len(have) - 0.5, size[1] - 0.8))

    note = '<p class="note">Star: a teacher. The axis of parameters is logarithmic.</p>'
    return page.chart("compare", draw, size, "accuracy against number of parameters") + note


def _points(axes: Axes, rows: Sequence[Mapping[str, Any]], title: str, size: tuple[float, float]) -> None:
    """Points with names, on axes about `size` inches large."""
    x = np.array([float(_model(row)["parameters"]) for row in rows])
    y = np.array([readings(row)[title] for row in rows])
    teacher = np.array([_is_teacher(row) for row in rows])
    axes.scatter(x[~teacher], y[~teacher], s=34, color=ACCENT, zorder=3)
    axes.scatter(x[teacher], y[teacher], s=110, marker="*", color=SECOND, zorder=3)
    spread = max(float(np.ptp(y)), 2.0)
    axes.set_xlim(x.min() / 2, x.max() * 2)
    axes.set_ylim(y.min() - 0.2 * spread, y.max() + 0.2 * spread)
    (low, high), (bottom, top) = np.log(axes.get_xlim()), axes.get_ylim()
    across = (np.log(x) - low) / (high - low) * size[0] * 72  # in points, as the letters are
    up = (y - bottom) / (top - bottom) * size[1] * 72
    names = [_short(str(_model(row).get("name", "")), 22) for row in rows]
    for n, (side, rise) in enumerate(_places(across, up, names, size[0] * 72)):
        thread = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.6} if rise else None
        where = (side * 7, rise)
        label = axes.annotate(names[n], (x[n], y[n]), where, textcoords="offset points", va="center", arrowprops=thread)
        label.set(parse_math=False, ha="left" if side > 0 else "right", fontsize=8, color=INK)


def _places(x: np.ndarray, y: np.ndarray, names: list[str], width: float) -> list[tuple[int, int]]:
    """(side, rise in points) of each name: the nearest place where it covers no other name or point."""
    taken = [(a - 4, a + 4, b) for a, b in zip(x, y, strict=True)]  # left, right, height

    def cost(left: float, right: float, height: float) -> int:
        covered = sum(left < far and near < right and abs(height - other) < 10 for near, far, other in taken)
        return covered + 100 * (left < 0 or right > width)

    places = []
    for a, b, name in zip(x, y, names, strict=True):
        tries = []
        for rise in (0, 12, -12, 24, -24, 36, -36):
            for side in (1, -1):
                left, right = sorted((a + side * 6, a + side * (7 + 4.6 * len(name))))  # a letter is 4.6 points wide
                tries.append((side, rise, (left, right, b + rise)))
        side, rise, box = min(tries, key=lambda place: cost(*place[2]))  # the first, hence nearest, of the best
        taken.append(box)
        places.append((side, rise))
    return places


# ---------------------------------------------------------------- drawing and spelling


def render(draw: Draw, size: tuple[float, float], dpi: int = 160) -> bytes:
    """A figure of `size` inches as transparent PNG. No pyplot, so no global state."""
    figure = Figure(figsize=size, dpi=dpi, facecolor="none", layout="constrained")
    draw(figure)
    data = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a class name in a script the font lacks; the page has it in full
        figure.savefig(data, format="png")
    return data.getvalue()


def _axes(axes: Axes, title: str) -> Axes:
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_facecolor("none")
    axes.grid(color=GRID, linewidth=0.8)
    axes.locator_params(nbins=5)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=8, length=0, which="both")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(MUTED)
    axes.xaxis.label.set_fontsize(9)
    return axes


def _uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _model(row: Mapping[str, Any]) -> Mapping[str, Any]:
    return row.get("model") or {}


def _is_teacher(row: Mapping[str, Any]) -> bool:
    return _model(row).get("role") == "teacher"


def _name(split: Labelled, n: int) -> str:
    return split.classes[int(split.label[n])] if split.label[n] >= 0 else "no label"


def _short(text: str, most: int) -> str:
    """One printable line of at most `most` characters."""
    line = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    return line if len(line) <= most else line[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _number(value: float | None) -> str:
    return DASH if value is None else f"{value:.1f}"


def _signed(value: float | None) -> str:
    if value is None:
        return DASH
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}") if round(value, 1) else "0.0"


def _amount(value: Any, short: bool = True) -> str:
    """11689512 -> 11.7M; a width is spelt out."""
    if not _finite(value):
        return DASH
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if short and value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _flat(record: Mapping[str, Any], under: str = "") -> list[tuple[str, Any]]:
    """Nested records as dotted names."""
    out: list[tuple[str, Any]] = []
    for key, value in record.items():
        name = f"{under}.{key}" if under else str(key)
        out += _flat(value, name) if isinstance(value, Mapping) else [(name, value)]
    return out


def _text(value: Any) -> str:
    if value is None:
        return DASH
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value[:12])) + (f" and {len(value) - 12} more" if len(value) > 12 else "")
    return f"{value:g}" if isinstance(value, float) else str(value)


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
