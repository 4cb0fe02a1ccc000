"""Policies: how the views of each group are augmented, by the name that `--policy` takes."""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Augmentation:
    """The distribution of random views. Attributes that end in `_p`, and `flip`, are probabilities in [0, 1]."""

    scale: tuple[float, float]  # smallest and largest area of the crop, as fractions of the image's area
    flip: float = 0.5
    jitter: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)  # largest change of brightness, contrast, saturation, hue
    jitter_p: float = 0.0
    grey_p: float = 0.0
    blur_p: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)  # range of the blur's sigma, in pixels of a 224-pixel crop
    solarize_p: float = 0.0


Policy = Literal["crop-flip", "moco-v2", "dino", "none"]
"""The names that --policy takes: those of POLICIES."""

Policies = dict[str, tuple[Augmentation, ...]]
"""Augmentations by the name of the policy: view v of a group uses entry (v - 1) modulo the length.

Under a policy without augmentations a group has no random views."""

_DINO = Augmentation(scale=(0.4, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, grey_p=0.2)

POLICIES: Policies = {
    "crop-flip": (Augmentation(scale=(0.08, 1.0)),),
    "moco-v2": (Augmentation(scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grey_p=0.2, blur_p=0.5),),
    "dino": (replace(_DINO, blur_p=1.0), replace(_DINO, blur_p=0.1, solarize_p=0.2)),
    "none": (),
}
"""Augmentations of the global views.

crop-flip is that of CompRess (Koohpayegani et al. 2020, arXiv 2010.14713); moco-v2 is that of Chen et al. 2020,
arXiv 2003.04297; dino is that of Caron et al. 2021, arXiv 2104.14294, which alternates its two global crops."""

LOCAL_POLICIES: Policies = {
    "crop-flip": (Augmentation(scale=(0.05, 0.14)),),
    "moco-v2": (replace(POLICIES["moco-v2"][0], scale=(0.05, 0.14)),),
    "dino": (replace(_DINO, scale=(0.05, 0.4), blur_p=0.5),),
}
"""Augmentations of the local crops. Their areas are those of the small patches in SEED (Fang et al. 2021, arXiv
2101.04731); for dino those of DINO's multi-crop."""
