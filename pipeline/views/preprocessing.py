"""The preprocessing that a model was trained with."""

from dataclasses import dataclass
from typing import Annotated, Literal

from compress_ssl.pipeline.runtime.records import Meta, Number, Positive, PositiveNumber

Interpolation = Literal["bilinear", "bicubic", "nearest"]
_Mode = Annotated[str, Meta(pattern="^(nearest|nearest-exact|bilinear|bicubic|box|hamming|lanczos)$")]


@dataclass(frozen=True)
class Preprocessing:
    """The input size and normalisation that a model was trained with.

    View 0 resizes the shorter side to floor(size / crop_ratio) pixels and takes a centre crop of `size` x `size`.
    mean and std are those of RGB values in [0, 1], per channel. The types are those of a record: a manifest is read
    into this class (`compress_ssl.pipeline.runtime.records`).
    """

    size: Positive  # side S in pixels
    mean: tuple[Number, Number, Number]
    std: tuple[PositiveNumber, PositiveNumber, PositiveNumber]
    interpolation: _Mode  # a value of torchvision's InterpolationMode, such as "bicubic"
    crop_ratio: PositiveNumber


# torchvision's and timm's usual evaluation preprocessing for ImageNet
IMAGENET = Preprocessing(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear", 0.875)
