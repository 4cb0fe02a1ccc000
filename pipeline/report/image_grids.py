"""Rows of images that a protocol chose: the page shows each with text beside it, figures/ the same as one picture."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from compress_ssl.pipeline.datasets.base import Dataset
from compress_ssl.pipeline.evaluators.base import ImageGrid, Split, Tile
from compress_ssl.pipeline.report.figures import INK, Chart
from compress_ssl.pipeline.report.html import data_uri
from compress_ssl.pipeline.runtime.formatting import shorten

LoadImage = Callable[[str, int], np.ndarray]
"""("train" or "val", row i in that data set) -> (H, W, 3) uint8."""

# ---------------------------------------------------------------- sizes

THUMBNAIL_SIDE = 96  # pixels: longest side of an image as it is loaded
PAGE_SIDE = 112  # pixels: largest side of an image in the page, which shows it at 64 CSS pixels
PIXEL_ART_SIDE = 64  # pixels: images up to this side are enlarged without smoothing and stored as PNG
TILE, GAP, BORDER, MARGIN = 96, 6, 4, 190  # pixels in figures/: an image's side, between, around it, left for text
PITCH = TILE + 2 * BORDER + GAP  # pixels from one tile to the next
PIXELS_PER_INCH = 100  # of the picture in figures/
BORDER_COLOURS = {"yes": (26, 127, 55), "no": (207, 34, 46), "query": (27, 31, 36)}  # as in templates/style.css


@dataclass(frozen=True)
class LoadedTile:
    """One image of a row."""

    picture: np.ndarray  # (H, W, 3) uint8
    title: str
    tone: str = ""  # of its border, see Tile

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
class LoadedRow:
    """A row of images with the text to its left."""

    title: str
    lines: Sequence[str]  # smaller text below the title
    tiles: list[LoadedTile]


@dataclass(frozen=True)
class LoadedGrid:
    """Rows of images with a note above them."""

    note: str  # shown above them
    rows: list[LoadedRow]


def load_thumbnail(sets: Mapping[str, Dataset], which: str, i: int) -> np.ndarray:
    """Image i of the data set `which` ("train" or "val"), reduced to at most THUMBNAIL_SIDE pixels, (H, W, 3) uint8."""
    image = Image.fromarray(sets[which].load(i)[0])
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return np.asarray(image)


def load_grid(grid: ImageGrid, splits: Mapping[str, Split], load_image: LoadImage) -> LoadedGrid:
    """A protocol's grid with its images. splits: {"train", "val"}, in which its tiles count."""

    def load(tile: Tile) -> LoadedTile:
        row = int(splits[tile.split].rows[tile.index])
        return LoadedTile(load_image(tile.split, row), tile.caption, tile.tone)

    return LoadedGrid(grid.note, [LoadedRow(row.title, row.lines, [load(t) for t in row.tiles]) for row in grid.rows])


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


def draw_grid(rows: list[LoadedRow]) -> Chart:
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


def _paint_tiles(rows: list[LoadedRow], width: int, height: int) -> np.ndarray:
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
