"""`FeatureExtractor`: a frozen model on one device, applied to batches of a fixed size."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.models.precision import autocast


@dataclass
class FeatureExtractor:
    """A frozen model on a device: uint8 pixels (B, 3, S, S) -> {output: float32 (B, ...)}."""

    embedder: Embedder
    device: torch.device
    precision: str = "fp32"
    """A key of models.precision.PRECISIONS."""

    batch_size: int = 64
    """Images per forward pass; smaller batches are padded."""

    names: Sequence[str] = ("embedding",)
    """The outputs to compute; see Embedder.forward_outputs."""

    def __post_init__(self) -> None:
        self.embedder.enable_outputs(self.names)
        self.embedder.eval().requires_grad_(False).to(self.device).to(memory_format=torch.channels_last)

    @property
    def batches_ahead(self) -> int:
        """Batches that may be in progress on the device while the host processes the results of an earlier one."""
        return 1 if self.device.type == "cuda" else 0

    def __call__(self, pixels: torch.Tensor) -> dict[str, np.ndarray]:
        """Compute all outputs of at most `batch_size` images and copy them to the host."""
        return {name: out.cpu().numpy() for name, out in self.start(pixels).items()}

    def start(self, pixels: torch.Tensor, names: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        """Start a forward pass and return its outputs on the device; a GPU may still be computing them.

        pixels: uint8 (n, 3, S, S), n at most `batch_size`. A smaller batch is padded with black images, because the
        arithmetic of a library may depend on the size of the batch: an image's feature must not.
        """
        n = len(pixels)
        if n < self.batch_size:
            pixels = torch.cat([pixels, pixels.new_zeros((self.batch_size - n, *pixels.shape[1:]))])
        with torch.inference_mode(), autocast(self.device, self.precision):
            images = self.embedder.prepare(pixels.to(self.device, non_blocking=True))
            images = images.contiguous(memory_format=torch.channels_last)
            outputs = self.embedder.forward_outputs(images, names or self.names)
            return {name: out[:n].float() for name, out in outputs.items()}
