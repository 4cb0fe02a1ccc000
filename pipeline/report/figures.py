"""The figures: numbers in, a `Chart` out. No pyplot, so no global state; nothing here knows of HTML.

A chart is transparent, in the light page's colours; a dark page inverts it.
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

INK, MUTED, GRID, ACCENT, SECOND = "#1b1f24", "#667085", "#e4e7ec", "#2563eb", "#c2410c"  # as in style.css
MANY = 60  # points from which a running mean over a thirtieth of them is drawn


@dataclass(frozen=True)
class Chart:
    draw: Callable[[Figure], None]
    size: tuple[float, float]  # inches
    dpi: int = 160


def render(chart: Chart) -> bytes:
    """A chart as transparent PNG."""
    figure = Figure(figsize=chart.size, dpi=chart.dpi, facecolor="none", layout="constrained")
    chart.draw(figure)
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


# ---------------------------------------------------------------- curves


def curves(lines: Mapping[str, np.ndarray]) -> Chart:
    """Each title with its (m, 2) steps and values: a panel of its own; what is in percent starts at 0."""
    wide = min(3, len(lines))
    tall = -(-len(lines) // wide)

    def draw(figure: Figure) -> None:
        for number, (title, line) in enumerate(lines.items()):
            axes = _axes(figure.add_subplot(tall, wide, number + 1), title)
            _line(axes, line[:, 0], line[:, 1])
            axes.set_xlabel("step", color=MUTED)
            if title.endswith("(%)"):
                axes.set_ylim(bottom=0)

    return Chart(draw, (3.4 * wide, 2.6 * tall))


def _line(axes: Axes, x: np.ndarray, y: np.ndarray) -> None:
    if len(y) < MANY:
        axes.plot(x, y, color=ACCENT, linewidth=1.6, marker="o" if len(y) < 25 else "", markersize=3)
        return
    window = len(y) // 30
    axes.plot(x, y, color=ACCENT, linewidth=0.8, alpha=0.3)
    mean = np.convolve(y, np.full(window, 1 / window), "valid")
    axes.plot(x[window // 2 :][: len(mean)], mean, color=ACCENT, linewidth=1.8)


def probe(curve: np.ndarray) -> Chart:
    """A linear layer by epoch: (epochs, 3) training loss, top-1, top-5."""
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

    return Chart(draw, (9.6, 2.8))


# ---------------------------------------------------------------- confusion


def confusion(counts: np.ndarray, classes: Sequence[str]) -> Chart:
    """(C, C or C + 1) images of each category by the category of their cluster, as a share of the row.

    The column after the last category, where there is one, is of clusters that have none.
    """
    images = counts.sum(axis=1, keepdims=True)
    share = np.divide(100.0 * counts, images, out=np.zeros(counts.shape), where=images > 0)
    names = [shorten(name, 18) for name in classes] + ["(none)"] * (counts.shape[1] - len(classes))
    side = min(7.5, 3.2 + 0.28 * len(classes))

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        ramp = LinearSegmentedColormap.from_list("share", [ACCENT + "00", ACCENT])  # from nothing: the page's own
        drawn = axes.imshow(share, cmap=ramp, vmin=0, vmax=100, aspect="equal")
        _heat_labels(axes, share, names)
        bar = figure.colorbar(drawn, ax=axes, fraction=0.045, pad=0.03)
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.ax.tick_params(colors=MUTED, length=0, labelsize=8)
        bar.set_label("% of the category's images", color=MUTED, fontsize=9)

    return Chart(draw, (side + 0.9, side))


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


# ---------------------------------------------------------------- accuracy against size


@dataclass(frozen=True)
class Dot:
    name: str
    parameters: float  # above 0: their axis is logarithmic
    score: float  # percent
    teacher: bool  # a star


def scatter(panels: Mapping[str, Sequence[Dot]]) -> Chart:
    """Parameters against each score, the title's panel beside the next."""
    size = (10.2, 3.4) if len(panels) > 1 else (6.4, 3.6)

    def draw(figure: Figure) -> None:
        for number, (title, dots) in enumerate(panels.items()):
            axes = _axes(figure.add_subplot(1, len(panels), number + 1), f"{title} (%)")
            axes.set_xscale("log")
            axes.set_xlabel("parameters", color=MUTED)
            _dots(axes, dots, (size[0] / len(panels) - 0.5, size[1] - 0.8))

    return Chart(draw, size)


def _dots(axes: Axes, dots: Sequence[Dot], size: tuple[float, float]) -> None:
    """Points with names, on axes about `size` inches large."""
    x, y = np.array([[dot.parameters, dot.score] for dot in dots], dtype=np.float64).T
    teacher = np.array([dot.teacher for dot in dots])
    axes.scatter(x[~teacher], y[~teacher], s=34, color=ACCENT, zorder=3)
    axes.scatter(x[teacher], y[teacher], s=110, marker="*", color=SECOND, zorder=3)
    spread = max(float(np.ptp(y)), 2.0)
    axes.set_xlim(x.min() / 2, x.max() * 2)
    axes.set_ylim(y.min() - 0.2 * spread, y.max() + 0.2 * spread)
    (low, high), (bottom, top) = np.log(axes.get_xlim()), axes.get_ylim()
    across = (np.log(x) - low) / (high - low) * size[0] * 72  # in points, as the letters are
    up = (y - bottom) / (top - bottom) * size[1] * 72
    names = [shorten(dot.name, 22) for dot in dots]
    for n, (side, rise) in enumerate(places(across, up, names, size[0] * 72)):
        thread = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.6} if rise else None
        where = (side * 7, rise)
        label = axes.annotate(names[n], (x[n], y[n]), where, textcoords="offset points", va="center", arrowprops=thread)
        label.set(parse_math=False, ha="left" if side > 0 else "right", fontsize=8, color=INK)


def places(x: np.ndarray, y: np.ndarray, names: list[str], width: float) -> list[tuple[int, int]]:
    """(side, rise in points) of each name: the nearest place where it covers no other name or point."""
    taken = [(a - 4, a + 4, b) for a, b in zip(x, y, strict=True)]  # left, right, height

    def cost(left: float, right: float, height: float) -> int:
        covered = sum(left < far and near < right and abs(height - other) < 10 for near, far, other in taken)
        return covered + 100 * (left < 0 or right > width)

    found = []
    for a, b, name in zip(x, y, names, strict=True):
        tries = []
        for rise in (0, 12, -12, 24, -24, 36, -36):
            for side in (1, -1):
                left, right = sorted((a + side * 6, a + side * (7 + 4.6 * len(name))))  # a letter is 4.6 points wide
                tries.append((side, rise, (left, right, b + rise)))
        side, rise, box = min(tries, key=lambda place: cost(*place[2]))  # the first, hence nearest, of the best
        taken.append(box)
        found.append((side, rise))
    return found
