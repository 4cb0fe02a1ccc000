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

from compress_ssl.pipeline.runtime.formatting import shorten

INK, MUTED, GRID, ACCENT, SECOND = "#1b1f24", "#667085", "#e4e7ec", "#2563eb", "#c2410c"
"""Colours of text, of axes, of grid lines and of the first and second series; the same as in templates/style.css."""

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


def draw_probe(curve: np.ndarray) -> Chart:
    """The training of a linear probe by epoch, from its (epochs, 3) curve: loss in nats; top-1 and top-5 in percent."""
    epoch = np.arange(1, len(curve) + 1)

    def draw(figure: Figure) -> None:
        loss = _style_axes(figure.add_subplot(1, 2, 1), "training loss (nats)")
        loss.plot(epoch, curve[:, 0], color=ACCENT, linewidth=1.6)
        score = _style_axes(figure.add_subplot(1, 2, 2), "validation (%)")
        for column, color, name in ((1, ACCENT, "top-1"), (2, SECOND, "top-5")):
            score.plot(epoch, curve[:, column], color=color, linewidth=1.6)
            last = (epoch[-1], curve[-1, column])
            score.annotate(name, last, (5, 0), textcoords="offset points", va="center", color=color, fontsize=9)
        for axes in (loss, score):
            axes.set_xlabel("epoch", color=MUTED)

    return Chart(draw, (9.6, 2.8))


# ---------------------------------------------------------------- confusion


def draw_confusion(counts: np.ndarray, classes: Sequence[str]) -> Chart:
    """The confusion matrix of categories and mapped clusters, each row as percentages of its category's images.

    counts: (C, C) or (C, C + 1) images of each category (row) by the category of their cluster (column). A last
    column C counts images in clusters that have no category.
    """
    images = counts.sum(axis=1, keepdims=True)
    share = np.divide(100.0 * counts, images, out=np.zeros(counts.shape), where=images > 0)
    names = [shorten(name, 18) for name in classes] + ["(none)"] * (counts.shape[1] - len(classes))
    side = min(7.5, 3.2 + 0.28 * len(classes))  # inches

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        ramp = LinearSegmentedColormap.from_list("share", [ACCENT + "00", ACCENT])  # 0 % is transparent
        image = axes.imshow(share, cmap=ramp, vmin=0, vmax=100, aspect="equal")
        _label_confusion(axes, share, names)
        bar = figure.colorbar(image, ax=axes, fraction=0.045, pad=0.03)
        bar.outline.set_visible(False)
        bar.ax.tick_params(colors=MUTED, length=0, labelsize=8)
        bar.set_label("% of the category's images", color=MUTED, fontsize=9)

    return Chart(draw, (side + 0.9, side))


def _label_confusion(axes: Axes, share: np.ndarray, names: list[str]) -> None:
    """Names beside the matrix and percentages in its cells, as far as there is room for them."""
    rows, columns = share.shape
    axes.set_ylabel("category", color=MUTED)
    axes.set_xlabel("category of its cluster", color=MUTED)
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)
    axes.tick_params(colors=MUTED, length=0, labelsize=8)
    for spine in axes.spines.values():
        spine.set_color(GRID)
    if rows > NAMED_UP_TO:
        return
    axes.set_yticks(range(rows), labels=names[:rows], parse_math=False)
    axes.set_xticks(range(columns), labels=names, parse_math=False, rotation=45, ha="right", rotation_mode="anchor")
    if rows > NUMBERED_UP_TO:
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
    """Score against number of parameters: one panel per title, side by side, a named dot per model."""
    size = (10.2, 3.4) if len(panels) > 1 else (6.4, 3.6)

    def draw(figure: Figure) -> None:
        for number, (title, dots) in enumerate(panels.items()):
            axes = _style_axes(figure.add_subplot(1, len(panels), number + 1), f"{title} (%)")
            axes.set_xscale("log")
            axes.set_xlabel("parameters", color=MUTED)
            _draw_dots(axes, dots, (size[0] / len(panels) - 0.5, size[1] - 0.8))

    return Chart(draw, size)


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
        covered = sum(left < far and near < right and abs(height - other) < LINE_HEIGHT for near, far, other in taken)
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
