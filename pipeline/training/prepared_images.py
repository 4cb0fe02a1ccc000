"""The input images of one step on the device, shared by students that take the same ones."""

from collections.abc import Hashable

import torch
from torch import Tensor

from compress_ssl.pipeline.training.student import Student


class PreparedImages:
    """A cache for one step: pixels are moved to the device and normalised once for all students that share them."""

    def __init__(self, device: torch.device):
        self.device = device
        self._images: dict[Hashable, tuple[Tensor, int]] = {}  # with torch's version counter when they were made

    def prepare(self, student: Student, pixels: Tensor, selection: Hashable) -> Tensor:
        """(B, W, 3, S, S) uint8 pixels -> (B * W, 3, S, S) float32, normalised as the student requires.

        selection: stands for the part of the step's pixels that was passed. Students with an equal selection and
        equal preprocessing receive the same tensor.
        """
        model = student.model
        key = (selection, model.preprocessing)
        images, version = self._images.get(key, (None, 0))
        # A student with an in-place first layer overwrites its input; torch then raises the version counter.
        if images is None or images._version != version:
            images = model.prepare(pixels.flatten(0, 1).to(self.device, non_blocking=True))
            self._images[key] = images, images._version
        return images
