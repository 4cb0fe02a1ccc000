"""Rows of images for the page: clusters with some of their images, and validation images with their neighbours.

Which images are shown is random by the page's seed. The page shows each image with text beside its row; figures/ has
the same rows as one picture.
"""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from compress_ssl.pipeline.report.figures import INK, Chart
from compress_ssl.pipeline.report.html import data_uri
from compress_ssl.pipeline.runtime.formatting import shorten

LoadImage = Callable[[str, int], np.ndarray]
"""("train" or "val", row i in that data set) -> (H, W, 3) uint8."""

# ---------------------------------------------------------------- sizes

NEIGHBOUR_ROWS = 8  # validation images shown; each row has as many neighbours as the nn protocol kept
CLUSTER_ROWS, IMAGES_PER_CLUSTER = 10, 12  # as wide as the page is
PAGE_SIDE = 112  # pixels: largest side of an image in the page, which shows it at 64 CSS pixels
PIXEL_ART_SIDE = 64  # pixels: images up to this side are enlarged without smoothing and stored as PNG
TILE, GAP, BORDER, MARGIN = 96, 6, 4, 190  # pixels in figures/: an image's side, between, around it, left for text
PITCH = TILE + 2 * BORDER + GAP  # pixels from one tile to the next
PIXELS_PER_INCH = 100  # of the picture in figures/
BORDER_COLOURS = {"yes": (26, 127, 55), "no": (207, 34, 46), "query": (27, 31, 36)}  # as in templates/style.css


class Labelled(Protocol):
    """What this package reads of a split; `evaluators.base.Split` has it."""

    @property
    def label(self) -> np.ndarray: ...  # (n,) int64, -1 for an image without a label
    @property
    def rows(self) -> np.ndarray: ...  # (n,) row numbers i in the data set
    @property
    def classes(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Tile:
    """One image of a row."""

    picture: np.ndarray  # (H, W, 3) uint8
    title: str
    tone: str = ""  # of its border: "yes" and "no" for a neighbour's agreement, "query", or "" for no border

    @property
    def css_class(self) -> str:
        """The classes of its <img> element."""
        enlarged = min(self.picture.shape[:2]) <= PIXEL_ART_SIDE
        return f"{self.tone} px".strip() if enlarged else self.tone

    @property
    def source(self) -> str:
        """Its central square as a data URI: PNG if it is small, else JPEG of at most PAGE_SIDE pixels."""
        square, data = crop_square(self.picture), io.BytesIO()
        small = len(square) <= PIXEL_ART_SIDE
        kind = "png" if small else "jpeg"
        shown = square if small else _resize(square, min(len(square), PAGE_SIDE))
        Image.fromarray(shown).save(data, kind, quality=88)
        return data_uri(data.getvalue(), kind)


@dataclass(frozen=True)
class GridRow:
    """A row of images with the text to its left."""

    title: str
    lines: list[str]  # smaller text below the title
    tiles: list[Tile]


@dataclass(frozen=True)
class ImageGrid:
    """Rows of images with a note above them."""

    note: str  # what is shown and how it was chosen
    rows: list[GridRow]


# ---------------------------------------------------------------- clusters


def build_cluster_grid(
    arrays: Mapping[str, np.ndarray], train: Labelled, load_image: LoadImage, random: np.random.Generator
) -> ImageGrid:
    """A row for each of up to 10 random clusters, with up to 12 random training images, as in the CompRess paper.

    arrays: those of the cluster protocol (evaluators/cluster.py).
    """
    assignment = arrays["train_assignment"]
    filled = np.unique(assignment)
    chosen = np.sort(random.choice(filled, min(CLUSTER_ROWS, len(filled)), replace=False))
    rows = []
    for cluster in chosen.tolist():
        members = np.flatnonzero(assignment == cluster)
        some = random.choice(members, min(IMAGES_PER_CLUSTER, len(members)), replace=False).tolist()
        tiles = [Tile(load_image("train", int(train.rows[n])), _category(train, n), "") for n in some]
        rows.append(GridRow(f"cluster {cluster}", _describe_cluster(cluster, members, arrays, train), tiles))
    note = (
        f"A row is a cluster of the training images. Neither clusters nor images are picked: {len(chosen)} of "
        f"{len(filled)} clusters, up to {IMAGES_PER_CLUSTER} images of each, drawn with the page's seed."
    )
    return ImageGrid(note, rows)


def _describe_cluster(
    cluster: int, members: np.ndarray, arrays: Mapping[str, np.ndarray], train: Labelled
) -> list[str]:
    """Lines of text: a cluster's size and, with labels, its most frequent category and the one it is mapped to."""
    lines = [f"{len(members)} training images"]
    if "majority" in arrays:
        majority = int(arrays["majority"][cluster])
        if majority >= 0:
            labels = train.label[members]
            share = 100 * np.mean(labels[labels >= 0] == majority)
            lines.append(f"{share:.0f} % {train.classes[majority]}")
        mapped = int(arrays["mapping"][cluster])
        lines.append(f"mapped to {train.classes[mapped]}" if mapped >= 0 else "mapped to no category")
    return lines


# ---------------------------------------------------------------- neighbours


def build_neighbour_grid(
    arrays: Mapping[str, np.ndarray],
    train: Labelled,
    val: Labelled,
    load_image: LoadImage,
    random: np.random.Generator,
) -> ImageGrid:
    """A row for each of up to 8 random validation images, followed by its nearest training images.

    arrays: those of the nn protocol (evaluators/nn.py).
    """
    neighbours = arrays["neighbors"]  # (n_val, K) indices into the training split
    queries = np.sort(random.choice(len(neighbours), min(NEIGHBOUR_ROWS, len(neighbours)), replace=False))
    rows = []
    for query in queries.tolist():
        tiles = [Tile(load_image("val", int(val.rows[query])), _category(val, query), "query")]
        same = 0
        for n in neighbours[query].tolist():
            agrees = train.label[n] == val.label[query]
            same += int(agrees)
            tiles.append(Tile(load_image("train", int(train.rows[n])), _category(train, n), "yes" if agrees else "no"))
        rows.append(GridRow(_category(val, query), [f"{same} of {neighbours.shape[1]} agree"], tiles))
    note = (
        "First in each row a validation image drawn at random, then its nearest training images, nearest first. Green: "
        "of the same category; red and dashed: of another. Only the first neighbour counts for the NN score."
    )
    return ImageGrid(note, rows)


def _category(split: Labelled, n: int) -> str:
    return split.classes[int(split.label[n])] if split.label[n] >= 0 else "no label"


# ---------------------------------------------------------------- pixels


def crop_square(picture: np.ndarray) -> np.ndarray:
    """The central square (S, S, 3) of an (H, W, 3) uint8 image. Raises ValueError for another kind of array."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"a picture is (H, W, 3) uint8, not {picture.shape} {picture.dtype}")
    side = min(picture.shape[:2])
    top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
    return np.ascontiguousarray(picture[top : top + side, left : left + side])


def _resize(square: np.ndarray, side: int) -> np.ndarray:
    """(side, side, 3): a small image keeps its sharp pixels, a large one is smoothed."""
    how = Image.Resampling.NEAREST if len(square) <= PIXEL_ART_SIDE else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(square).resize((side, side), how))


def draw_grid(rows: list[GridRow]) -> Chart:
    """The rows as one picture for figures/, text at the left; an image pixel is exactly one pixel of the picture."""
    width = MARGIN + max(len(row.tiles) for row in rows) * PITCH + GAP
    height = len(rows) * PITCH + GAP

    def draw(figure: Figure) -> None:
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        for number, row in enumerate(rows):
            text = "\n".join(shorten(line, 26) for line in (row.title, *row.lines))
            middle = GAP + number * PITCH + BORDER + TILE / 2
            label = axes.text(MARGIN - 4, middle, text, ha="right", va="center", parse_math=False)
            label.set(fontsize=9, linespacing=1.4, color=INK)
        canvas = _paint_tiles(rows, width, height)
        axes.imshow(canvas, interpolation="nearest", aspect="auto", extent=(0, width, height, 0))

    return Chart(draw, (width / PIXELS_PER_INCH, height / PIXELS_PER_INCH), dpi=PIXELS_PER_INCH)


def _paint_tiles(rows: list[GridRow], width: int, height: int) -> np.ndarray:
    """(height, width, 3) uint8: the tiles with their coloured borders, on white."""
    canvas = np.full((height, width, 3), 255, np.uint8)
    outer = TILE + 2 * BORDER
    for number, row in enumerate(rows):
        top = GAP + number * PITCH
        for column, tile in enumerate(row.tiles):
            left = MARGIN + GAP + column * PITCH
            canvas[top : top + outer, left : left + outer] = BORDER_COLOURS.get(tile.tone, (255, 255, 255))
            inner = canvas[top + BORDER : top + BORDER + TILE, left + BORDER : left + BORDER + TILE]
            inner[:] = _resize(crop_square(tile.picture), TILE)
    return canvas
