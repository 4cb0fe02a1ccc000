"""Random views of an image, each a pure function of (seed, view key of the image, v).

`draw_variates` computes raw random numbers from Philox counters. `resolve_view` turns them into a crop box, a flip
and colour changes for an image of a given height and width. `render.render_view` makes the pixels. View 0 is always
the plain view: the shorter side resized to size / crop_ratio, then a centre crop. Teacher and student render the same
resolved view, each at its own size.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from compress_ssl.pipeline.runtime import philox
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.records import Count, PositiveNumber
from compress_ssl.pipeline.views.groups import group_of
from compress_ssl.pipeline.views.policies import POLICIES, Augmentation, Policy

_LOG_RATIO = 0.2876820724517809  # ln(4/3): the aspect ratio of a crop is between 3:4 and 4:3
_TRIES = 10  # attempts at a random crop box before the fallback, as in torchvision
_COUNT = 36  # variates per view
# Positions of the variates. The views of existing stores depend on them: never change one. Positions 0 to 19 are
# (area, aspect ratio) of the ten attempts; _ORDER has three values, _FACTORS four; 35 is unused.
_TOP, _LEFT, _FLIP, _JITTER, _ORDER, _FACTORS, _GREY, _BLUR, _SIGMA, _SOLARIZE = 20, 21, 22, 23, 24, 27, 31, 32, 33, 34


@dataclass(frozen=True)
class ViewSpec:
    """The settings that determine view v of an image. `crop_ratio` belongs to view 0.

    The types are those of a record: a manifest is read into this class (`compress_ssl.pipeline.runtime.records`).
    Raises UserError for an unknown policy, ValueError for a seed that is no 64-bit number.
    """

    policy: Policy
    seed: Count
    crop_ratio: PositiveNumber

    def __post_init__(self) -> None:
        if not self.seed < 2**64:
            raise ValueError(f"seed: expected int < 2**64, got {self.seed}")
        if self.policy not in POLICIES:
            raise UserError(f"unknown policy {self.policy!r}. Known: {', '.join(POLICIES)}")


class ResolvedView(NamedTuple):
    """A view resolved for one image: the crop box in pixels of the image, the flip and the colour changes."""

    plain: float = 0.0  # crop ratio of the plain view; 0 for a random view
    top: int = 0
    left: int = 0
    height: int = 0
    width: int = 0
    flip: bool = False
    jitter: tuple[tuple[int, float], ...] = ()  # (index in render._JITTERS, factor) in the order of application
    grey: bool = False
    sigma: float = 0.0  # of the blur, in pixels of a 224-pixel crop; 0 for no blur
    solarize: bool = False


def draw_variates(seed: int, key: ArrayLike, v: ArrayLike) -> np.ndarray:
    """Raw random numbers of views: (..., 36) float64 in [0, 1).

    key: view keys of the images; v: view numbers. The shapes of key and v are broadcast together.
    """
    return philox.uniform(seed, philox.VIEW, key, v, _COUNT)


def resolve_view(spec: ViewSpec, variates: np.ndarray, v: int, height: int, width: int) -> ResolvedView:
    """Turn the variates (36,) of view v into a crop box, a flip and colours for an image of height x width pixels."""
    chosen = _find_augmentation(spec.policy, v)
    if chosen is None:
        return ResolvedView(plain=spec.crop_ratio)
    u = variates.tolist()
    sigma = chosen.sigma[0] + u[_SIGMA] * (chosen.sigma[1] - chosen.sigma[0])
    return ResolvedView(
        0.0,
        *crop_box(chosen.scale, u, height, width),
        flip=u[_FLIP] < chosen.flip,
        jitter=_jitter_steps(chosen, u) if u[_JITTER] < chosen.jitter_p else (),
        grey=u[_GREY] < chosen.grey_p,
        sigma=sigma if u[_BLUR] < chosen.blur_p else 0.0,
        solarize=u[_SOLARIZE] < chosen.solarize_p,
    )


@lru_cache(maxsize=4096)  # the same few views are asked for in every image
def _find_augmentation(policy: str, v: int) -> Augmentation | None:
    """The distribution of view v by its group; None for the plain view."""
    return group_of(v).augmentation(policy, v)


def _jitter_steps(augmentation: Augmentation, u: list[float]) -> tuple[tuple[int, float], ...]:
    """(index, factor) of the four colour changes in random order.

    Factors are drawn as by torchvision's ColorJitter: 1 plus or minus the largest change and at least 0; for hue
    (index 3) 0 plus or minus the largest change.
    """
    order = [0, 1, 2, 3]
    for last in (3, 2, 1):  # Fisher-Yates shuffle
        other = int(u[_ORDER + 3 - last] * (last + 1))
        order[last], order[other] = order[other], order[last]
    steps = []
    for which in order:
        change, centre = augmentation.jitter[which], 0.0 if which == 3 else 1.0
        low = centre - change if which == 3 else max(0.0, centre - change)
        steps.append((which, low + u[_FACTORS + which] * (centre + change - low)))
    return tuple(steps)


def crop_box(scale: tuple[float, float], u: list[float], height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random resized crop, in pixels of the image.

    The crop of Szegedy et al. 2015, arXiv 1409.4842, with the distribution of torchvision's RandomResizedCrop: ten
    attempts at a box that fits into the image, then the largest centred box with an allowed aspect ratio. Only IEEE
    arithmetic and our own `exp` are used, so every machine computes the same box.

    scale: smallest and largest area as fractions of the image's; u: the variates of the view.
    """
    for attempt in range(_TRIES):
        area = height * width * (scale[0] + u[2 * attempt] * (scale[1] - scale[0]))
        ratio = philox.exp((2.0 * u[2 * attempt + 1] - 1.0) * _LOG_RATIO)
        w, h = math.floor(math.sqrt(area * ratio) + 0.5), math.floor(math.sqrt(area / ratio) + 0.5)
        if 0 < w <= width and 0 < h <= height:
            return int(u[_TOP] * (height - h + 1)), int(u[_LEFT] * (width - w + 1)), h, w
    h, w = height, width
    if width * 3 > height * 4:
        w = max(1, (height * 4 + 1) // 3)
    elif width * 4 < height * 3:
        h = max(1, (width * 4 + 1) // 3)
    return (height - h) // 2, (width - w) // 2, h, w
