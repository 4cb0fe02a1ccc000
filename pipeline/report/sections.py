"""The figures of protocols as sections of the page. Each kind of figure is drawn here, whoever handed it over."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from compress_ssl.pipeline.evaluators.base import Bars, ConfusionMatrix, Figure, ImageGrid, Lines, Split
from compress_ssl.pipeline.report import figures, image_grids
from compress_ssl.pipeline.report.html import EmbeddedChart, embed_chart, save_figure
from compress_ssl.pipeline.report.image_grids import LoadedGrid, LoadImage
from compress_ssl.pipeline.runtime.storage import Folder

MAX_CONFUSIONS = 8  # pairs of categories listed beside a confusion matrix


@dataclass(frozen=True)
class Drawn:
    """A figure as the template shows it: a chart, or a grid of images."""

    note: str = ""  # above it
    chart: EmbeddedChart | None = None
    grid: LoadedGrid | None = None
    confusions: list[tuple[str, str, int]] = field(default_factory=list)  # (category, mistaken for, images)


@dataclass(frozen=True)
class Section:
    """Figures under one heading."""

    title: str
    figures: list[Drawn]


def build_sections(
    out: Folder, figures_of_protocols: Sequence[Figure], splits: Mapping[str, Split], load_image: LoadImage | None
) -> list[Section]:
    """Draw the figures, also as OUT/figures/NAME.png. Image grids are left out where images cannot be loaded.

    splits: {"train", "val"}.
    """
    sections: list[Section] = []
    for figure in figures_of_protocols:
        drawn = _draw(out, figure, splits, load_image)
        if drawn is None:
            continue
        if not sections or sections[-1].title != figure.title:
            sections.append(Section(figure.title, []))
        sections[-1].figures.append(drawn)
    return sections


def _draw(out: Folder, figure: Figure, splits: Mapping[str, Split], load_image: LoadImage | None) -> Drawn | None:
    """One figure by its kind."""
    if isinstance(figure, ImageGrid):
        if load_image is None:
            return None
        grid = image_grids.load_grid(figure, splits, load_image)
        save_figure(out, figure.name, figures.render(image_grids.draw_grid(grid.rows)))
        return Drawn(grid=grid)
    if isinstance(figure, ConfusionMatrix):
        alt = f"confusion matrix of {figure.row_title} and {figure.column_title}"
        chart = embed_chart(figure.name, figures.draw_confusion(figure), alt, folder=out)
        return Drawn(figure.note, chart, confusions=find_confusions(figure))
    if isinstance(figure, Lines):
        alt = figure.alt or figure.title
        return Drawn(chart=embed_chart(figure.name, figures.draw_lines(figure), alt, figure.note, folder=out))
    assert isinstance(figure, Bars)
    return Drawn(chart=embed_chart(figure.name, figures.draw_bars(figure), figure.title, figure.note, folder=out))


def find_confusions(matrix: ConfusionMatrix) -> list[tuple[str, str, int]]:
    """The largest cells (row, column, images) whose column is the name of another row.

    They are listed because a chart of a thousand categories shows little more than its diagonal.
    """
    place = {name: n for n, name in enumerate(matrix.rows)}
    right = np.array([place.get(name, -1) for name in matrix.columns])  # the row for which a column is the answer
    wrong = (right >= 0) & (right != np.arange(len(matrix.rows))[:, None])  # (R, C)
    counts = np.where(wrong, matrix.counts, 0)
    largest = np.argsort(-counts, axis=None, kind="stable")[:MAX_CONFUSIONS].tolist()
    cells = [divmod(n, len(matrix.columns)) for n in largest]
    return [(matrix.rows[a], matrix.columns[b], int(counts[a, b])) for a, b in cells if counts[a, b] > 0]
