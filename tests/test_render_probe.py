"""Probe images, whose rendering is compared with the store before its features are used."""

from typing import Any

import numpy as np

from compress_ssl.pipeline.datasets.decode import BROKEN, BadImage
from compress_ssl.pipeline.store import render_probe
from compress_ssl.pipeline.views.augment import ViewSpec
from compress_ssl.pipeline.views.preprocessing import Preprocessing

LOOKS = Preprocessing(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 1.0)


class Some:
    """A data set with some broken images."""

    def __init__(self, count: int, *broken: int):
        self.count, self.broken, self.loads = count, broken, 0

    def __len__(self) -> int:
        return self.count

    def load(self, i: int) -> tuple[np.ndarray, int]:
        self.loads += 1
        if i in self.broken:
            raise BadImage(BROKEN, "broken")
        return np.random.default_rng(i).integers(0, 256, (9, 9, 3), np.uint8), i


def probed(dataset: Any) -> list[int]:
    return [int(i) for i in render_probe.probe_digests(dataset, ViewSpec("crop-flip", 0, 1.0), LOOKS)]


def test_the_first_middle_and_last_image_are_probed() -> None:
    assert probed(Some(21)) == [0, 10, 20] and probed(Some(2)) == [0, 1] and probed(Some(1)) == [0]


def test_a_bad_probe_image_is_replaced_by_a_good_one_nearby() -> None:
    assert probed(Some(21, 0, 1, 10, 20)) == [2, 11, 19]
    assert probed(Some(3, 0, 1)) == [2]


def test_only_a_few_images_are_tried_if_all_are_bad() -> None:
    gone = Some(10_000, *range(10_000))
    assert probed(gone) == [] and gone.loads == 3 * render_probe.NEAR
