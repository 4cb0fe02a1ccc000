"""Render the pixels of resolved views, with torchvision's antialiased transforms on uint8."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from compress_ssl.pipeline.views.augment import ResolvedView, ViewSpec, resolve_view

BLUR_REFERENCE = 224  # pixels: a blur's sigma is that of a crop of this side and scales with the rendered side
LEAST_SIGMA = 0.05  # pixels; a smaller blur changes no 8-bit value
# An image longer than 16:1 is first cut to its middle for view 0. The centre crop shows the same square, and a strip
# of many thousand pixels is not enlarged as a whole.
_LONGEST_RATIO = 16


def render_view(image: torch.Tensor, view: ResolvedView, size: int, interpolation: str) -> torch.Tensor:
    """Render one view of an image: (3, H, W) uint8 -> (3, size, size) uint8."""
    mode = InterpolationMode(interpolation)
    if view.plain:
        return _render_plain_view(image, view.plain, size, mode)
    box = image[:, view.top : view.top + view.height, view.left : view.left + view.width]
    pixels = tv.resize(box, [size, size], mode, antialias=True)
    if view.flip:
        pixels = tv.horizontal_flip(pixels)
    for which, factor in view.jitter:
        pixels = _JITTERS[which](pixels, factor)
    if view.grey:
        pixels = tv.rgb_to_grayscale(pixels, num_output_channels=3)
    sigma = view.sigma * size / BLUR_REFERENCE
    if sigma > LEAST_SIGMA:
        radius = max(1, math.ceil(3 * sigma))
        radius = min(radius, size - 1)  # torchvision pads by reflection, which needs a radius below the side
        pixels = tv.gaussian_blur(pixels, [2 * radius + 1] * 2, [sigma] * 2)
    if view.solarize:
        pixels = tv.solarize(pixels, 128)
    rendered: torch.Tensor = pixels.contiguous()
    return rendered


def _render_plain_view(image: torch.Tensor, crop_ratio: float, size: int, mode: InterpolationMode) -> torch.Tensor:
    """Resize the shorter side to size / crop_ratio and crop the centre: (3, H, W) -> (3, size, size) uint8."""
    shorter = min(image.shape[-2:])
    image = tv.center_crop(image, [min(side, _LONGEST_RATIO * shorter) for side in image.shape[-2:]])
    least = max(size, math.floor(size / crop_ratio + 1e-6))  # timm and torchvision both round down
    target = [int(least * side / shorter) for side in image.shape[-2:]]
    centre: torch.Tensor = tv.center_crop(tv.resize(image, target, mode, antialias=True), [size, size])
    return centre


_JITTERS = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)


def render_views(
    image: np.ndarray, spec: ViewSpec, variates: np.ndarray, views: Sequence[int], sizes: Sequence[tuple[int, str]]
) -> list[torch.Tensor]:
    """Render V views of a decoded image: for each (S, interpolation) in `sizes` a tensor (V, 3, S, S) uint8.

    image: (H, W, 3) uint8; variates: (V, 36) from `draw_variates` for the view key of the image and these views.
    """
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    height, width = image.shape[:2]
    resolved = [resolve_view(spec, u, int(v), height, width) for u, v in zip(variates, views, strict=True)]
    return [torch.stack([render_view(pixels, view, size, mode) for view in resolved]) for size, mode in sizes]
