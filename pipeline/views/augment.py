"""What a view is: a pure function of (seed, key of the image, v).

`draw` makes raw variates from Philox counters; `resolve` turns them into a crop, a flip and
colours for an image of a given height and width; `render` makes the pixels. View 0 is always the
plain one: shorter side resized to size / crop_ratio, centre crop. Teacher and student render the
same resolved view, each at its own size.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from compress_ssl.pipeline.runtime import philox
from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.views.numbering import LOCAL

_LOG_RATIO = 0.2876820724517809  # ln(4/3): crops are 3:4 to 4:3
_TRIES = 10
_COUNT = 36  # variates per view: 10 x (area, ratio), top, left, flip, jitter: p, 3 order, 4 factors, ...
_TOP, _LEFT, _FLIP, _JITTER, _ORDER, _FACTORS, _GREY, _BLUR, _SIGMA, _SOLARIZE = 20, 21, 22, 23, 24, 27, 31, 32, 33, 34


@dataclass(frozen=True)
class Augmentation:
    """One recipe for random views. Probabilities in [0, 1], scales as fractions of the area."""

    scale: tuple[float, float]
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # brightness, contrast, saturation, hue
    jitter_p: float = 0.0
    grey_p: float = 0.0
    blur_p: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)
    solarize_p: float = 0.0


_DINO = Augmentation(scale=(0.4, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, grey_p=0.2)

POLICIES: dict[str, tuple[Augmentation, ...]] = {
    "crop-flip": (Augmentation(scale=(0.08, 1.0)),),
    "moco-v2": (Augmentation(scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grey_p=0.2, blur_p=0.5),),
    "dino": (
        Augmentation(**{**_DINO.__dict__, "blur_p": 1.0}),
        Augmentation(**{**_DINO.__dict__, "blur_p": 0.1, "solarize_p": 0.2}),
    ),
    "none": (),
}
"""By name: random view v uses entry (v - 1) modulo length. crop-flip is CompRess's, moco-v2 is
Chen et al. 2020, dino is Caron et al. 2021 (its two global crops in turn)."""

LOCAL_POLICIES: dict[str, Augmentation] = {
    "crop-flip": Augmentation(scale=(0.05, 0.14)),
    "moco-v2": Augmentation(**{**POLICIES["moco-v2"][0].__dict__, "scale": (0.05, 0.14)}),
    "dino": Augmentation(**{**_DINO.__dict__, "scale": (0.05, 0.4), "blur_p": 0.5}),
}
"""By name, how local crops are drawn: areas as in SEED's small patches, for dino as in DINO's multi-crop."""


@dataclass(frozen=True)
class ViewSpec:
    """All that decides what view v of an image is. `crop_ratio` is that of view 0."""

    policy: str
    seed: int
    crop_ratio: float

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise UserError(f"unknown policy {self.policy!r}. Known: {', '.join(POLICIES)}")

    def record(self) -> dict[str, Any]:
        return {"policy": self.policy, "seed": self.seed, "crop_ratio": self.crop_ratio}


class ResolvedView(NamedTuple):
    """A view resolved for one image: a box in its pixels and what is done to the colours."""

    plain: float = 0.0  # crop ratio; 0 for a random view
    top: int = 0
    left: int = 0
    height: int = 0
    width: int = 0
    flip: bool = False
    jitter: tuple[tuple[int, float], ...] = ()  # (which, factor) in the order applied
    grey: bool = False
    sigma: float = 0.0
    solarize: bool = False


def draw_variates(seed: int, key: Any, v: Any) -> np.ndarray:
    """Raw variates of views: keys and view numbers broadcast together -> (..., 36) float64 in [0, 1)."""
    return philox.uniform(seed, philox.VIEW, key, v, _COUNT)


def resolve_view(spec: ViewSpec, variates: np.ndarray, v: int, height: int, width: int) -> ResolvedView:
    """The view v that variates (36,) mean for an image of this height and width."""
    recipes = POLICIES[spec.policy]
    if v == 0 or not recipes:
        return ResolvedView(plain=spec.crop_ratio)
    recipe = LOCAL_POLICIES[spec.policy] if v & LOCAL else recipes[(v - 1) % len(recipes)]
    u = variates.tolist()
    jitter: list[tuple[int, float]] = []
    if u[_JITTER] < recipe.jitter_p:
        order = [0, 1, 2, 3]
        for place in (3, 2, 1):  # Fisher and Yates
            other = int(u[_ORDER + 3 - place] * (place + 1))
            order[place], order[other] = order[other], order[place]
        for which in order:
            reach, centre = recipe.jitter[which], 0.0 if which == 3 else 1.0
            low = centre - reach if which == 3 else max(0.0, centre - reach)
            jitter.append((which, low + u[_FACTORS + which] * (centre + reach - low)))
    sigma = recipe.sigma[0] + u[_SIGMA] * (recipe.sigma[1] - recipe.sigma[0])
    return ResolvedView(
        0.0,
        *crop_box(recipe.scale, u, height, width),
        flip=u[_FLIP] < recipe.flip,
        jitter=tuple(jitter),
        grey=u[_GREY] < recipe.grey_p,
        sigma=sigma if u[_BLUR] < recipe.blur_p else 0.0,
        solarize=u[_SOLARIZE] < recipe.solarize_p,
    )


def crop_box(scale: tuple[float, float], u: list[float], height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random resized crop: ten tries, then the largest centred one.

    The distribution of Szegedy et al. 2015 as torchvision's RandomResizedCrop draws it.
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
