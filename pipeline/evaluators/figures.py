"""Figures that a protocol hands to the report, as plain data: numbers and text. `report/` draws them.

Four kinds: `Lines`, `ConfusionMatrix`, `ImageGrid` and `Bars`. Names and notes may contain any text; a page escapes it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


@dataclass(frozen=True, eq=False, kw_only=True)
class Figure:
    """What all figures have. Raises ValueError for data that cannot be drawn."""

    name: str  # of its file, figures/NAME.png of the evaluation: lower-case letters, digits, "_" and "-"
    title: str  # the heading of its section; figures with one title that follow each other share a section
    note: str = ""  # shown with the figure

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"figure {self.name!r} needs a name of a-z, 0-9, _ and -, which names its file")


@dataclass(frozen=True, eq=False, kw_only=True)
class Panel:
    """One pair of axes of `Lines`, with a line for each name."""

    title: str
    x: np.ndarray  # (m,)
    lines: Mapping[str, np.ndarray]  # (m,) each; a name is written at the end of its line unless it is the only one


@dataclass(frozen=True, eq=False, kw_only=True)
class Lines(Figure):
    """Curves in panels side by side. A value that is not finite is a gap."""

    panels: tuple[Panel, ...]
    x_label: str = "epoch"
    alt: str = ""  # what a reader who does not see it is told; "" for the title

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.panels or not all(panel.lines for panel in self.panels):
            raise ValueError(f"figure {self.name!r} has no line to draw")
        for panel in self.panels:
            _require_numbers(self.name, panel.x, 1, what="x of a panel")
            for name, line in panel.lines.items():
                _require_numbers(self.name, line, 1, finite=False, what=f"line {name!r}")
                if line.shape != panel.x.shape or not len(line):
                    raise ValueError(
                        f"figure {self.name!r}: line {name!r} has {line.shape} values for {panel.x.shape} places on "
                        "its axis; give as many of each, at least one"
                    )


@dataclass(frozen=True, eq=False, kw_only=True)
class ConfusionMatrix(Figure):
    """How many images of each row's category were given each column's: drawn as shares of the row, the worst listed.

    A column whose name is that of a row is the right answer for it; other columns are, for instance, "(none)".
    """

    counts: np.ndarray  # (R, C) images
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    row_title: str = "category"
    column_title: str = "prediction"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_numbers(self.name, self.counts, 2, what="counts")
        if not self.counts.size:
            raise ValueError(f"figure {self.name!r} has no counts to draw")
        if self.counts.shape != (len(self.rows), len(self.columns)):
            raise ValueError(
                f"figure {self.name!r}: counts of shape {self.counts.shape} do not fit {len(self.rows)} rows and "
                f"{len(self.columns)} columns"
            )


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One image of a row of an `ImageGrid`."""

    split: Literal["train", "val"]
    index: int  # n, the place in the split
    caption: str  # shown while the pointer is over it
    tone: Literal["", "yes", "no", "query"] = ""  # of its border: an agreement, a disagreement, what was asked


@dataclass(frozen=True, kw_only=True)
class ImageRow:
    """A row of an `ImageGrid`: images with text to their left."""

    title: str
    lines: tuple[str, ...] = ()  # smaller, below the title
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageGrid(Figure):
    """Rows of images. The report loads them; where images are not at hand it leaves the grid out."""

    rows: tuple[ImageRow, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(row.tiles for row in self.rows):
            raise ValueError(f"figure {self.name!r} has no images to show")


@dataclass(frozen=True, eq=False, kw_only=True)
class Bars(Figure):
    """One horizontal bar for each label, for instance the accuracy in each class. A value of NaN has no bar."""

    labels: tuple[str, ...]
    values: np.ndarray  # (m,)
    unit: str = "%"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_numbers(self.name, self.values, 1, finite=False, what="values")
        if self.values.shape != (len(self.labels),) or not self.labels:
            raise ValueError(f"figure {self.name!r} has {self.values.shape} values for {len(self.labels)} labels")
        _require_numbers(self.name, self.values[~np.isnan(self.values)], 1, what="values")


KINDS: dict[str, type[Figure]] = {kind.__name__: kind for kind in (Lines, ConfusionMatrix, ImageGrid, Bars)}


def _require_numbers(name: str, values: np.ndarray, axes: int, finite: bool = True, *, what: str) -> None:
    """Raises ValueError unless these are numbers in an array with that many axes, finite if that is asked.

    what: the part of the figure that the error names.
    """
    if not isinstance(values, np.ndarray):
        raise ValueError(
            f"figure {name!r}: {what} is of type {type(values).__name__}; give a numpy array of numbers (np.asarray)"
        )
    if values.ndim != axes or values.dtype.kind not in "biuf":
        raise ValueError(
            f"figure {name!r}: {what} is an array of {values.dtype} with the shape {values.shape}; give numbers in an "
            f"array with {axes} {'axis' if axes == 1 else 'axes'}"
        )
    if finite and not np.isfinite(values).all():
        raise ValueError(f"figure {name!r}: {what} has values that are not finite; leave them out")
