"""Rows of pictures: clusters, and images with their neighbours; drawn at random by the page's seed, not picked.

In the page they are small images with words beside them, in figures/ the same rows as one picture.
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

Pictures = Callable[[str, int], np.ndarray]  # ("train" | "val", row i) -> (H, W, 3) uint8

STRIPS, CLUSTERS, PER_CLUSTER = 8, 10, 12  # rows of pictures; of neighbours there are as many as nn kept
SHOWN = 112  # pixels of a picture's side in the page, at most
PIXEL_ART = 64  # pictures up to this side are enlarged by whole pixels, not smoothed
TILE, GAP, RIM, MARGIN = 96, 6, 4, 190  # pixels of figures/: a side, between tiles, of a border, left for text
PITCH = TILE + 2 * RIM + GAP


class Labelled(Protocol):
    """What the pages read of a split (evaluators.base.Split is one)."""

    @property
    def label(self) -> np.ndarray: ...  # (n,) int64, -1 where there is none
    @property
    def rows(self) -> np.ndarray: ...  # (n,) row numbers i in the data set
    @property
    def classes(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Tile:
    picture: np.ndarray  # (H, W, 3) uint8
    title: str
    tone: str = ""  # "yes", "no", "query" or nothing

    @property
    def look(self) -> str:
        """The classes of its image in the page."""
        enlarged = min(self.picture.shape[:2]) <= PIXEL_ART
        return f"{self.tone} px".strip() if enlarged else self.tone

    @property
    def source(self) -> str:
        """Its central square as a data URI."""
        side, data = square(self.picture), io.BytesIO()
        small = len(side) <= PIXEL_ART
        kind = "png" if small else "jpeg"
        shown = side if small else _resize(side, min(len(side), SHOWN))
        Image.fromarray(shown).save(data, kind, quality=88)
        return data_uri(data.getvalue(), kind)


@dataclass(frozen=True)
class Strip:
    title: str
    lines: list[str]
    tiles: list[Tile]


@dataclass(frozen=True)
class Gallery:
    note: str  # what is shown, and how it was drawn
    strips: list[Strip]


# ---------------------------------------------------------------- which pictures


def clusters(
    found: Mapping[str, np.ndarray], train: Labelled, pictures: Pictures, random: np.random.Generator
) -> Gallery:
    """The picture of the CompRess paper: a row is a cluster; both clusters and images drawn at random."""
    assignment = found["train_assignment"]
    filled = np.unique(assignment)
    chosen = np.sort(random.choice(filled, min(CLUSTERS, len(filled)), replace=False))
    strips = []
    for cluster in chosen.tolist():
        members = np.flatnonzero(assignment == cluster)
        some = random.choice(members, min(PER_CLUSTER, len(members)), replace=False).tolist()
        tiles = [Tile(pictures("train", int(train.rows[n])), _category(train, n), "") for n in some]
        strips.append(Strip(f"cluster {cluster}", _about_cluster(cluster, members, found, train), tiles))
    note = (
        f"A row is a cluster of the training images. Neither clusters nor images are picked: {len(chosen)} of "
        f"{len(filled)} clusters, up to {PER_CLUSTER} images of each, drawn with the page's seed."
    )
    return Gallery(note, strips)


def _about_cluster(cluster: int, members: np.ndarray, found: Mapping[str, np.ndarray], train: Labelled) -> list[str]:
    lines = [f"{len(members)} training images"]
    if "majority" in found:
        commonest = int(found["majority"][cluster])
        if commonest >= 0:
            labels = train.label[members]
            share = 100 * np.mean(labels[labels >= 0] == commonest)
            lines.append(f"{share:.0f} % {train.classes[commonest]}")
        mapped = int(found["mapping"][cluster])
        lines.append(f"mapped to {train.classes[mapped]}" if mapped >= 0 else "mapped to no category")
    return lines


def neighbours(
    found: Mapping[str, np.ndarray],
    train: Labelled,
    val: Labelled,
    pictures: Pictures,
    random: np.random.Generator,
) -> Gallery:
    """Random validation images, each with its nearest training images."""
    near = found["neighbors"]
    strips = []
    for query in np.sort(random.choice(len(near), min(STRIPS, len(near)), replace=False)).tolist():
        tiles = [Tile(pictures("val", int(val.rows[query])), _category(val, query), "query")]
        same = 0
        for n in near[query].tolist():
            agrees = train.label[n] == val.label[query]
            same += int(agrees)
            tiles.append(Tile(pictures("train", int(train.rows[n])), _category(train, n), "yes" if agrees else "no"))
        strips.append(Strip(_category(val, query), [f"{same} of {near.shape[1]} agree"], tiles))
    note = (
        "First in each row a validation image drawn at random, then its nearest training images, nearest first. Green: "
        "of the same category; red and dashed: of another. Only the first neighbour counts for the NN score."
    )
    return Gallery(note, strips)


def _category(split: Labelled, n: int) -> str:
    return split.classes[int(split.label[n])] if split.label[n] >= 0 else "no label"


# ---------------------------------------------------------------- how they are shown


def square(picture: np.ndarray) -> np.ndarray:
    """The central square of (H, W, 3) uint8."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"a picture is (H, W, 3) uint8, not {picture.shape} {picture.dtype}")
    side = min(picture.shape[:2])
    top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
    return np.ascontiguousarray(picture[top : top + side, left : left + side])


def _resize(square: np.ndarray, side: int) -> np.ndarray:
    how = Image.Resampling.NEAREST if len(square) <= PIXEL_ART else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(square).resize((side, side), how))


def mosaic(strips: list[Strip]) -> Chart:
    """The rows as one picture, pixel by pixel at 100 to the inch."""
    wide = MARGIN + max(len(strip.tiles) for strip in strips) * PITCH + GAP
    high = len(strips) * PITCH + GAP

    def draw(figure: Figure) -> None:
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        for row, strip in enumerate(strips):
            text = "\n".join(shorten(line, 26) for line in (strip.title, *strip.lines))
            middle = GAP + row * PITCH + RIM + TILE / 2
            label = axes.text(MARGIN - 4, middle, text, ha="right", va="center", parse_math=False)
            label.set(fontsize=9, linespacing=1.4, color=INK)
        canvas = _canvas(strips, wide, high)
        axes.imshow(canvas, interpolation="nearest", aspect="auto", extent=(0, wide, high, 0))

    return Chart(draw, (wide / 100, high / 100), dpi=100)


def _canvas(strips: list[Strip], wide: int, high: int) -> np.ndarray:
    """(high, wide, 3) uint8: the tiles with their coloured borders, on white."""
    canvas = np.full((high, wide, 3), 255, np.uint8)
    rims = {"yes": (26, 127, 55), "no": (207, 34, 46), "query": (27, 31, 36)}
    for row, strip in enumerate(strips):
        top = GAP + row * PITCH
        for column, tile in enumerate(strip.tiles):
            left = MARGIN + GAP + column * PITCH
            canvas[top : top + TILE + 2 * RIM, left : left + TILE + 2 * RIM] = rims.get(tile.tone, (255, 255, 255))
            inner = canvas[top + RIM : top + RIM + TILE, left + RIM : left + RIM + TILE]
            inner[:] = _resize(square(tile.picture), TILE)
    return canvas
