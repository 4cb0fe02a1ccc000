"""Pixels of resolved views."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from compress_ssl.pipeline.views.augment import ResolvedView, ViewSpec, resolve_view

BLUR_REFERENCE = 224  # blur sigmas are in pixels of a 224-pixel crop and scale with the size rendered
_STRIP = 16  # view 0 of a longer strip than 16:1 is that of its middle, which shows the same square


def render_view(image: torch.Tensor, view: ResolvedView, size: int, interpolation: str) -> torch.Tensor:
    """Pixels of a view: image (3, H, W) uint8 -> (3, size, size) uint8, antialiased."""
    how = InterpolationMode(interpolation)
    if view.plain:
        short = min(image.shape[-2:])
        image = tv.center_crop(image, [min(side, _STRIP * short) for side in image.shape[-2:]])
        least = max(size, math.floor(size / view.plain + 1e-6))  # timm's and torchvision's roundings: down, both
        target = [int(least * side / short) for side in image.shape[-2:]]
        return tv.center_crop(tv.resize(image, target, how, antialias=True), [size, size])
    box = image[:, view.top : view.top + view.height, view.left : view.left + view.width]
    pixels = tv.resize(box, [size, size], how, antialias=True)
    if view.flip:
        pixels = tv.horizontal_flip(pixels)
    for which, factor in view.jitter:
        pixels = _JITTERS[which](pixels, factor)
    if view.grey:
        pixels = tv.rgb_to_grayscale(pixels, num_output_channels=3)
    sigma = view.sigma * size / BLUR_REFERENCE
    if sigma > 0.05:  # below, the kernel rounds to the identity on eight bits
        reach = max(1, math.ceil(3 * sigma))
        reach = min(reach, size - 1)
        pixels = tv.gaussian_blur(pixels, [2 * reach + 1] * 2, [sigma] * 2)
    if view.solarize:
        pixels = tv.solarize(pixels, 128)
    return pixels.contiguous()


_JITTERS = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)


def default_local_size(size: int) -> int:
    """Side of local crops beside global views of `size` pixels: 96 for 224, in multiples of eight."""
    return max(8, 8 * round(size * 3 / 7 / 8))


def render_views(
    image: np.ndarray, spec: ViewSpec, variates: np.ndarray, views: Sequence[int], sizes: Sequence[tuple[int, str]]
) -> list[torch.Tensor]:
    """One decoded image (H, W, 3) in V views, for each (size, interpolation): (V, 3, S, S) uint8.

    variates: (V, 36), `draw` for this image's key and these views.
    """
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    height, width = image.shape[:2]
    resolved = [resolve_view(spec, u, int(v), height, width) for u, v in zip(variates, views, strict=True)]
    return [torch.stack([render_view(pixels, view, size, how) for view in resolved]) for size, how in sizes]
