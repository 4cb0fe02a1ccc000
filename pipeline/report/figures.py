"""The charts of the pages, drawn with matplotlib: arrays of numbers in, a `Chart` out.

pyplot is not used, because it keeps global state. A chart has a transparent background and the colours of the light
page; a dark page inverts it in CSS.
"""

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from compress_ssl.pipeline.evaluators.base import Bars, ConfusionMatrix, Lines, Panel
from compress_ssl.pipeline.runtime.formatting import shorten

INK, MUTED, GRID, ACCENT, SECOND = "#1b1f24", "#667085", "#e4e7ec", "#2563eb", "#c2410c"
"""Colours of text, of axes, of grid lines and of the first and second series; the same as in templates/style.css."""

SERIES = (ACCENT, SECOND, "#1a7f37", "#7c3aed", "#b45309", "#0e7490", MUTED)
"""Colours of the lines of a panel, in turn."""

SMOOTHED_FROM = 60  # points: a curve of as many gets a running mean over 1/30 of them, thus at least 2
MARKED_UP_TO = 25  # points: a curve of fewer has a marker at every point
NAMED_UP_TO = 30  # categories: of more, the names beside a confusion matrix would overlap
NUMBERED_UP_TO = 15  # categories: of more, the numbers in the cells would not fit
POINTS_PER_INCH = 72  # matplotlib's unit of font sizes and offsets
LETTER_WIDTH = 4.6  # points: the average letter at font size 8
LINE_HEIGHT = 10  # points: of a label at font size 8, with the space around it


@dataclass(frozen=True)
class Chart:
    """A chart that is drawn when it is rendered."""

    draw: Callable[[Figure], None]
    size: tuple[float, float]  # width, height in inches
    dpi: int = 160  # pixels per inch: sharp on screens with two pixels per CSS pixel


def render(chart: Chart) -> bytes:
    """A chart as a PNG file with a transparent background."""
    figure = Figure(figsize=chart.size, dpi=chart.dpi, facecolor="none", layout="constrained")
    chart.draw(figure)
    data = io.BytesIO()
    with warnings.catch_warnings():
        # A class name may be in a script that the font lacks; the page itself shows it with the browser's fonts.
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(data, format="png")
    return data.getvalue()


def _style_axes(axes: Axes, title: str) -> Axes:
    """Give axes the title and look that all charts share, and return them."""
    axes.set_title(shorten(title, 60), loc="left", fontsize=10, color=INK, parse_math=False)
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


# ---------------------------------------------------------------- curves


def draw_curves(lines: Mapping[str, np.ndarray]) -> Chart:
    """Training curves: one panel per title, with its (m, 2) array of steps and values, three panels in a row.

    The vertical axis of a title that ends in "(%)" starts at 0.
    """
    columns = min(3, len(lines))
    rows = -(-len(lines) // columns)

    def draw(figure: Figure) -> None:
        for number, (title, line) in enumerate(lines.items()):
            axes = _style_axes(figure.add_subplot(rows, columns, number + 1), title)
            _draw_line(axes, line[:, 0], line[:, 1])
            axes.set_xlabel("step", color=MUTED)
            if title.endswith("(%)"):
                axes.set_ylim(bottom=0)

    return Chart(draw, (3.4 * columns, 2.6 * rows))


def _draw_line(axes: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """A short curve as it is; a long one as a faint line with its running mean as a strong line."""
    if len(y) < SMOOTHED_FROM:
        axes.plot(x, y, color=ACCENT, linewidth=1.6, marker="o" if len(y) < MARKED_UP_TO else "", markersize=3)
        return
    window = len(y) // 30
    axes.plot(x, y, color=ACCENT, linewidth=0.8, alpha=0.3)
    mean = np.convolve(y, np.full(window, 1 / window), "valid")
    axes.plot(x[window // 2 :][: len(mean)], mean, color=ACCENT, linewidth=1.8)


def draw_lines(lines: Lines) -> Chart:
    """The curves of a protocol: its panels side by side, three in a row."""
    columns = min(3, len(lines.panels))
    rows = -(-len(lines.panels) // columns)

    def draw(figure: Figure) -> None:
        for number, panel in enumerate(lines.panels):
            axes = _style_axes(figure.add_subplot(rows, columns, number + 1), shorten(panel.title, 60))
            axes.set_xlabel(shorten(lines.x_label, 60), color=MUTED, parse_math=False)
            _draw_panel(axes, panel)

    return Chart(draw, ((6.4, 9.6, 10.2)[columns - 1], 2.8 * rows))


def _draw_panel(axes: Axes, panel: Panel) -> None:
    """The lines of a panel; of several, each has its name at its last value."""
    for number, (name, line) in enumerate(panel.lines.items()):
        color = SERIES[number % len(SERIES)]
        axes.plot(panel.x, line, color=color, linewidth=1.6, marker="o" if len(line) == 1 else "")
        known = np.flatnonzero(np.isfinite(line))
        if len(panel.lines) > 1 and len(known):
            last = (panel.x[known[-1]], line[known[-1]])
            label = axes.annotate(shorten(name, 18), last, (5, 0), textcoords="offset points", va="center")
            label.set(color=color, fontsize=9, parse_math=False)


def draw_bars(bars: Bars) -> Chart:
    """A horizontal bar for each label, with its value at its end while the labels are few enough to be read."""
    height = max(1.2, min(0.26 * len(bars.labels), 8.0)) + 0.7  # inches

    def draw(figure: Figure) -> None:
        axes = _style_axes(figure.add_subplot(), "")
        axes.barh(range(len(bars.labels)), np.nan_to_num(bars.values), color=ACCENT, height=0.7)
        axes.invert_yaxis()  # the first label is the uppermost
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(shorten(bars.unit, 30), color=MUTED, parse_math=False)
        if len(bars.labels) > NAMED_UP_TO:
            return
        axes.set_yticks(range(len(bars.labels)), labels=[shorten(name, 24) for name in bars.labels], parse_math=False)
        for place, value in enumerate(bars.values):
            if np.isfinite(value):
                offset = (4 if value >= 0 else -4, 0)
                label = axes.annotate(f"{value:.1f}", (value, place), offset, textcoords="offset points", va="center")
                label.set(fontsize=8, color=INK, ha="left" if value >= 0 else "right")

    return Chart(draw, (7.0, height))


# ---------------------------------------------------------------- confusion


def draw_confusion(matrix: ConfusionMatrix) -> Chart:
    """A confusion matrix, each row as percentages of its images."""
    counts = matrix.counts
    images = counts.sum(axis=1, keepdims=True)
    share = np.divide(100.0 * counts, images, out=np.zeros(counts.shape), where=images > 0)
    side = min(7.5, 3.2 + 0.28 * len(matrix.rows))  # inches

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        ramp = LinearSegmentedColormap.from_list("share", [ACCENT + "00", ACCENT])  # 0 % is transparent
        image = axes.imshow(share, cmap=ramp, vmin=0, vmax=100, aspect="equal")
        _label_confusion(axes, share, matrix)
        bar = figure.colorbar(image, ax=axes, fraction=0.045, pad=0.03)
        bar.outline.set_visible(False)
        bar.ax.tick_params(colors=MUTED, length=0, labelsize=8)
        label = f"% of the {shorten(matrix.row_title, 40)}'s images"
        bar.set_label(label, color=MUTED, fontsize=9, parse_math=False)

    return Chart(draw, (side + 0.9, side))


def _label_confusion(axes: Axes, share: np.ndarray, matrix: ConfusionMatrix) -> None:
    """Names beside the matrix and percentages in its cells, as far as there is room for them."""
    axes.set_ylabel(shorten(matrix.row_title, 60), color=MUTED, parse_math=False)
    axes.set_xlabel(shorten(matrix.column_title, 60), color=MUTED, parse_math=False)
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)
    axes.tick_params(colors=MUTED, length=0, labelsize=8)
    for spine in axes.spines.values():
        spine.set_color(GRID)
    if max(share.shape) > NAMED_UP_TO:
        return
    rows, columns = ([shorten(name, 18) for name in names] for names in (matrix.rows, matrix.columns))
    axes.set_yticks(range(len(rows)), labels=rows, parse_math=False)
    axes.set_xticks(
        range(len(columns)), labels=columns, parse_math=False, rotation=45, ha="right", rotation_mode="anchor"
    )
    if len(rows) > NUMBERED_UP_TO:
        return
    for row, column in zip(*np.nonzero(share >= 0.5), strict=True):  # below 0.5 % the number would read 0
        color = "white" if share[row, column] > 55 else INK
        axes.text(column, row, f"{share[row, column]:.0f}", ha="center", va="center", fontsize=8, color=color)


# ---------------------------------------------------------------- accuracy against size


@dataclass(frozen=True)
class Dot:
    """One model in a scatter chart."""

    name: str
    parameters: float  # a count above 0, because the axis is logarithmic
    score: float  # percent
    teacher: bool  # drawn as a star


def draw_scatter(panels: Mapping[str, Sequence[Dot]]) -> Chart:
    """Score against number of parameters: one panel per title, three in a row, a named dot per model."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    width, height = (10.2, 3.4) if columns > 1 else (6.4, 3.6)  # of a row

    def draw(figure: Figure) -> None:
        for number, (title, dots) in enumerate(panels.items()):
            axes = _style_axes(figure.add_subplot(rows, columns, number + 1), title)
            axes.set_xscale("log")
            axes.set_xlabel("parameters", color=MUTED)
            _draw_dots(axes, dots, (width / columns - 0.5, height - 0.8))

    return Chart(draw, (width, height * rows))


def _draw_dots(axes: Axes, dots: Sequence[Dot], size: tuple[float, float]) -> None:
    """Draw dots and their names on axes of about `size` inches (width, height)."""
    x, y = np.array([[dot.parameters, dot.score] for dot in dots], dtype=np.float64).T
    teacher = np.array([dot.teacher for dot in dots])
    axes.scatter(x[~teacher], y[~teacher], s=34, color=ACCENT, zorder=3)
    axes.scatter(x[teacher], y[teacher], s=110, marker="*", color=SECOND, zorder=3)
    spread = max(float(np.ptp(y)), 2.0)  # percent: equal scores still get an axis of some height
    axes.set_xlim(x.min() / 2, x.max() * 2)
    axes.set_ylim(y.min() - 0.2 * spread, y.max() + 0.2 * spread)

    (low, high), (bottom, top) = np.log(axes.get_xlim()), axes.get_ylim()
    across = (np.log(x) - low) / (high - low) * size[0] * POINTS_PER_INCH
    up = (y - bottom) / (top - bottom) * size[1] * POINTS_PER_INCH
    names = [shorten(dot.name, 22) for dot in dots]
    for n, (side, rise) in enumerate(place_labels(across, up, names, size[0] * POINTS_PER_INCH)):
        line = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.6} if rise else None  # from the dot to a moved name
        offset = (side * 7, rise)
        label = axes.annotate(names[n], (x[n], y[n]), offset, textcoords="offset points", va="center", arrowprops=line)
        label.set(parse_math=False, ha="left" if side > 0 else "right", fontsize=8, color=INK)


def place_labels(x: np.ndarray, y: np.ndarray, names: list[str], width: float) -> list[tuple[int, int]]:
    """(side, rise) of each dot's name: 1 right or -1 left of the dot, and how many points above it.

    x, y: (m,) positions of the dots in points, on axes `width` points wide. A name takes the nearest place where it
    covers the fewest other names and dots and does not leave the axes.
    """
    # (left, right, height) of each dot, then also of each name
    taken: list[tuple[float, float, float]] = [(a - 4, a + 4, b) for a, b in zip(x, y, strict=True)]

    def cost(left: float, right: float, height: float) -> int:
        covered = sum(
            bool(left < far and near < right and abs(height - other) < LINE_HEIGHT) for near, far, other in taken
        )
        return covered + 100 * (left < 0 or right > width)

    found = []
    for a, b, name in zip(x, y, names, strict=True):
        candidates = []
        for rise in (0, 12, -12, 24, -24, 36, -36):
            for side in (1, -1):
                left, right = sorted((a + side * 6, a + side * (7 + LETTER_WIDTH * len(name))))
                candidates.append((side, rise, (left, right, b + rise)))
        # Of equal costs min() takes the first candidate, hence the nearest to the dot.
        side, rise, box = min(candidates, key=lambda candidate: cost(*candidate[2]))
        taken.append(box)
        found.append((side, rise))
    return found
